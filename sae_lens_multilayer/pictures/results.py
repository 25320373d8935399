"""Describes the picture of each kind of result.

A new kind of result needs one function here and a row in `DESCRIPTIONS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from sae_lens_multilayer.analysis.distributions import LayerDistributions, PromptActs
from sae_lens_multilayer.analysis.geometry import DecoderSimilarity
from sae_lens_multilayer.analysis.layer_counts import ActiveLayers
from sae_lens_multilayer.analysis.layer_variances import Variances
from sae_lens_multilayer.analysis.layers_by_class import ClassKind, TokenClasses
from sae_lens_multilayer.analysis.near_duplicates import Redundancy
from sae_lens_multilayer.analysis.residual import ResidualStream
from sae_lens_multilayer.analysis.transfer import Comparison, TransferMatrix
from sae_lens_multilayer.evaluation.metrics import LayerMetrics
from sae_lens_multilayer.pictures.description import (
    Axis,
    Heatmap,
    Panel,
    Picture,
    Series,
    Values,
    by_layer,
    histogram,
    short_labels,
)
from sae_lens_multilayer.results import Result

_FVU = "fraction of variance unexplained"
_MOST_LATENTS = 4_096
"""Latents in one heatmap; a screen has no more pixels."""


def describe(result: Any, **context: Any) -> Picture:
    """The picture of a result, for either renderer.

    Args:
        result: An object of one of the classes in `DESCRIPTIONS`.
        context: Further arguments of the description function of that class.

    Raises:
        TypeError: If such results have no picture, or by the description function.
    """
    if type(result) not in DESCRIPTIONS:
        names = ", ".join(cls.__name__ for cls in DESCRIPTIONS)
        raise TypeError(
            f"There is no picture of a {type(result).__name__}; of {names} there is."
        )
    return DESCRIPTIONS[type(result)](result, **context)


def pictures_of(
    name: str, result: Result, text_of: Callable[[int], str]
) -> dict[str, Picture]:
    """All pictures of a result by name; empty if there is none.

    Args:
        name: Name of the result, which the names of the pictures start with.
        text_of: The text of a token id.
    """
    if isinstance(result, TokenClasses):
        return {
            f"{name}_{latent}_{kind}": describe(
                result, latent=latent, kind=kind, text_of=text_of
            )
            for latent in result.latents.tolist()
            for kind in get_args(ClassKind)
        }
    return {name: describe(result)} if type(result) in DESCRIPTIONS else {}


def _layer_metrics(metrics: LayerMetrics) -> Picture:
    series: dict[str, Values] = {
        "around the mean vector (fvu)": metrics.fvu.numpy(),
        "about one mean (fvu_scalar)": metrics.fvu_scalar.numpy(),
    }
    panel = by_layer(metrics.hook_names, _FVU, series)
    return Picture(f"Reconstruction on {metrics.n_tokens:,} held-out tokens", [panel])


def _layer_distributions(
    dists: LayerDistributions, latents: Int[Tensor, " latent"] | None = None
) -> Picture:
    """P(layer | latent) of `latents` in this order; None: all active, by mean layer."""
    chosen = dists.active_latents() if latents is None else latents
    if not len(chosen):
        raise ValueError("There must be a latent that was active; there is none.")
    label = f"{len(chosen):,} active latents, by mean layer"
    if latents is not None:
        label = f"{len(chosen):,} latents"
    caption = ""
    if len(chosen) > _MOST_LATENTS:
        drawn = torch.linspace(0, len(chosen) - 1, _MOST_LATENTS).long()
        chosen = chosen[drawn]
        caption = f"{_MOST_LATENTS:,} of them, evenly spaced, are drawn."
    names = [str(latent) for latent in chosen.tolist()]
    # Most latents are spread over many layers, and a few are active at one.
    probs = Heatmap(dists.probs[:, chosen].numpy(), "P(layer | latent)", power=0.5)
    layers = Axis("layer", short_labels(dists.hook_names))
    panel = Panel(Axis(label, names, most_names=0), layers, heatmap=probs)
    title = f"Layers of each latent over {dists.n_tokens:,} tokens"
    return Picture(title, [panel], caption)


def _prompt_acts(acts: PromptActs, latent: int, token_texts: Sequence[str]) -> Picture:
    """One latent at each layer and token, given the text of each token."""
    texts = [repr(text)[1:-1] for text in token_texts]
    values = acts.of_latent(latent).numpy()
    panel = Panel(
        Axis("token", texts, most_names=len(texts)),
        Axis("layer", short_labels(acts.hook_names)),
        heatmap=Heatmap(values, "activation", top=None, colours="magma_r"),
    )
    return Picture(f"Latent {latent}", [panel])


def _variances(variances: Variances) -> Picture:
    history, summary = variances.history, variances.summary

    def line(column: str, label: str, colour: int, style: int = 0) -> Series:
        x, y = history.n_tokens.to_numpy(), history[column].to_numpy()
        return Series(label, x, y, colour=colour, style=style)

    parts = [
        line("var_l", "Var(L): all", 0),
        line("exp_var_l_j", "E[Var(L | J)]: of a latent", 1),
        line("exp_var_l_jt", "E[Var(L | J, T)]: of a latent at a token", 2),
    ]
    ratios = [
        line("latent_ratio", "of a latent / all", 0),
        line("token_ratio", "at a token / of a latent", 1),
        line("reference_rel_var_f", "of a latent / all (paper's code)", 0, 1),
        line("reference_rel_var_t", "at a token / of a latent (paper's code)", 1, 1),
    ]
    tokens = Axis("tokens seen", log=True)
    labels = "variance (layers squared)", "ratio of variances"
    left, right = (Axis(label, include_zero=True) for label in labels)
    caption = (
        f"Of the variance over layers of all activation, {summary.latent_ratio:.1%} is "
        f"within latents; of that, {summary.token_ratio:.1%} is within single tokens. "
        "The paper's code estimates these ratios differently."
    )
    panels = [Panel(tokens, left, parts), Panel(tokens, right, ratios)]
    return Picture("Variance of the layer of an activation", panels, caption)


def _active_layers(active: ActiveLayers) -> Picture:
    n_layers = len(active.hook_names)
    was_active = active.n_active_tokens > 0
    edges = np.arange(n_layers + 1) + 0.5
    values = {
        "at one token (mean over its tokens)": active.mean_per_token,
        "over all tokens (each with over 1% of the times)": active.overall(0.01),
    }
    ticks = range(1, n_layers + 1, -(-n_layers // 12))
    panel = Panel(
        Axis(f"layers at which a latent is active, of {n_layers}", ticks=ticks),
        Axis("latents"),
        [histogram(n, v[was_active].numpy(), edges) for n, v in values.items()],
    )
    caption = (
        f"{int(was_active.sum()):,} latents active above {active.threshold:g} on "
        f"{active.n_tokens:,} tokens."
    )
    return Picture("At how many layers a latent is active", [panel], caption)


def _residual_stream(residual: ResidualStream) -> Picture:
    names, std = residual.hook_names, residual.norm_var.sqrt()
    low, high = (residual.norm - std).clamp(min=0).numpy(), residual.norm + std
    band = Series(
        "± standard deviation", range(len(names)), low, "band", high.numpy(), colour=0
    )
    norms = by_layer(names, "L2 norm", {"mean": residual.norm.numpy()})
    norms.series = [band, replace(norms.series[0], colour=0)]
    cos_sim = Heatmap(residual.cos_sim.numpy(), "mean cosine similarity (centred)")
    layers = Axis("layer", short_labels(names))
    space = " after the lens" if residual.has_lens else ""
    return Picture(
        f"Residual stream{space}, {residual.n_tokens:,} tokens",
        [Panel(layers, layers, heatmap=cos_sim), norms],
        "Similarity of the centred vectors of every two layers, and norms by layer.",
    )


def _decoder_similarity(similarity: DecoderSimilarity) -> Picture:
    values = similarity.max_cos_sim.float().numpy()
    edges = np.arange(np.floor(values.min() * 100), 101) / 100
    panel = Panel(
        Axis("cosine similarity with the nearest other latent"),
        Axis("latents"),
        [histogram("", values, edges)],
        vertical_line=(similarity.mean, f"mean: {similarity.mean:.3f}"),
    )
    return Picture(f"Decoder of {len(values):,} latents", [panel])


def _redundancy(redundancy: Redundancy) -> Picture:
    n_null = f"{len(redundancy.null_overlap):,} random pairs"
    series = [
        histogram(
            f"{pairs}: {disjoint:.1%} disjoint",
            overlap.numpy(),
            np.linspace(0, 1, 41),
            as_fractions=True,
        )
        for pairs, disjoint, overlap in [
            ("near-duplicates", redundancy.disjoint_fraction, redundancy.overlap),
            (n_null, redundancy.null_disjoint_fraction, redundancy.null_overlap),
        ]
        if len(overlap)
    ]
    limit = redundancy.max_overlap, f"disjoint: at most {redundancy.max_overlap:g}"
    panel = Panel(
        Axis("overlap of their distributions over layers (1: the same layers)"),
        Axis("fraction of pairs"),
        series,
        vertical_line=limit,
    )
    caption = (
        f"{len(redundancy.pairs):,} near-duplicates (cosine similarity "
        f"≥ {redundancy.min_cos_sim:g}) among {redundancy.n_active:,} active latents."
    )
    return Picture("Is a direction learnt again for other layers?", [panel], caption)


def _token_classes(
    classes: TokenClasses,
    latent: int,
    kind: ClassKind,
    text_of: Callable[[int], str] = "[{}]".format,
    n_most: int = 30,
) -> Picture:
    """One latent's distribution over layers for each class of token.

    Of the token ids, the `n_most` with the largest shares of the activation are drawn.
    """
    table: pd.DataFrame = getattr(classes, f"by_{kind}")(latent)
    label, names = "times that the token was seen", [str(name) for name in table.index]
    if kind == "token":
        table, label = table.head(n_most), "token, by share of the activation"
        names = [repr(text_of(i))[1:-1] for i in table.index]
    elif kind == "position":  # white where the latent is never active
        label, positions = "position in the prompt", range(len(classes.position_counts))
        table, names = table.reindex(positions), [str(i) for i in positions]
    mean = table.mean_layer.to_numpy()
    probs = table.filter(like="p_").to_numpy().T
    panel = Panel(
        Axis(label, names, most_names=40),
        Axis("layer", short_labels(classes.hook_names)),
        [Series("mean layer", range(len(names)), mean, "points")],
        Heatmap(probs, f"P(layer | latent, {kind})", top=None),
    )
    parts = classes.explained(latent).loc[kind]
    caption = (
        f"The {kind} explains {parts.explained:.1%} of the variance over layers; by "
        f"chance it would be {parts.by_chance:.1%}."
    )
    return Picture(f"Latent {latent} by {kind}", [panel], caption)


def _transfer_matrix(transfer: TransferMatrix) -> Picture:
    table = transfer.to_dataframe()
    rows = [str(name).removeprefix("layer_").replace("_", "-") for name in table.index]
    printed = table.shape[1] <= 16
    panel = Panel(
        Axis("evaluated on layer", short_labels(transfer.hook_names)),
        Axis("trained on layer", rows, most_names=len(rows)),
        heatmap=Heatmap(
            table.to_numpy(), _FVU, colours="viridis_r", print_values=printed
        ),
    )
    title = f"Transfer between layers, {transfer.n_tokens:,} tokens"
    return Picture(title, [panel], "Values above 1 have the colour of 1.")


def _comparison(comparison: Comparison) -> Picture:
    table, names = comparison.to_dataframe(), comparison.hook_names
    panels, means = list[Panel](), list[str]()
    for metric, label in [
        ("fvu", _FVU),
        ("delta_ce", "ΔCE (nats)"),
        ("kl_div", "KL divergence (nats)"),
    ]:
        one = table[metric, "multi_layer"].to_numpy()
        each = table[metric, "single_layer"].to_numpy()
        series = {"one SAE": one, "one SAE for each layer": each}
        panels.append(by_layer(names, label, series))
        means.append(f"{label} {one.mean():.4g} and {each.mean():.4g}")
    caption = f"Means of one SAE and one for each layer: {'; '.join(means)}."
    return Picture("One SAE beside single-layer SAEs", panels, caption)


DESCRIPTIONS: dict[type, Callable[..., Picture]] = {
    LayerMetrics: _layer_metrics,
    LayerDistributions: _layer_distributions,
    PromptActs: _prompt_acts,
    Variances: _variances,
    ActiveLayers: _active_layers,
    ResidualStream: _residual_stream,
    DecoderSimilarity: _decoder_similarity,
    Redundancy: _redundancy,
    TokenClasses: _token_classes,
    TransferMatrix: _transfer_matrix,
    Comparison: _comparison,
}
"""The function that describes the picture of each class of result."""
