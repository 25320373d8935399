"""Draws pictures with matplotlib, which is imported when something is drawn."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_lens_multilayer.pictures.description import (
    Axis,
    Heatmap,
    Panel,
    Picture,
    Series,
    picture_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLES = ("o-", "s--", "D:", "P-.", "X-", "*--")
_LINE_HEIGHT = 0.2
"""Of titles and captions, in inches."""


def draw(result: Any, **context: Any) -> "Figure":
    """Draw a `Picture`, or a result with one picture, as a matplotlib figure.

    `context` is as in `Result.pictures`.
    """
    picture = picture_of(result, **context)
    figure, grid = _layout(picture)
    for axes, panel in zip(grid.flat, picture.panels, strict=True):
        _draw_panel(figure, axes, panel)
    for row in grid:
        before: list[str] = []
        for axes in row:
            labels = axes.get_legend_handles_labels()[1]
            # One legend is enough for panels of the same series in a row.
            if labels and labels != before:
                _add_legend(axes, labels, figure.get_figwidth() / len(row))
            before = labels
    return figure


def save_figure(figure: Any, path: str | Path) -> Path:
    """Save a figure as an image, in the format of the suffix of `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _layout(picture: Picture) -> "tuple[Figure, np.ndarray]":
    """A figure with title and caption, and its axes in rows and columns."""
    from matplotlib.figure import Figure

    n_columns = picture.n_columns or len(picture.panels)
    n_rows = -(-len(picture.panels) // n_columns)
    plain_width = 6.5 if n_columns == 1 else 4.8
    sizes = np.array([_size(panel, plain_width) for panel in picture.panels])
    width, height = n_columns * sizes[:, 0].max(), n_rows * sizes[:, 1].max()
    title = _wrapped(picture.title, 9 * width)
    caption = _wrapped(picture.caption, 14 * width)
    height += _LINE_HEIGHT * (title.count("\n") + caption.count("\n"))
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title)
    figure.supxlabel(caption, fontsize=8)
    return figure, figure.subplots(n_rows, n_columns, squeeze=False)


def _size(panel: Panel, plain_width: float) -> tuple[float, float]:
    """Width and height in inches, with space for all that is printed."""
    if panel.heatmap is None:
        return plain_width, 3.7
    n_rows, n_columns = panel.heatmap.values.shape
    n_printed = min(n_columns, max(30, panel.x.most_names))
    per_column = 0.34 if panel.heatmap.print_values else 0.22
    height = 1.5 + 0.25 * min(n_rows, max(16, panel.y.most_names))
    return max(5.0, 2.5 + per_column * n_printed), max(4.0, height)


def _draw_panel(figure: "Figure", axes: "Axes", panel: Panel) -> None:
    if panel.heatmap is None:
        axes.grid(alpha=0.3)
    else:
        _draw_heatmap(figure, axes, panel.heatmap)
    for series, colour in panel.coloured_series():
        _draw_series(axes, series, colour)
    if panel.vertical_line is not None:
        x, label = panel.vertical_line
        axes.axvline(x, color="black", linestyle="--", linewidth=1, label=_plain(label))
    _mark_axis(axes, "x", panel.x)
    _mark_axis(axes, "y", panel.y)


def _draw_heatmap(figure: "Figure", axes: "Axes", heatmap: Heatmap) -> None:
    from matplotlib.colors import PowerNorm

    values, top = heatmap.values, heatmap.highest
    image = axes.imshow(
        values,
        norm=PowerNorm(heatmap.power, vmin=0, vmax=top),
        cmap=heatmap.colours,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
    )
    outside = np.nanmin(values) < 0, np.nanmax(values) > top
    extend = ("neither", "max", "min", "both")[2 * outside[0] + outside[1]]
    figure.colorbar(image, label=_plain(heatmap.label), extend=extend)
    if heatmap.print_values:
        for (row, column), value in np.ndenumerate(values):
            red, green, blue, _ = image.cmap(image.norm(value))
            axes.text(
                column,
                row,
                f"{value:.2f}",
                color="black" if red + green + blue > 1.5 else "white",
                ha="center",
                va="center",
                fontsize=6,
            )


def _draw_series(axes: "Axes", series: Series, colour: int) -> None:
    kwargs: dict[str, Any] = {
        "color": f"C{colour % 10}",
        "label": _plain(series.label) or None,
    }
    match series.kind:
        case "line":
            style = _STYLES[series.style % len(_STYLES)]
            axes.plot(series.x, series.y, style, **kwargs)
        case "points":
            kwargs |= {"color": "white", "edgecolors": "black"}
            axes.scatter(series.x, series.y, s=18, **kwargs)
        case "band":
            axes.fill_between(series.x, series.y, series.top, alpha=0.3, **kwargs)  # type: ignore[arg-type]
        case "intervals":
            kwargs["color"] = "black"
            axes.vlines(series.x, series.y, series.top, **kwargs)  # type: ignore[arg-type]
        case "bars":
            bars = axes.bar(series.x, series.y, series.width, alpha=0.6, **kwargs)  # type: ignore[arg-type]
            if series.texts:
                axes.bar_label(bars, list(map(_plain, series.texts)))
                axes.margins(y=0.15)


def _mark_axis(axes: "Axes", which: str, axis: Axis) -> None:
    drawn = axes.xaxis if which == "x" else axes.yaxis
    drawn.set_label_text(_plain(axis.label))
    if axis.log:
        axes.set(**{f"{which}scale": "log"})
    if axis.include_zero and axes.dataLim.y0 >= 0:
        axes.set_ylim(bottom=0)
    if axis.names is not None:
        indices = axis.printed()
        names = [_plain(axis.names[i]) for i in indices]
        # Names that are too long to print side by side.
        vertical = which == "x" and max(map(len, names), default=0) * len(names) > 44
        style: dict[str, Any] = {"rotation": 90, "fontsize": 7} if vertical else {}
        drawn.set_ticks(indices, names, **style)
    elif axis.ticks is not None:
        drawn.set_ticks(axis.ticks, [f"{tick:g}" for tick in axis.ticks])
        axes.minorticks_off()


def _add_legend(axes: "Axes", labels: Sequence[str], width: float) -> None:
    """Add a legend above the axes, which are `width` inches wide with margins."""
    n_columns = int(15 * width / (max(map(len, labels)) + 8))
    axes.legend(
        fontsize=8,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.02),
        borderaxespad=0,
        ncols=min(len(labels), max(1, n_columns)),
    )


def _wrapped(text: str, width: float) -> str:
    return textwrap.fill(_plain(text), int(width))


def _plain(text: str) -> str:
    """Text that is shown as it is.

    A "$" would start a formula, a label with "_" at its start would not be in a legend,
    and half a surrogate pair, as in a path that is not UTF-8, cannot be drawn.
    """
    text = text.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text
