"""Draws results; the drawing library is loaded when something is drawn."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_lens_multilayer.hooks import layer_labels
from sae_lens_multilayer.metrics import LayerMetrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_TICKS = 16


def plot_fvu_by_layer(metrics: LayerMetrics) -> "Figure":
    """Draw the fraction of variance unexplained at each layer.

    Args:
        metrics: Held-out metrics of an SAE.

    Returns:
        A figure with one line for each of the two definitions of FVU.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(metrics.fvu, "o-", label="around the mean vector (fvu)")
    axes.plot(metrics.fvu_scalar, "s--", label="about one mean (fvu_scalar)")
    labels = [name.removeprefix("layer_") for name in layer_labels(metrics.hook_names)]
    every = -(-len(labels) // _MOST_TICKS)
    axes.set_xticks(range(0, len(labels), every), labels[::every])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer")
    axes.set_ylabel("fraction of variance unexplained")
    axes.set_title(f"Reconstruction on {metrics.n_tokens:,} held-out tokens")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write a figure as a picture; the ending of `path` is its format."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
