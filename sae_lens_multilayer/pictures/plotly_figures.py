"""Results as interactive figures; plotly is loaded when something is drawn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch

from sae_lens_multilayer.analysis.distributions import LayerDistributions
from sae_lens_multilayer.analysis.geometry import DecoderSimilarity
from sae_lens_multilayer.analysis.layer_counts import ActiveLayers
from sae_lens_multilayer.analysis.layer_variances import Variances
from sae_lens_multilayer.analysis.layers_by_class import ClassKind, TokenClasses
from sae_lens_multilayer.analysis.near_duplicates import Redundancy
from sae_lens_multilayer.analysis.residual import ResidualStream
from sae_lens_multilayer.analysis.results import Result
from sae_lens_multilayer.analysis.transfer import Comparison, TransferMatrix
from sae_lens_multilayer.hooks import layer_labels

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_MOST_COLUMNS = 4_096
"""Latents that a heatmap shows; a browser has no more pixels for them."""
_MOST_CLASSES = 30
_VIRIDIS = ("#440154", "#3b528b", "#21918c", "#5ec962", "#fde725")
_COLOURS = [[(i / 4) ** 2, colour] for i, colour in enumerate(_VIRIDIS)]
"""Most latents are spread over many layers, and a few keep to one."""


@dataclass
class Picture:
    """A figure with the sentences that say what it shows."""

    name: str
    title: str
    caption: str
    figure: "Figure"


def pictures_of(
    name: str, result: Result, text_of: Callable[[int], str]
) -> list[Picture]:
    """The pictures of a result; none for one that is shown elsewhere.

    Args:
        name: Of the result; names the pictures.
        text_of: The text of a token id.
    """
    if isinstance(result, TokenClasses):
        return [
            _token_class(name, result, latent, kind, text_of)
            for latent in result.latents.tolist()
            for kind in get_args(ClassKind)
        ]
    makers: dict[type[Result], Callable[[str, Any], list[Picture]]] = {
        LayerDistributions: _distributions,
        Variances: _variances,
        ActiveLayers: _active_layers,
        ResidualStream: _residual_stream,
        DecoderSimilarity: _decoder_similarity,
        Redundancy: _redundancy,
        Comparison: _comparison,
        TransferMatrix: _transfer,
    }
    return makers[type(result)](name, result) if type(result) in makers else []


def short_labels(hook_names: Sequence[str]) -> list[str]:
    """Layers as they stand on an axis: their numbers, where these say enough."""
    return [label.removeprefix("layer_") for label in layer_labels(hook_names)]


def _distributions(name: str, dists: LayerDistributions) -> list[Picture]:
    latents = dists.active_latents()
    n_active = len(latents)
    caption = f"{n_active:,} active latents, sorted by mean layer."
    if n_active > _MOST_COLUMNS:
        chosen = torch.linspace(0, n_active - 1, _MOST_COLUMNS).long()
        latents = latents[chosen]
        caption += f" {_MOST_COLUMNS:,} of them, evenly chosen, are drawn."
    figure = _heatmap(
        dists.probs[:, latents].float().numpy(),
        [str(latent) for latent in latents.tolist()],
        short_labels(dists.hook_names),
        x="latents, by mean layer",
        y="layer",
        colour="P(layer | latent)",
        faint=True,
    )
    figure.update_xaxes(showticklabels=False)
    title = f"Layers of each latent over {dists.n_tokens:,} tokens"
    return [Picture(name, title, caption, figure)]


def _variances(name: str, variances: Variances) -> list[Picture]:
    history = variances.history
    summary = variances.summary
    parts = _lines(
        history.n_tokens,
        {
            "Var(L): all": history.var_l,
            "E[Var(L | J)]: of a latent": history.exp_var_l_j,
            "E[Var(L | J, T)]: at a token": history.exp_var_l_jt,
        },
        x="tokens seen",
        y="variance (layers squared)",
    )
    ratios = _lines(
        history.n_tokens,
        {
            "of a latent / all": history.latent_ratio,
            "at a token / of a latent": history.token_ratio,
            "of a latent / all (paper's code)": history.reference_rel_var_f,
            "at a token / of a latent (paper's code)": history.reference_rel_var_t,
        },
        x="tokens seen",
        y="ratio of variances",
    )
    for figure in (parts, ratios):
        figure.update_xaxes(type="log")
    caption = (
        f"Of the variance over layers of all activation, {summary.latent_ratio:.1%} is "
        f"within latents; of that, {summary.token_ratio:.1%} is there at a single "
        "token. The estimates of the paper's code are others."
    )
    title = "Variance of the layer of an activation"
    return [
        Picture(name, title, "The parts of the law of total variance.", parts),
        Picture(f"{name}_ratios", "Ratios of these variances", caption, ratios),
    ]


def _active_layers(name: str, active: ActiveLayers) -> list[Picture]:
    was_active = active.n_active_tokens > 0
    n_layers = len(active.hook_names)
    figure = _histograms(
        {
            "at one token (mean over its tokens)": active.mean_per_token[was_active],
            "over all tokens (each over 1% of the times)": active.overall(0.01)[
                was_active
            ],
        },
        (0.5, n_layers + 0.5, 1.0),
        x=f"layers at which a latent is active, of {n_layers}",
        y="latents",
    )
    figure.update_xaxes(tick0=0, dtick=-(-n_layers // 10))  # whole numbers
    caption = (
        f"{int(was_active.sum()):,} latents active above {active.threshold:g} on "
        f"{active.n_tokens:,} tokens."
    )
    return [Picture(name, "At how many layers a latent is active", caption, figure)]


def _residual_stream(name: str, residual: ResidualStream) -> list[Picture]:
    space = " after the lens" if residual.has_lens else ""
    labels = short_labels(residual.hook_names)
    cos_sim = _heatmap(
        residual.cos_sim.numpy(),
        labels,
        labels,
        x="layer",
        y="layer",
        colour="cosine similarity",
    )
    std = residual.norm_var.sqrt()
    norms = _lines(
        labels,
        {
            "mean": residual.norm,
            "mean + standard deviation": residual.norm + std,
            "mean - standard deviation": (residual.norm - std).clamp(min=0),
        },
        x="layer",
        y="L2 norm",
    )
    tokens = f"{residual.n_tokens:,} tokens"
    return [
        Picture(
            name,
            f"Similarity of every two layers{space}",
            f"Mean over {tokens} of the cosine similarity of centred vectors.",
            cos_sim,
        ),
        Picture(f"{name}_norms", f"Norms by layer{space}", f"Over {tokens}.", norms),
    ]


def _decoder_similarity(name: str, similarity: DecoderSimilarity) -> list[Picture]:
    figure = _histograms(
        {"latents": similarity.max_cos_sim},
        (-1.0, 1.01, 0.01),
        x="cosine similarity with the nearest other latent",
        y="latents",
    )
    values = similarity.max_cos_sim
    figure.update_xaxes(range=[values.min().item() - 0.02, 1.02])
    caption = f"Mean max cosine similarity: {similarity.mean:.4f}."
    return [Picture(name, "How close decoder directions are", caption, figure)]


def _redundancy(name: str, redundancy: Redundancy) -> list[Picture]:
    n_random = f"{len(redundancy.null_overlap):,} random pairs"
    overlaps = {
        "near-duplicates": redundancy.overlap,
        n_random: redundancy.null_overlap,
    }
    figure = _histograms(
        {label: overlap for label, overlap in overlaps.items() if len(overlap)},
        (0.0, 1.01, 0.025),
        x="overlap of their distributions over layers",
        y="fraction of pairs",
        as_fractions=True,
    )
    figure.update_layout(showlegend=True)
    found = f"{len(redundancy.pairs):,} near-duplicates"
    if len(redundancy.pairs):
        found += f", {redundancy.disjoint_fraction:.1%} of them disjoint"
    caption = (
        f"{found} (cosine similarity ≥ {redundancy.min_cos_sim:g}, disjoint up to an "
        f"overlap of {redundancy.max_overlap:g}); of random pairs, "
        f"{redundancy.null_disjoint_fraction:.1%} are disjoint."
    )
    return [
        Picture(name, "Is a direction learnt again for other layers?", caption, figure)
    ]


def _comparison(name: str, comparison: Comparison) -> list[Picture]:
    table = comparison.to_dataframe()
    labels = short_labels(comparison.hook_names)
    pictures: list[Picture] = []
    for metric, title, y in [
        ("fvu", "FVU", "fraction of variance unexplained"),
        ("delta_ce", "ΔCE", "ΔCE (nats)"),
        ("kl_div", "KL divergence", "KL divergence (nats)"),
    ]:
        one, each = (table[metric, which] for which in ("multi_layer", "single_layer"))
        lines = {"this SAE": one, "one SAE for each layer": each}
        figure = _lines(labels, lines, x="layer", y=y)
        figure.update_xaxes(type="category")
        caption = (
            f"On the same tokens; means over these layers: {one.mean():.4g} and "
            f"{each.mean():.4g}."
        )
        title = f"{title} beside single-layer SAEs"
        pictures.append(Picture(f"{name}_{metric}", title, caption, figure))
    return pictures


def _transfer(name: str, transfer: TransferMatrix) -> list[Picture]:
    table = transfer.to_dataframe()
    rows = [str(row).removeprefix("layer_").replace("_", "-") for row in table.index]
    figure = _heatmap(
        table.to_numpy(),
        short_labels(transfer.hook_names),
        rows,
        x="evaluated on layer",
        y="trained on layer",
        colour="FVU",
    )
    caption = (
        f"Fraction of variance unexplained, {transfer.n_tokens:,} tokens; values above "
        "1 have the colour of 1."
    )
    return [Picture(name, "Transfer between layers", caption, figure)]


def _token_class(
    name: str,
    classes: TokenClasses,
    latent: int,
    kind: ClassKind,
    text_of: Callable[[int], str],
) -> Picture:
    table = getattr(classes, f"by_{kind}")(latent)
    if kind == "token":
        table = table.head(_MOST_CLASSES)
    labels = [str(label) for label in table.index]
    if kind == "token":
        # Two ids may have one text, and an axis must tell them apart.
        labels = [f"{text_of(i)!r} ({i})" for i in table.index]
    figure = _heatmap(
        table.filter(like="p_").to_numpy().T,
        labels,
        short_labels(classes.hook_names),
        x={
            "position": "position in the prompt",
            "frequency": "times that the token was seen",
            "token": "token, by share of the activation",
        }[kind],
        y="layer",
        colour=f"P(layer | latent, {kind})",
        most=None,
    )
    if kind != "position":
        figure.update_xaxes(type="category")
    parts = classes.explained(latent).loc[kind]
    caption = (
        f"The {kind} explains {parts.explained:.1%} of the variance over layers; by "
        f"chance it would be {parts.by_chance:.1%}."
    )
    return Picture(
        f"{name}_{latent}_{kind}", f"Latent {latent} by {kind}", caption, figure
    )


def _heatmap(
    z: np.ndarray,
    columns: Sequence[str],
    rows: Sequence[str],
    *,
    x: str,
    y: str,
    colour: str,
    most: int | None = 1,
    faint: bool = False,
) -> "Figure":
    """Rows from below; `most` is the top of the colours, None: the largest value.

    With `faint`, small values are told apart more than large ones.
    """
    import plotly.graph_objects as go

    heatmap = go.Heatmap(
        z=z,
        x=list(columns),
        y=list(rows),
        zmin=0,
        zmax=most,
        colorscale=_COLOURS if faint else "Viridis",
        colorbar={"title": {"text": colour, "side": "right"}, "thickness": 14},
        hovertemplate=(
            f"{x}: %{{x}}<br>{y}: %{{y}}<br>{colour}: %{{z:.4f}}<extra></extra>"
        ),
    )
    return _labelled(go.Figure(heatmap), x, y)


def _lines(x_values: Any, lines: dict[str, Any], *, x: str, y: str) -> "Figure":
    import plotly.graph_objects as go

    figure = go.Figure(
        [
            go.Scatter(
                x=list(x_values), y=np.asarray(values), name=label, mode="lines+markers"
            )
            for label, values in lines.items()
        ]
    )
    figure.update_yaxes(rangemode="tozero")
    return _labelled(figure, x, y)


def _histograms(
    values: dict[str, Any],
    bins: tuple[float, float, float],
    *,
    x: str,
    y: str,
    as_fractions: bool = False,
) -> "Figure":
    import plotly.graph_objects as go

    edges = np.arange(*bins)
    figure = go.Figure()
    for label, some in values.items():
        counts, _ = np.histogram(np.asarray(some, dtype=float), edges)
        heights = counts / max(1, len(some)) if as_fractions else counts
        middles = (edges[1:] + edges[:-1]) / 2
        figure.add_bar(x=middles, y=heights, name=label, opacity=0.6)
    figure.update_layout(barmode="overlay", bargap=0)
    return _labelled(figure, x, y)


def _labelled(figure: "Figure", x: str, y: str) -> "Figure":
    figure.update_xaxes(title=x, automargin=True)
    figure.update_yaxes(title=y, automargin=True)
    return figure.update_layout(
        template="plotly_white",
        height=420,
        # The buttons of plotly stand in the margin above, and touch nothing there.
        margin={"l": 50, "r": 10, "t": 36, "b": 40},
        legend={"orientation": "h", "yanchor": "top", "y": -0.2, "x": 0},
    )
