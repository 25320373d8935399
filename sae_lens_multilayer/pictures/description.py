"""What a picture shows, in plain values without a drawing library."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Shaped

from sae_lens_multilayer.hooks import layer_labels

FVU_LABEL = "fraction of variance unexplained"

Values: TypeAlias = Sequence[float] | Sequence[int] | np.ndarray


@dataclass
class Axis:
    """One axis of a panel."""

    label: str
    """With the unit, if there is one."""
    names: Sequence[str] | None = None
    """Names of the positions 0, 1, 2, ...; None: the axis has numbers."""
    most_names: int = 16
    """Names to print: of more, every n-th; 0: none."""
    ticks: Sequence[float] | Sequence[int] | None = None
    """Numbers to print; None: chosen by the renderer."""
    log: bool = False
    include_zero: bool = False

    def printed(self) -> range:
        """Indices of the names to print."""
        n = len(self.names or ()) if self.most_names else 0
        return range(0, n, max(1, -(-n // (self.most_names or 1))))


@dataclass
class Series:
    """Values to draw over an axis."""

    label: str
    """Entry in the legend; empty: none."""
    x: Values
    y: Values
    kind: Literal["line", "points", "bars", "band", "intervals"] = "line"
    top: Values = ()
    """Upper edge of a band or of each interval, whose lower edge is `y`."""
    width: float = 0.6
    """Of each bar, in units of the x axis."""
    texts: Sequence[str] = ()
    """Text above each bar."""
    colour: int | None = None
    """Index into the palette; None: the index of the series in the panel."""
    style: int = 0
    """Index into the marker and dash styles of lines."""


@dataclass
class Heatmap:
    """A matrix as colours; row 0 is at the bottom, NaN is white."""

    values: Shaped[np.ndarray, "row column"]
    label: str
    """Meaning of the colours, with the unit."""
    top: float | None = 1.0
    """Value of the last colour; None: the largest value. The first colour is 0."""
    colours: str = "viridis"
    """A colour map that matplotlib and plotly both have."""
    power: float = 1.0
    """Colours follow `value ** power`: below 1, small values are easier to see."""
    print_values: bool = False

    @property
    def highest(self) -> float:
        """Value of the last colour."""
        return float(np.nanmax(self.values)) if self.top is None else self.top


@dataclass
class Panel:
    """Series, a heatmap or both between two axes."""

    x: Axis
    y: Axis
    series: Sequence[Series] = ()
    heatmap: Heatmap | None = None
    vertical_line: tuple[float, str] | None = None
    """Its x, and its entry in the legend."""

    def coloured_series(self) -> list[tuple[Series, int]]:
        """Each series with the index of its colour."""
        return [
            (series, i if series.colour is None else series.colour)
            for i, series in enumerate(self.series)
        ]


@dataclass
class Picture:
    """The panels that show a result."""

    title: str
    panels: list[Panel]
    caption: str = ""
    n_columns: int = 0
    """Panels in a row; 0: all in one row."""


def picture_of(result: Any, **context: Any) -> Picture:
    """A picture itself, or the only picture of a result.

    Raises:
        ValueError: If the result has no picture or several.
    """
    if isinstance(result, Picture):
        return result
    pictures: dict[str, Picture] = result.pictures(**context)
    if len(pictures) != 1:
        raise ValueError(
            f"Give one picture to draw; a {type(result).__name__} has "
            f"{len(pictures)}: {list(pictures)}. `result.pictures()[name]` is one."
        )
    return next(iter(pictures.values()))


def pictures_of(results: Mapping[str, Any], **context: Any) -> dict[str, Picture]:
    """All pictures of some results, by the names of the results and their own."""
    return {
        f"{name}_{end}" if end else name: picture
        for name, result in results.items()
        for end, picture in result.pictures(**context).items()
    }


def layer_axis(hook_names: Sequence[str], label: str = "layer") -> Axis:
    """An axis with the layers of an SAE."""
    return Axis(label, short_labels(hook_names))


def token_axis(
    label: str, ids: Sequence[int], text_of: Callable[[int], str], most_names: int
) -> Axis:
    """An axis with the texts of tokens, without line breaks."""
    return Axis(label, [repr(text_of(i))[1:-1] for i in ids], most_names)


def short_labels(hook_names: Sequence[str]) -> list[str]:
    """Layer numbers, or hook names if numbers are ambiguous."""
    return [label.removeprefix("layer_") for label in layer_labels(hook_names)]


def layer_panel(
    hook_names: Sequence[str], label: str, series: Mapping[str, Values]
) -> Panel:
    """A line for each of some series with one value per layer."""
    lines = [
        Series(name, range(len(hook_names)), values, style=style)
        for style, (name, values) in enumerate(series.items())
    ]
    return Panel(layer_axis(hook_names), Axis(label, include_zero=True), lines)


def histogram(
    label: str, values: Values, edges: np.ndarray, as_fractions: bool = False
) -> Series:
    """Bars with the number of values, or their fraction, between `edges`.

    Values outside are counted in the first or the last bin.
    """
    values = np.clip(np.asarray(values, dtype=float), edges[0], edges[-1])
    counts, _ = np.histogram(values, edges)
    heights = counts / max(1, len(values)) if as_fractions else counts
    middles, width = (edges[1:] + edges[:-1]) / 2, float(edges[1] - edges[0])
    return Series(label, middles, heights, "bars", width=width)
