"""How well activations and directions recover the features of a synthetic stream."""

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_multilayer.analysis.active import ActiveLatents
from sae_lens_multilayer.analysis.tables import layer_variance
from sae_lens_multilayer.studies.synthetic.matching import (
    NONE,
    correlations,
    cosines,
    match,
    nearest,
)

_NO_VARIANCE = 1e-9
COVERED = 0.5
"""Least correlation of activations at which a feature counts as covered."""


def recovery(
    acts: ActiveLatents,
    decoder: Float[Tensor, "layer latent d_in"],
    truth: ActiveLatents,
    directions: Float[Tensor, "layer feature d_in"],
) -> tuple[dict[str, float], dict[str, Int[Tensor, " feature"]]]:
    """All metrics of the activations of an SAE on tokens whose features are known.

    Args:
        acts: Of the latents, at some tokens.
        decoder: The latents' directions in raw space.
        truth: The features' parts at the same tokens.

    Returns:
        The metrics by name, and the latent of each feature in the matchings by
        correlation and by cosine; latents are matched to features that are active.

        `features_covered` is the share of these features whose latent correlates by
        more than `COVERED`; a latent that is never active has correlation 0.
        `profile_w1` is a mean over features whose latent is ever active.
    """
    cos = cosines(decoder, directions)
    corr = correlations(acts, truth)
    by_layer = layer_totals(truth)
    is_active = by_layer.sum(0) > 0
    best_cos = cos.amax(0)
    by_corr, by_cos = (_match_some(s, is_active) for s in (corr, best_cos))
    feature = (by_corr != NONE).nonzero().flatten()
    latent = by_corr[feature]
    metrics = {
        "mcc": _mean_score(corr, by_corr),
        "mcc_cosine": _mean_score(best_cos, by_cos),
        "features_covered": float((corr[latent, feature] > COVERED).sum())
        / int(is_active.sum()),
        "matchings_differ": float((by_corr != by_cos)[is_active].double().mean()),
        "profile_w1": float(
            _mean(w1(layer_totals(acts)[:, latent], by_layer[:, feature]))
        ),
        **_token_metrics(acts, truth, by_corr),
        **_variance_errors(acts, truth),
        **_one_to_one(acts, truth, cos),
        **_without_features(acts, truth),
    }
    return metrics, {"by_correlation": by_corr, "by_cosine": by_cos}


def _match_some(scores: Tensor, is_active: Tensor) -> Int[Tensor, " feature"]:
    found = torch.full((scores.shape[1],), NONE)
    found[is_active] = match(scores[:, is_active])
    return found


def _mean_score(scores: Tensor, latent: Tensor) -> float:
    feature = (latent != NONE).nonzero().flatten()
    return float(scores[latent[feature], feature].mean())


def _mean(values: Tensor) -> Tensor:
    """The mean of values that are not NaN."""
    return values[~values.isnan()].mean()


def layer_totals(acts: ActiveLatents) -> Float[Tensor, "layer latent"]:
    """Sum of each latent's activations at each layer."""
    totals = torch.zeros(acts.n_layers, acts.d_sae, dtype=torch.float64)
    totals.view(-1).index_add_(0, acts.cell, acts.value)
    return totals


def w1(
    p: Float[Tensor, "layer ..."], q: Float[Tensor, "layer ..."]
) -> Float[Tensor, "..."]:
    """Distance of two distributions over layers, layers: W1 = sum_l |CDF_p - CDF_q|.

    Both are divided by their sums over layers first; NaN where a sum is 0.
    """
    difference = p / p.sum(0) - q / q.sum(0)
    return difference.cumsum(0).abs().sum(0)


def _token_metrics(
    acts: ActiveLatents, truth: ActiveLatents, latent_of: Int[Tensor, " feature"]
) -> dict[str, float]:
    """Profiles of single tokens, of matched pairs that are active there.

    Tokens are weighted by the feature's parts. The regression of `E[L | j, t]` on
    `E*[L | f, t]` is within features: both are relative to the feature's own mean.
    """
    feature_of = torch.full((acts.d_sae,), NONE)
    features = (latent_of != NONE).nonzero().flatten()
    feature_of[latent_of[features]] = features
    kept = feature_of[acts.latent] != NONE
    renamed = ActiveLatents(
        acts.n_tokens,
        acts.n_layers,
        truth.d_sae,
        acts.token[kept],
        acts.layer[kept],
        feature_of[acts.latent[kept]],
        acts.value[kept],
    )
    found, true = renamed.by_token, truth.by_token
    _, i, j = np.intersect1d(
        (found.token * truth.d_sae + found.latent).numpy(),
        (true.token * truth.d_sae + true.latent).numpy(),
        return_indices=True,
    )
    i, j = torch.from_numpy(i), torch.from_numpy(j)
    weight = true.total[j]
    distance = w1(_by_pair(renamed)[:, i], _by_pair(truth)[:, j])
    x, y = true.mean_layer[j], found.mean_layer[i]
    slope, r2 = _regression(x, y, weight, true.latent[j], truth.d_sae)
    return {
        "token_profile_w1": float((weight * distance).sum() / weight.sum()),
        "tokens_covered": float(weight.sum() / true.total.sum()),
        "token_layer_slope": slope,
        "token_layer_r2": r2,
    }


def _by_pair(acts: ActiveLatents) -> Float[Tensor, "layer pair"]:
    pairs = acts.by_token
    sums = acts.value.new_zeros(acts.n_layers, len(pairs.total))
    cell = acts.layer * len(pairs.total) + pairs.pair
    sums.view(-1).index_add_(0, cell, acts.value)
    return sums


