"""The published SAEs: list them, and run SAELens' own evaluations on them."""

import argparse
import re
import sys
from unittest import mock

from sae_lens.evals import get_saes_from_regex, process_args, run_evals_cli

from sae_lens_multilayer.cli.parsing import PROG, help_of
from sae_lens_multilayer.published.releases import multi_layer_ids
from sae_lens_multilayer.published.releases import releases as published_releases


def evals(arguments: list[str]) -> None:
    """Run SAELens' own evaluations, which then know the published SAEs.

    The arguments are those of `python -m sae_lens.evals`: a regular expression for
    releases, one for ids, and options.
    """
    # Its parser takes the program's name from there.
    with mock.patch.object(sys, "argv", [f"{PROG} evals"]):
        options = process_args(arguments)
    patterns = options.sae_regex_pattern, options.sae_block_pattern
    for pattern in patterns:
        _check_pattern(pattern)
    chosen = get_saes_from_regex(*patterns)
    wholes = multi_layer_ids().intersection((sae[0], sae[1]) for sae in chosen)
    if wholes:
        release, sae_id = min(wholes)
        sys.exit(
            f"{PROG} evals: SAELens evaluates SAEs of one hook, and the patterns "
            f"choose {len(wholes)} of all hooks, as {sae_id!r} of {release!r}. Choose "
            f"hooks: '{sae_id}/.*' for all of one, '.*/blocks.*' for those of all."
        )
    run_evals_cli(arguments)


def releases(arguments: list[str]) -> None:
    """List the published SAEs that `SAE.from_pretrained` knows."""
    parser = argparse.ArgumentParser(
        prog=f"{PROG} releases", description=help_of(releases)
    )
    parser.add_argument(
        "pattern",
        nargs="?",
        default="",
        help="regular expression that is to be found in the repository's name",
    )
    parser.add_argument("--csv", action="store_true", help="print a CSV file")
    options = parser.parse_args(arguments)
    pattern = _check_pattern(options.pattern)
    table = published_releases()
    table = table[table.repository.map(lambda name: bool(pattern.search(name)))]
    if table.empty:
        sys.exit(f"{parser.prog}: no published SAE matches {options.pattern!r}.")
    print(table.to_csv(index=False) if options.csv else table.to_string(index=False))


def _check_pattern(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{pattern!r} is not a regular expression: {error}."
        ) from error
