"""Describes the pictures of sweeps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sae_lens_multilayer.pictures.description import (
    FVU_LABEL,
    Axis,
    Panel,
    Picture,
    Series,
)

METRICS = {
    "fvu": FVU_LABEL,
    "delta_ce": "ΔCE (nats)",
    "token_ratio": "variance over layers:\nat a token / of a latent",
}
"""Columns of a sweep's table that are drawn, and the labels of their axes."""
_LABELS = {"expansion_factor": "R = d_sae / d_in"}
_SHORT = {"expansion_factor": "R"}
_MOST_ROWS = 6


def describe_sweep(table: pd.DataFrame, varied: Sequence[str]) -> Picture:
    """FVU, ΔCE and the variance within tokens by each setting that varies.

    A row of panels for each numeric setting, with lines for the values of the others:
    colours for the first of these, markers and dashes for all further ones. If no
    setting is a number, the points of the sweep are drawn side by side.

    Args:
        table: As `sweep` returns it; points that are not done are left out.
        varied: The settings that vary.

    Raises:
        ValueError: If no point is done.
    """
    done: Any = table[table.status == "done"]
    if done.empty:
        raise ValueError("There must be a point that is done; there is none.")
    columns = [name for name in METRICS if name in done and done[name].notna().any()]
    differing = [n for n in varied if done[n].map(str).nunique() > 1]
    numeric = [name for name in differing if _is_numeric(done[name])][:_MOST_ROWS]
    panels = [
        _lines(done, column, x, [n for n in differing if n != x])
        for x in numeric
        for column in columns
    ]
    n_tokens = ", ".join(f"{n:,}" for n in sorted(set(done.n_tokens.astype(int))))
    not_done = len(table) - len(done)
    return Picture(
        f"Means over layers, {n_tokens} held-out tokens",
        panels or [_side_by_side(done, column) for column in columns],
        f"{not_done} of {len(table)} points are not done." if not_done else "",
        n_columns=len(columns),
    )


def _lines(done: Any, column: str, x: str, others: Sequence[str]) -> Panel:
    """One line for each choice of the other settings."""
    keys = [tuple(str(row[name]) for name in others) for _, row in done.iterrows()]
    colours = list(dict.fromkeys(key[:1] for key in keys))
    styles = list(dict.fromkeys(key[1:] for key in keys))
    series: list[Series] = []
    for key in dict.fromkeys(keys):
        line: Any = done[[other == key for other in keys]].sort_values(x)
        series.append(
            Series(
                ", ".join(_text(name, line[name].iloc[0]) for name in others),
                line[x].astype(float).to_numpy(),
                line[column].to_numpy(),
                colour=colours.index(key[:1]),
                style=styles.index(key[1:]),
            )
        )
    ticks = sorted(set(done[x].astype(float)))
    log = ticks[0] > 0 and ticks[-1] >= 4 * ticks[0]
    axis = Axis(_LABELS.get(x, x), ticks=ticks, log=log)
    return Panel(axis, Axis(METRICS[column]), series)


def _side_by_side(done: pd.DataFrame, column: str) -> Panel:
    names = [str(name) for name in done.index]
    bars = Series("", range(len(names)), done[column].to_numpy(), kind="bars")
    return Panel(Axis("", names, len(names)), Axis(METRICS[column]), [bars])


def _is_numeric(values: Any) -> bool:
    return all(
        isinstance(v, (int, float, np.number)) and not isinstance(v, bool)
        for v in values
    )


def _text(name: str, value: Any) -> str:
    if name == "layers" and value is None:
        return "all layers"
    if name == "model_name":
        return Path(value).name
    if isinstance(value, (list, tuple)):
        shown = ", ".join(map(str, value))
        if len(value) > 6:
            shown = f"{value[0]}, {value[1]}, ... {value[-1]} ({len(value)})"
        return f"{name} {shown}"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{_SHORT.get(name, name)} {text}"
