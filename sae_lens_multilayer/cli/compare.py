"""Trains one SAE for all layers and one for each, and compares them."""

import sys
from pathlib import Path

from sae_lens_multilayer.cli import PROG
from sae_lens_multilayer.cli.sweep import Options, read_sections
from sae_lens_multilayer.cli.tables import print_table
from sae_lens_multilayer.sweeps.compare import train_and_compare
from sae_lens_multilayer.sweeps.resumable import PointsFailedError

__all__ = ["Options", "run"]

EXAMPLES = """example:
  sae-lens-multilayer compare compare.yaml --output compare"""


def run(options: Options) -> None:
    """Run the command."""
    base, evaluation, _ = read_sections(options.file)
    try:
        found = train_and_compare(base, options.output, evaluation=evaluation)
    except PointsFailedError as error:
        sys.exit(f"{PROG} compare: {error}")
    tables = [found.comparison.to_dataframe()[["fvu", "delta_ce", "kl_div"]]]
    if found.transfer is not None:
        tables.append(found.transfer.to_dataframe())
    for table in [*tables, found.costs]:
        print_table(table)
        print()
    print(f"Written: {Path(options.output) / 'comparison'}")
