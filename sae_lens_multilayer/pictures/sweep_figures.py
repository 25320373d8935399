"""Draws the table of a sweep."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = {
    "fvu": "fraction of variance unexplained",
    "delta_ce": "ΔCE (nats)",
    "token_ratio": "variance over layers:\nat a token / of a latent",
}
_LABELS = {"expansion_factor": "R = d_sae / d_in"}
_SHORT = {"expansion_factor": "R"}
_MARKERS = "osv^DPX*"
_STYLES = ("-", "--", ":", "-.")
_MOST_ROWS = 6


def plot_sweep(table: pd.DataFrame, varied: Sequence[str]) -> "Figure":
    """Draw FVU, ΔCE and the variance within tokens against each setting that varies.

    A row of panels for each numeric setting, with lines for the values of the others:
    colours for the first of these, markers and dashes for all further ones. Where no
    setting is a number, the points stand side by side.

    Args:
        table: As `sweep` returns it; points that are not done are left out.
        varied: The settings that vary.

    Raises:
        ValueError: If no point is done.
    """
    done: Any = table[table.status == "done"]
    if done.empty:
        raise ValueError("There must be a point that is done; there is none.")
    from matplotlib.figure import Figure

    columns = [name for name in PANELS if name in done and done[name].notna().any()]
    differing = [n for n in varied if done[n].map(str).nunique() > 1]
    across = [name for name in differing if _is_numeric(done[name])][:_MOST_ROWS]
    rows: list[str | None] = [*across] or [None]
    figure = Figure(
        figsize=(1.5 + 3.6 * len(columns), 0.6 + 3.2 * len(rows)), layout="constrained"
    )
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for axes_of_row, x in zip(grid, rows, strict=True):
        for axes, column in zip(axes_of_row, columns, strict=True):
            if x is None:
                _draw_side_by_side(axes, done, column)
            else:
                _draw_lines(axes, done, column, x, [n for n in differing if n != x])
            axes.set_ylabel(PANELS[column])
            axes.grid(alpha=0.3)
        if axes_of_row[-1].get_legend_handles_labels()[1]:
            axes_of_row[-1].legend(
                fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5)
            )
    n_tokens = sorted(set(done.n_tokens.astype(int)))
    left_out = len(table) - len(done)
    figure.suptitle(
        f"Means over layers, {', '.join(f'{n:,}' for n in n_tokens)} held-out tokens"
        + f" ({left_out} of {len(table)} points are not done)" * bool(left_out)
    )
    return figure


def plot_costs(costs: pd.DataFrame) -> "Figure":
    """Draw training time and peak memory of one SAE beside single-layer ones.

    Args:
        costs: As `SingleLayerRuns.costs`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    rows = costs.loc[["multi_layer", "single_layers"]]
    labels = ["one SAE", f"{len(costs) - 2} single-layer SAEs"]
    for axes, column, label in zip(
        figure.subplots(1, 2),
        ("training_seconds", "training_peak_memory_mib"),
        (
            "training time (s)\n(single layers: the sum)",
            "peak memory (MiB)\n(single layers: the highest)",
        ),
        strict=True,
    ):
        bars = axes.bar(labels, rows[column], color=["C0", "C1"], width=0.6)
        values = [f"{v:,.0f}" if v >= 10 else f"{v:.2g}" for v in rows[column]]
        axes.bar_label(bars, values)
        axes.set_ylabel(label)
        axes.margins(y=0.15)
    return figure


def _draw_lines(
    axes: "Axes", done: pd.DataFrame, column: str, x: str, others: Sequence[str]
) -> None:
    """One line for each choice of the other settings."""
    keys, colours, styles = (
        _keys(done, names) for names in (others, others[:1], others[1:])
    )
    for key in dict.fromkeys(keys):
        first = keys.index(key)
        colour = list(dict.fromkeys(colours)).index(colours[first])
        style = list(dict.fromkeys(styles)).index(styles[first])
        line: Any = done[[other == key for other in keys]]
        line = line.sort_values(x)
        values = done.iloc[first]
        axes.plot(
            line[x].astype(float),
            line[column],
            color=f"C{colour % 10}",
            marker=_MARKERS[style % len(_MARKERS)],
            linestyle=_STYLES[style % len(_STYLES)],
            label=", ".join(_text(name, values[name]) for name in others) or None,
        )
    _mark_values(axes, sorted(set(done[x].astype(float))))
    axes.set_xlabel(_LABELS.get(x, x))


def _draw_side_by_side(axes: "Axes", done: pd.DataFrame, column: str) -> None:
    places = range(len(done))
    axes.plot(places, done[column], "o")
    axes.set_xticks(places, list(done.index), rotation=30, ha="right", fontsize=8)


def _mark_values(axes: "Axes", values: list[float]) -> None:
    if values[0] > 0 and values[-1] >= 4 * values[0]:
        axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()


def _keys(done: pd.DataFrame, names: Sequence[str]) -> list[tuple[str, ...]]:
    """What tells the values of some settings apart, for each point."""
    return [tuple(str(row[name]) for name in names) for _, row in done.iterrows()]


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
