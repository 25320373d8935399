"""Runs SAELens' own evaluations on published SAEs."""

import sys
from unittest import mock

from sae_lens.evals import get_saes_from_regex, process_args, run_evals_cli

from sae_lens_multilayer.cli import PROG
from sae_lens_multilayer.published.releases import multi_layer_ids


def run(arguments: list[str]) -> None:
    """Run the command with the arguments of `python -m sae_lens.evals`."""
    # SAELens' parser takes the program's name from there.
    with mock.patch.object(sys, "argv", [f"{PROG} evals"]):
        options = process_args(arguments)
    chosen = get_saes_from_regex(options.sae_regex_pattern, options.sae_block_pattern)
    wholes = multi_layer_ids().intersection((sae[0], sae[1]) for sae in chosen)
    if wholes:
        release, sae_id = min(wholes)
        raise ValueError(
            f"SAELens evaluates SAEs of one hook, but the patterns choose "
            f"{len(wholes)} of all hooks, as {sae_id!r} of {release!r}. Choose hooks: "
            f"'{sae_id}/.*' for all of one, '.*/blocks.*' for those of all."
        )
    run_evals_cli(arguments)
