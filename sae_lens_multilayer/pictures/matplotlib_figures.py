"""Draws results; the drawing library is loaded when something is drawn."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from jaxtyping import Int
from torch import Tensor

from sae_lens_multilayer.analysis.distributions import LayerDistributions, PromptActs
from sae_lens_multilayer.analysis.geometry import DecoderSimilarity
from sae_lens_multilayer.analysis.layer_counts import ActiveLayers
from sae_lens_multilayer.analysis.layer_variances import Variances
from sae_lens_multilayer.analysis.layers_by_class import ClassKind, TokenClasses
from sae_lens_multilayer.analysis.near_duplicates import Redundancy
from sae_lens_multilayer.analysis.residual import ResidualStream
from sae_lens_multilayer.analysis.results import Result
from sae_lens_multilayer.analysis.transfer import Comparison, TransferMatrix
from sae_lens_multilayer.evaluation.metrics import LayerMetrics
from sae_lens_multilayer.hooks import layer_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_TICKS = 16


def plot_fvu_by_layer(metrics: LayerMetrics) -> "Figure":
    """Draw the fraction of variance unexplained at each layer.

    Args:
        metrics: Held-out metrics of an SAE.

    Returns:
        A figure with one line for each of the two definitions of FVU.
    """
    figure, axes = _figure(7.0, 3.5)
    axes.plot(metrics.fvu, "o-", label="around the mean vector (fvu)")
    axes.plot(metrics.fvu_scalar, "s--", label="about one mean (fvu_scalar)")
    _mark_layers(axes, "x", metrics.hook_names)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("fraction of variance unexplained")
    axes.set_title(f"Reconstruction on {metrics.n_tokens:,} held-out tokens")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def plot_layer_distributions(
    distributions: LayerDistributions, latents: Int[Tensor, " latent"] | None = None
) -> "Figure":
    """Draw P(layer | latent) as a heatmap, latents sorted by mean layer.

    Args:
        distributions: Of many tokens, or of one prompt.
        latents: Draw these, in this order; None: all that were active.

    Raises:
        ValueError: If no latent was active.
    """
    chosen = distributions.active_latents() if latents is None else latents
    if not len(chosen):
        raise ValueError("There must be a latent that was active; there is none.")
    from matplotlib.colors import PowerNorm

    probs = distributions.probs[:, chosen]
    figure, axes = _figure(8.0, 4.0)
    # Most latents are spread over many layers, and a few keep to one.
    norm = PowerNorm(0.5, vmin=0, vmax=1)
    image = axes.imshow(probs, norm=norm, aspect="auto", origin="lower")
    figure.colorbar(image, label="P(layer | latent)")
    _mark_layers(axes, "y", distributions.hook_names)
    axes.set_xlabel(f"{len(chosen):,} active latents, by mean layer")
    axes.set_title(f"Layers of each latent over {distributions.n_tokens:,} tokens")
    return figure


def plot_latent_on_prompt(
    acts: PromptActs, latent: int, token_texts: Sequence[str]
) -> "Figure":
    """Draw one latent's activation at each layer and token of a prompt.

    Args:
        acts: The activations of the prompt.
        latent: The latent.
        token_texts: The text of each token, as `model.to_str_tokens(prompt)`.
    """
    values = acts.of_latent(latent)
    n_tokens = len(acts.token_ids)
    figure, axes = _figure(max(5.0, 2 + 0.22 * n_tokens), 4.0)
    image = axes.imshow(values, aspect="auto", origin="lower", cmap="magma_r", vmin=0)
    figure.colorbar(image, label="activation")
    _mark_layers(axes, "y", acts.hook_names)
    labels = [repr(text)[1:-1] for text in token_texts]
    axes.set_xticks(range(n_tokens), _plain(labels), rotation=90, fontsize=7)
    axes.set_xlabel("token")
    axes.set_title(f"Latent {latent}")
    return figure


def plot_variances(variances: Variances) -> "Figure":
    """Draw the variances over layers, and their ratios, by number of tokens seen."""
    from matplotlib.figure import Figure

    history = variances.history
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for column, label in [
        ("var_l", "Var(L): all"),
        ("exp_var_l_j", "E[Var(L | J)]: of a latent"),
        ("exp_var_l_jt", "E[Var(L | J, T)]: of a latent at a token"),
    ]:
        left.plot(history.n_tokens, history[column], "o-", label=label)
    for column, style, label in [
        ("latent_ratio", "C0o-", "of a latent / all"),
        ("token_ratio", "C1o-", "at a token / of a latent"),
        (
            "reference_rel_var_f",
            "C0s:",
            "of a latent / all (paper's code)",
        ),
        (
            "reference_rel_var_t",
            "C1s:",
            "at a token / of a latent (paper's code)",
        ),
    ]:
        right.plot(history.n_tokens, history[column], style, label=label)
    left.set_ylabel("variance (layers squared)")
    right.set_ylabel("ratio of variances")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens seen")
        axes.grid(alpha=0.3)
        _legend_below(axes)
    figure.suptitle("Variance of the layer of an activation")
    return figure


def plot_active_layers(active: ActiveLayers) -> "Figure":
    """Draw at how many layers latents are active, for one token and over all."""
    from matplotlib.ticker import MaxNLocator

    n_layers = len(active.hook_names)
    was_active = active.n_active_tokens > 0
    bins = np.arange(n_layers + 1) + 0.5
    figure, axes = _figure(7.0, 3.5)
    for values, label in [
        (active.mean_per_token, "at one token (mean over its tokens)"),
        (active.overall(0.01), "over all tokens (each with over 1% of the times)"),
    ]:
        axes.hist(values[was_active], bins, alpha=0.6, label=label)  # type: ignore[arg-type]
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(f"layers at which a latent is active, of {n_layers}")
    axes.set_ylabel("latents")
    axes.set_title(
        f"{int(was_active.sum()):,} latents active above {active.threshold:g} on "
        f"{active.n_tokens:,} tokens"
    )
    _legend_below(axes, n_columns=2)
    return figure


def plot_residual_stream(residual: ResidualStream) -> "Figure":
    """Draw the similarity of every two layers, and the norms by layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    image = left.imshow(residual.cos_sim, origin="lower", vmin=0, vmax=1)
    figure.colorbar(image, label="mean cosine similarity (centred)", extend="min")
    _mark_layers(left, "x", residual.hook_names)
    _mark_layers(left, "y", residual.hook_names)
    layers = range(len(residual.hook_names))
    std = residual.norm_var.sqrt()
    right.plot(layers, residual.norm, "o-", label="mean")
    low, high = (residual.norm - std).clamp(min=0), residual.norm + std
    right.fill_between(layers, low, high, alpha=0.3, label="± standard deviation")
    _mark_layers(right, "x", residual.hook_names)
    right.set_ylim(bottom=0)
    right.set_ylabel("L2 norm")
    right.grid(alpha=0.3)
    right.legend()
    space = " after the lens" if residual.has_lens else ""
    figure.suptitle(f"Residual stream{space}, {residual.n_tokens:,} tokens")
    return figure