def _regression(
    x: Tensor, y: Tensor, weight: Tensor, group: Tensor, n_groups: int
) -> tuple[float, float]:
    """Slope and R^2 of y on x, with an intercept for each group; NaN if x is fixed."""

    def centred(values: Tensor) -> Tensor:
        zeros = weight.new_zeros(n_groups)
        sums = zeros.index_add(0, group, weight * values)
        return values - (sums / zeros.index_add(0, group, weight))[group]

    x, y = centred(x), centred(y)
    xx, xy, yy = (weight * x * x).sum(), (weight * x * y).sum(), (weight * y * y).sum()
    if not xx > _NO_VARIANCE * weight.sum():
        return math.nan, math.nan
    return float(xy / xx), float(xy * xy / (xx * yy)) if yy > 0 else 0.0


def variance_parts(acts: ActiveLatents) -> dict[str, float]:
    """The parts of the variance over layers, means over latents by activation.

    As the last row of `Variances.history`: `total` is Var(L), `between_latents`
    Var(E[L | J]), `between_tokens` and `within_token` the two parts of E[Var(L | J)].
    """
    totals, pairs = layer_totals(acts), acts.by_token
    share = totals.sum(0) / totals.sum()
    probs = totals / totals.sum(0)
    total = float(layer_variance(totals.sum(1) / totals.sum()))
    of_latent = float((share * layer_variance(probs).nan_to_num()).sum())
    within = float(pairs.spread.sum() / totals.sum())
    return {
        "total": total,
        "between_latents": total - of_latent,
        "between_tokens": of_latent - within,
        "within_token": within,
    }


def _variance_errors(acts: ActiveLatents, truth: ActiveLatents) -> dict[str, float]:
    """Each part minus the true one, layers squared; and the true ones."""
    found, true = variance_parts(acts), variance_parts(truth)
    errors = {f"{name}_error": found[name] - true[name] for name in true}
    return errors | {f"{name}_true": value for name, value in true.items()}


def _without_features(acts: ActiveLatents, truth: ActiveLatents) -> dict[str, float]:
    """Share of the vectors without any active feature; of the activation on them."""
    is_empty = torch.ones(truth.n_tokens * truth.n_layers, dtype=torch.bool)
    is_empty[truth.token * truth.n_layers + truth.layer] = False
    on_empty = acts.value[is_empty[acts.token * acts.n_layers + acts.layer]].sum()
    return {
        "empty_vectors": float(is_empty.double().mean()),
        "empty_acts": float(on_empty / acts.value.sum()),
    }


def _one_to_one(
    acts: ActiveLatents, truth: ActiveLatents, cos: Tensor
) -> dict[str, float]:
    """Whether features are split over latents, and latents shared by features.

    Splitting is a mean over features; sharing and polysemanticity are means over
    latents by activation.
    """
    latent, feature = nearest(cos, acts, truth)
    of_feature = _tally(truth, latent, acts.d_sae)
    split, by_layer = splitting(of_feature, layer_totals(truth).sum(0))
    of_latent = _tally(acts, feature, truth.d_sae)
    total = layer_totals(acts).sum(0)
    shared, polysemantic = sharing(of_latent, total)
    weight = total / total.sum()
    return {
        "splitting": float(_mean(split)),
        "layer_splitting": float(_mean(by_layer)),
        "sharing": float((weight * shared.nan_to_num()).sum()),
        "polysemanticity": float((weight * polysemantic.nan_to_num()).sum()),
    }


def _tally(acts: ActiveLatents, other: Tensor, n_others: int) -> Tensor:
    """Sum of values at each layer by the other name: [layer, other, own]."""
    sums = acts.value.new_zeros(acts.n_layers, n_others, acts.d_sae)
    kept = other != NONE
    index = acts.layer[kept], other[kept], acts.latent[kept]
    return sums.index_put_(index, acts.value[kept], accumulate=True)


def splitting(
    mass: Float[Tensor, "layer latent feature"], total: Float[Tensor, " feature"]
) -> tuple[Float[Tensor, " feature"], Float[Tensor, " feature"]]:
    """Share of each feature outside of its main latent; the part over layers.

    `w_jf` is the share of f's mass at which j is the nearest active latent. Splitting
    is `1 - max_j w_jf`. Its part over layers counts `w_jf` of another latent than the
    main one j* by how far their layers are disjoint, `1 - sum_l min(q_jf, q_j*f)` with
    q the distribution over layers of the mass: 1 if they share none, 0 if they take
    turns at all layers alike.

    Args:
        mass: f's mass at layer l at which j is the nearest active latent.
        total: f's mass, with that where no latent is active.
    """
    w = mass.sum(0) / total
    main = w.argmax(0)
    q = mass / mass.sum(0)
    of_main = q.gather(1, main.expand(len(q), 1, -1))
    overlap = torch.minimum(q, of_main).sum(0)
    by_layer = (w * (1 - overlap)).nan_to_num().sum(0)
    by_layer[total == 0] = math.nan
    return 1 - w.amax(0), by_layer


def sharing(
    mass: Float[Tensor, "layer feature latent"], total: Float[Tensor, " latent"]
) -> tuple[Float[Tensor, " latent"], Float[Tensor, " latent"]]:
    """Whether a latent stands for other features at other layers; at one layer.

    With q(f | j, l) the share of j's activation at layer l at which f is the nearest
    active feature: sharing is `sum_l P(l | j) max_f q(f | j, l) - max_f sum_l P(l | j)
    q(f | j, l)`, 0 if the latent means one feature at all layers; polysemanticity is
    `1 - sum_l P(l | j) max_f q(f | j, l)`, and counts activation without any feature.

    Args:
        mass: j's activation at layer l at which f is the nearest active feature.
        total: j's activation, with that where no feature is active.
    """
    at_best = mass.amax(1).sum(0) / total
    return at_best - mass.sum(0).amax(0) / total, 1 - at_best
