"""Train many SAEs: over choices of settings, or of all layers beside each."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simple_parsing import field as option

from sae_lens_multilayer.cli.parsing import PROG, parse
from sae_lens_multilayer.config_files import check_known, mapping, read_settings_file
from sae_lens_multilayer.sweeps.compare import PointsFailedError, train_and_compare
from sae_lens_multilayer.sweeps.evaluation import SweepEvaluation
from sae_lens_multilayer.sweeps.points import combine, grid
from sae_lens_multilayer.sweeps.run import TABLE_FILE
from sae_lens_multilayer.sweeps.run import sweep as run_sweep

_SHOWN = ("status", "fvu", "delta_ce", "kl_div", "token_ratio", "training_seconds")


@dataclass
class Options:
    """What is trained."""

    file: str = option(positional=True, metavar="file")
    """JSON or YAML file with `base` (settings of a run), `evaluation` and, for a sweep,
    `grid` (values for each setting), `points` (a list of settings) or both."""
    output: str = option()
    """Folder; with what an earlier run of the same file has left, it goes on."""


def sweep(arguments: list[str]) -> None:
    """Train, evaluate and analyse an SAE for each of many choices of settings."""
    options = parse(sweep, Options, arguments)
    sections = _read(options.file, "points", "grid")
    points: Any = sections.get("points", [{}])
    if not isinstance(points, list) or not all(isinstance(p, dict) for p in points):
        raise ValueError(f"`points` must be a list of settings; got {points!r}.")
    table = run_sweep(
        mapping(sections, "base"),
        combine(points, grid(**mapping(sections, "grid"))),
        options.output,
        evaluation=_evaluation(sections),
    )
    shown = [name for name in _SHOWN if name in table]
    _print(table[shown])
    print(f"\nWritten: {Path(options.output) / TABLE_FILE}")
    failed = table[table.status == "failed"]
    if len(failed):
        reasons = [f"  {name}: {row.error}" for name, row in failed.iterrows()]
        sys.exit("\n".join([f"{PROG} sweep: these points have failed:", *reasons]))


def compare(arguments: list[str]) -> None:
    """Train one SAE for all layers and one for each, and compare them."""
    options = parse(compare, Options, arguments)
    sections = _read(options.file)
    try:
        found = train_and_compare(
            mapping(sections, "base"), options.output, evaluation=_evaluation(sections)
        )
    except PointsFailedError as error:
        sys.exit(f"{PROG} compare: {error}")
    tables = [found.comparison.to_dataframe()[["fvu", "delta_ce", "kl_div"]]]
    if found.transfer is not None:
        tables.append(found.transfer.to_dataframe())
    for table in [*tables, found.costs]:
        _print(table)
        print()
    print(f"Written: {Path(options.output) / 'comparison'}")


def _print(table: Any) -> None:
    print(table.to_string(float_format="{:.4f}".format))


def _read(file: str, *more: str) -> dict[str, Any]:
    sections: Any = read_settings_file(file)
    if not isinstance(sections, Mapping):
        raise ValueError(f"{file} must hold names and values.")
    check_known(list(sections), ["base", "evaluation", *more])
    return dict(sections)


def _evaluation(sections: dict[str, Any]) -> SweepEvaluation:
    return SweepEvaluation.from_settings(mapping(sections, "evaluation"))