def plot_decoder_similarity(similarity: DecoderSimilarity) -> "Figure":
    """Draw how close each decoder direction is to the nearest other one."""
    figure, axes = _figure(7.0, 3.5)
    axes.hist(similarity.max_cos_sim.float(), 100)  # type: ignore[arg-type]
    label = f"mean: {similarity.mean:.3f}"
    axes.axvline(similarity.mean, color="black", linestyle="--", label=label)
    axes.set_xlabel("cosine similarity with the nearest other latent")
    axes.set_ylabel("latents")
    axes.set_title(f"Decoder of {len(similarity.max_cos_sim):,} latents")
    axes.legend()
    return figure


def plot_redundancy(redundancy: Redundancy) -> "Figure":
    """Draw how far near-duplicates' layers overlap, beside those of random pairs."""
    figure, axes = _figure(7.0, 3.5)
    bins = np.linspace(0, 1, 41)
    for overlap, label, fraction in [
        (
            redundancy.overlap,
            "near-duplicates",
            redundancy.disjoint_fraction,
        ),
        (
            redundancy.null_overlap,
            f"{len(redundancy.null_overlap):,} random pairs",
            redundancy.null_disjoint_fraction,
        ),
    ]:
        if len(overlap):
            label = f"{label}: {fraction:.1%} disjoint"
            weights = np.full(len(overlap), 1 / len(overlap))
            axes.hist(overlap, bins, weights=weights, alpha=0.6, label=label)  # type: ignore[arg-type]
    axes.axvline(redundancy.max_overlap, color="black", linestyle="--", linewidth=1)
    axes.set_xlabel("overlap of their distributions over layers (1: the same layers)")
    axes.set_ylabel("fraction of pairs")
    axes.set_title(
        f"{len(redundancy.pairs):,} near-duplicates (cosine similarity "
        f"≥ {redundancy.min_cos_sim:g}) among {redundancy.n_active:,} active latents"
    )
    _legend_below(axes, n_columns=2)
    return figure


