"""Draws pictures with plotly, which is imported when something is drawn."""

import html
from collections import defaultdict
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_lens_multilayer.pictures.description import (
    Axis,
    Heatmap,
    Panel,
    Series,
    picture_of,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_SYMBOLS = ("circle", "square", "diamond", "cross", "x", "star")
_DASHES = ("solid", "dash", "dot", "dashdot")


def draw_interactive(result: Any, **context: Any) -> "list[Figure]":
    """Draw a `Picture`, or a result with one, as plotly figures, one for each panel.

    `context` is as in `Result.pictures`.
    """
    return [_figure(panel) for panel in picture_of(result, **context).panels]


def _figure(panel: Panel) -> "Figure":
    import plotly.graph_objects as go

    figure = go.Figure()
    if panel.heatmap is not None:
        figure.add_trace(_heatmap(panel, panel.heatmap))
    for series, colour in panel.coloured_series():
        figure.add_trace(_trace(series, colour, panel.x))
    if panel.vertical_line is not None:
        x, label = panel.vertical_line
        line = {"color": "black", "dash": "dash", "width": 1}
        figure.add_vline(x, line=line, name=_text(label), showlegend=True)
    figure.update_layout(
        template="plotly_white",
        height=420,
        # Plotly's buttons are in the margin above, where they cover nothing.
        margin={"l": 50, "r": 10, "t": 36, "b": 40},
        legend={"orientation": "h", "x": 0} | _legend_place(panel.x),
        showlegend=True,
        barmode="overlay",
        xaxis=_axis(panel.x),
        yaxis=_axis(panel.y),
    )
    if panel.heatmap is not None and panel.series:
        # An axis with names has no positions between them, so series have their own.
        n_rows, n_columns = panel.heatmap.values.shape
        hidden = {"overlaying": "y", "visible": False, "range": [-0.5, n_rows - 0.5]}
        figure.update_layout(yaxis2=hidden, xaxis_range=[-0.5, n_columns - 0.5])
        figure.update_traces(selector={"type": "scatter"}, yaxis="y2")
        figure.update_yaxes(fixedrange=True)
    return figure


def _heatmap(panel: Panel, heatmap: Heatmap) -> Any:
    import plotly.graph_objects as go
    from plotly.colors import sample_colorscale

    shares = np.linspace(0, 1, 17)
    colours = sample_colorscale(heatmap.colours, shares.tolist())
    x, y, z = map(_text, (panel.x.label, panel.y.label, heatmap.label))
    return go.Heatmap(
        z=heatmap.values,
        x=_names(panel.x),
        y=_names(panel.y),
        zmin=0,
        zmax=heatmap.highest,
        colorscale=list(zip(shares ** (1 / heatmap.power), colours, strict=True)),
        colorbar={"title": {"text": z, "side": "right"}, "thickness": 14},
        texttemplate="%{z:.2f}" if heatmap.print_values else None,
        hoverongaps=False,
        hovertemplate=f"{x}: %{{x}}<br>{y}: %{{y}}<br>{z}: %{{z:.4f}}<extra></extra>",
    )


def _trace(series: Series, colour: int, axis: Axis) -> dict[str, Any]:
    from plotly.colors import qualitative

    names, line = _names(axis), {"color": qualitative.D3[colour % 10]}
    x: list[Any] = [*series.x] if names is None else [names[int(i)] for i in series.x]
    trace: dict[str, Any] = {
        "type": "bar" if series.kind == "bars" else "scatter",
        "name": _text(series.label),
        "showlegend": bool(series.label),
        "x": x,
        "y": np.asarray(series.y),
    }
    match series.kind:
        case "line":
            dash = _DASHES[series.style % len(_DASHES)]
            marker = {"symbol": _SYMBOLS[series.style % len(_SYMBOLS)]}
            trace |= {"mode": "lines+markers", "marker": marker}
            trace["line"] = {**line, "dash": dash}
        case "points":
            border = {"color": "black", "width": 1}
            marker = {"color": "white", "size": 7, "line": border}
            trace |= {"mode": "markers", "marker": marker}
        case "band":
            y = np.concatenate([series.top, trace["y"][::-1]])
            trace |= {"x": [*x, *x[::-1]], "y": y, "fill": "toself", "mode": "lines"}
            trace["line"] = {**line, "width": 0}
        case "intervals":
            length = np.asarray(series.top) - trace["y"]
            bars = {"array": length, "symmetric": False, "color": "black", "width": 0}
            trace |= {"mode": "markers", "marker": {"opacity": 0}, "error_y": bars}
        case "bars":
            trace |= {"width": series.width, "opacity": 0.6, "marker": line}
            if series.texts:
                texts = [*map(_text, series.texts)]
                trace |= {"text": texts, "textposition": "outside"}
    return trace


def _legend_place(x: Axis) -> dict[str, Any]:
    """Below the axis, or above the panel if names may be printed vertically."""
    if x.names and x.most_names and max(map(len, x.names)) > 3:
        return {"yanchor": "bottom", "y": 1}
    return {"yanchor": "top", "y": -0.2}


def _axis(axis: Axis) -> dict[str, Any]:
    layout: dict[str, Any] = {"title": {"text": _text(axis.label)}, "automargin": True}
    if axis.include_zero:
        layout["rangemode"] = "tozero"
    if axis.names is not None:
        layout["categoryorder"], layout["categoryarray"] = "array", _names(axis)
        layout["showticklabels"] = axis.most_names > 0
    layout["type"] = "category" if axis.names else "log" if axis.log else "linear"
    if axis.ticks is not None:
        layout["tickvals"] = list(axis.ticks)
        layout["ticktext"] = [f"{tick:g}" for tick in axis.ticks]
    return layout


def _names(axis: Axis) -> list[str] | None:
    """Names of an axis; plotly merges equal ones, so repeats get invisible spaces."""
    if axis.names is None:
        return None
    seen: defaultdict[str, count[int]] = defaultdict(count)
    return [_text(name) + "\u200b" * next(seen[name]) for name in axis.names]


def _text(text: str) -> str:
    """Text without markup: plotly reads HTML tags, formulas and templates."""
    text = text.encode("utf-8", "backslashreplace").decode()
    text = html.escape(text, quote=False).replace("\n", "<br>")
    return text.replace("$", "&#36;").replace("%{", "%&#123;")
