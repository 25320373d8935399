"""Trains, evaluates and analyses an SAE for each point of a sweep."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simple_parsing import field as option

from sae_lens_multilayer.cli import PROG
from sae_lens_multilayer.cli.tables import print_table
from sae_lens_multilayer.config_files import check_known, mapping, read_settings_file
from sae_lens_multilayer.sweeps.evaluation import SweepEvaluation
from sae_lens_multilayer.sweeps.points import combine, grid
from sae_lens_multilayer.sweeps.sweep import TABLE_FILE, sweep

_SHOWN = ("status", "fvu", "delta_ce", "kl_div", "token_ratio", "training_seconds")

EXAMPLES = """example:
  sae-lens-multilayer sweep sweep.yaml --output sweep"""


@dataclass
class Options:
    """What is trained."""

    file: str = option(positional=True, metavar="file")
    """JSON or YAML file with `base` (settings of a run), `evaluation` and, for a sweep,
    `grid` (values for each setting), `points` (a list of settings) or both."""
    output: str = option()
    """Folder; an earlier run of the same file is resumed there."""


def run(options: Options) -> None:
    """Run the command."""
    base, evaluation, sections = read_sections(options.file, "points", "grid")
    points: Any = sections.get("points", [{}])
    if not isinstance(points, list) or not all(isinstance(p, dict) for p in points):
        raise ValueError(f"`points` must be a list of settings; got {points!r}.")
    chosen = combine(points, grid(**mapping(sections, "grid")))
    table = sweep(base, chosen, options.output, evaluation=evaluation)
    print_table(table[[name for name in _SHOWN if name in table]])
    print(f"\nWritten: {Path(options.output) / TABLE_FILE}, and a folder for each row.")
    failed = table[table.status == "failed"]
    if len(failed):
        reasons = [f"  {name}: {row.error}" for name, row in failed.iterrows()]
        sys.exit("\n".join([f"{PROG} sweep: these points have failed:", *reasons]))


def read_sections(
    file: str, *more: str
) -> tuple[dict[str, Any], SweepEvaluation, dict[str, Any]]:
    """The base, the evaluation and all sections of a file; `more` may be in it."""
    sections = read_settings_file(file)
    check_known(sections, ["base", "evaluation", *more])
    evaluation = SweepEvaluation.from_settings(mapping(sections, "evaluation"))
    return mapping(sections, "base"), evaluation, sections