def plot_token_classes(
    classes: TokenClasses,
    latent: int,
    kind: ClassKind,
    *,
    n_most: int = 30,
    token_texts: Sequence[str] | None = None,
) -> "Figure":
    """Draw one latent's distribution over layers for each class of token.

    Args:
        classes: The sums for this latent and others.
        latent: The latent.
        kind: The class: position in the prompt, how often the token was seen, or its
            id.
        n_most: Draw no more token ids than this, those with the largest shares.
        token_texts: The text of each token id of the vocabulary, for labels.
    """
    table = getattr(classes, f"by_{kind}")(latent)
    if kind == "token":
        table = table.head(n_most)
    if kind == "position":  # white where the latent is never active
        table = table.reindex(range(len(classes.position_counts)))
    probs = table.filter(like="p_").to_numpy().T
    names = [str(name) for name in table.index]
    if kind == "token" and token_texts is not None:
        # A model's vocabulary may be padded beyond its tokenizer's.
        n_known = len(token_texts)
        texts = [token_texts[i] if i < n_known else f"[{i}]" for i in table.index]
        names = _plain([repr(text)[1:-1] for text in texts])
    every = -(-len(names) // 40)
    figure, axes = _figure(max(5.0, 2.5 + 0.2 * min(len(names), 40)), 4.5)
    image = axes.imshow(probs, aspect="auto", origin="lower", vmin=0)
    figure.colorbar(image, label=f"P(layer | latent, {kind})")
    places = np.arange(len(names))
    axes.scatter(places, table.mean_layer, s=18, c="white", edgecolors="black")
    _mark_layers(axes, "y", classes.hook_names)
    ticks = range(0, len(names), every)
    axes.set_xticks(ticks, names[::every], rotation=90, fontsize=7)
    label = {
        "position": "position in the prompt",
        "frequency": "times that the token was seen",
        "token": "token, by share of the activation",
    }[kind]
    axes.set_xlabel(f"{label} (dots: mean layer)")
    parts = classes.explained(latent).loc[kind]
    axes.set_title(
        f"Latent {latent}: {kind} explains {parts.explained:.0%} of the variance\n"
        f"(by chance: {parts.by_chance:.0%})",
        fontsize=10,
    )
    return figure


def plot_transfer_matrix(transfer: TransferMatrix) -> "Figure":
    """Draw the FVU of each SAE at each layer; values above 1 have the colour of 1."""
    table = transfer.to_dataframe()
    rows = [str(name).removeprefix("layer_").replace("_", "-") for name in table.index]
    n_rows, n_columns = table.shape
    # No smaller than what is written around it.
    size = max(5.0, 2.5 + 0.32 * n_columns), max(3.5, 1.5 + 0.28 * n_rows)
    figure, axes = _figure(*size)
    image = axes.imshow(table.to_numpy(), vmin=0, vmax=1, cmap="viridis_r")
    label = "fraction of variance unexplained"
    figure.colorbar(image, label=label, extend="max")
    _mark_layers(axes, "x", transfer.hook_names)
    axes.set_yticks(range(n_rows), rows)
    if n_columns <= _MOST_TICKS:
        for (row, column), value in np.ndenumerate(table.to_numpy()):
            axes.text(
                column,
                row,
                f"{value:.2f}",
                color="white" if value > 0.5 else "black",
                ha="center",
                va="center",
                fontsize=6,
            )
    axes.set_xlabel("evaluated on layer")
    axes.set_ylabel("trained on layer")
    axes.set_title(f"Transfer between layers, {transfer.n_tokens:,} tokens")
    return figure


def plot_comparison(comparison: Comparison) -> "Figure":
    """Draw FVU, delta CE and KL divergence of both kinds of SAE by layer."""
    from matplotlib.figure import Figure

    table = comparison.to_dataframe()
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    for axes, metric, label in zip(
        figure.subplots(1, 3),
        ("fvu", "delta_ce", "kl_div"),
        ("fraction of variance unexplained", "ΔCE (nats)", "KL divergence (nats)"),
        strict=True,
    ):
        axes.plot(table[metric, "multi_layer"].to_numpy(), "o-", label="one SAE")
        single = table[metric, "single_layer"].to_numpy()
        axes.plot(single, "s--", label="one SAE for each layer")
        _mark_layers(axes, "x", comparison.hook_names)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


PLOTS: "dict[type[Result], Callable[[Any], Figure]]" = {
    LayerDistributions: plot_layer_distributions,
    Variances: plot_variances,
    ActiveLayers: plot_active_layers,
    ResidualStream: plot_residual_stream,
    DecoderSimilarity: plot_decoder_similarity,
    Redundancy: plot_redundancy,
    TransferMatrix: plot_transfer_matrix,
    Comparison: plot_comparison,
}
"""The function that draws a result, where one picture shows it as a whole."""


def figures_of(result: Result, token_texts: Sequence[str]) -> "dict[str, Figure]":
    """The figures of a result by the end of their file name; none for some classes."""
    if isinstance(result, TokenClasses):
        return {
            f"_{latent}_{kind}": plot_token_classes(
                result, latent, kind, token_texts=token_texts
            )
            for latent in result.latents.tolist()
            for kind in get_args(ClassKind)
        }
    draw = PLOTS.get(type(result))
    return {} if draw is None else {"": draw(result)}


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write a figure as a picture; the ending of `path` is its format."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _figure(width: float, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _legend_below(axes: "Axes", n_columns: int = 1) -> None:
    """Name what is drawn, where it covers nothing of it."""
    axes.legend(
        fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=n_columns
    )


def _mark_layers(
    axes: "Axes", which: Literal["x", "y"], hook_names: Sequence[str]
) -> None:
    """Name the layers on an axis, or every few of them where there are many."""
    labels = [name.removeprefix("layer_") for name in layer_labels(hook_names)]
    every = -(-len(labels) // _MOST_TICKS)
    axes.set(
        **{
            f"{which}ticks": range(0, len(labels), every),
            f"{which}ticklabels": labels[::every],
            f"{which}label": "layer",
        }
    )


def _plain(texts: Sequence[str]) -> list[str]:
    """Texts in which no sign starts a formula."""
    return [text.replace("$", r"\$") for text in texts]
