"""Layers of effects against layers of activations, and meanings at two layers."""

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int


def layer_profiles(
    latent: Int[np.ndarray, " edit"],
    layer: Int[np.ndarray, " edit"],
    effect: Float[np.ndarray, " edit"],
    probs: Float[np.ndarray, "latent layer"],
    n_permutations: int,
    seed: int,
) -> pd.DataFrame:
    """C(l | j) against P(l | j) of each latent, with a null.

    Args:
        latent: Row of `probs` of each edit.
        effect: At least 0.

    Returns:
        For each row of `probs`: `w1` in layers; `spearman` of C and P over the layers
        with edits; means of both over permutations of C among these layers
        (`w1_null`, `spearman_null`); `p_w1`, the part of the permutations with at most
        this `w1` (one is added to both counts); `n_layers` with edits. Spearman's and
        the null are NaN below three layers.
    """
    rng = np.random.default_rng(seed)
    table = [
        _profile(layer[latent == j], effect[latent == j], p, n_permutations, rng)
        for j, p in enumerate(probs)
    ]
    return pd.DataFrame(table)


def _profile(
    layer: np.ndarray,
    effect: np.ndarray,
    probs: Float[np.ndarray, " layer"],
    n_permutations: int,
    rng: np.random.Generator,
) -> dict[str, float]:
    c = np.bincount(layer, effect, len(probs))
    c = c / c.sum() if c.sum() > 0 else np.full(len(c), np.nan)
    edited = np.unique(layer)
    row = {"n_layers": float(len(edited)), "w1": wasserstein(c, probs)}
    row |= dict.fromkeys(("spearman", "w1_null", "spearman_null", "p_w1"), np.nan)
    if len(edited) < 3:
        return row
    w1, rank = np.empty(n_permutations), np.empty(n_permutations)
    for i in range(n_permutations):
        other = c.copy()
        other[edited] = rng.permutation(c[edited])
        w1[i] = wasserstein(other, probs)
        rank[i] = spearman(other[edited], probs[edited])
    # Two permutations may be the same one, with another rounding.
    at_most = (w1 <= row["w1"] + 1e-9).sum()
    return row | {
        "spearman": spearman(c[edited], probs[edited]),
        "w1_null": float(w1.mean()),
        "spearman_null": float(rank.mean()),
        "p_w1": float((1 + at_most) / (1 + n_permutations)),
    }


def wasserstein(
    p: Float[np.ndarray, " layer"], q: Float[np.ndarray, " layer"]
) -> float:
    """`W1 = sum_l |CDF_p(l) - CDF_q(l)|`, in layers."""
    return float(np.abs(np.cumsum(p - q)).sum())


def spearman(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float:
    """Correlation of ranks, with mean ranks for ties; NaN if either is constant."""
    ranks = [pd.Series(values).rank().to_numpy() for values in (x, y)]
    if min(r.std() for r in ranks) == 0:
        return np.nan
    return float(np.corrcoef(*ranks)[0, 1])


def line_through_origin(
    x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]
) -> dict[str, float]:
    """`y = slope x`: slope, R^2 of y about 0, and agreement of sign.

    R^2 is `1 - sum (y - slope x)^2 / sum y^2`.
    """
    slope = float(x @ y / (x @ x)) if x.any() else np.nan
    r2 = 1 - float(((y - slope * x) ** 2).sum() / (y @ y)) if y.any() else np.nan
    return {"slope": slope, "r2": r2, "same_sign": float((x * y > 0).mean())}


def same_meaning(
    latent: Int[np.ndarray, " edit"],
    layer: Int[np.ndarray, " edit"],
    ids: Int[np.ndarray, "edit top"],
    values: Float[np.ndarray, "edit top"],
    n_layers: int,
    norm_ratio: float = 2.0,
) -> pd.DataFrame:
    """Is the effect of a latent at two layers more alike than those of two latents?

    The effect of a latent at a layer is the mean over tokens of its largest changes of
    logits. Cosines of one latent at layers l < m are compared with those of this latent
    at l and another at m whose effect at m has a norm within `norm_ratio` of its own.

    Returns:
        For each pair of layers: `auc`, the probability that the cosine of the same
        latent is the larger one (ties count half); `n_latents` compared; their mean
        cosine `same`, and that with other latents `others`.
    """
    cells, of_edit = np.unique(latent * n_layers + layer, return_inverse=True)
    words, word = np.unique(ids, return_inverse=True)
    sums = np.zeros((len(cells), len(words)), dtype=np.float32)
    np.add.at(sums, (of_edit.reshape(-1, 1), word.reshape(ids.shape)), values)
    sums /= np.bincount(of_edit).reshape(-1, 1)
    norms = np.linalg.norm(sums, axis=1)
    units = sums / np.maximum(norms, 1e-12).reshape(-1, 1)
    of_cell, at_cell = cells // n_layers, cells % n_layers
    rows: list[dict[str, float]] = []
    for low in range(n_layers):
        for high in range(low + 1, n_layers):
            a, b = at_cell == low, at_cell == high
            is_same = of_cell[a].reshape(-1, 1) == of_cell[b]
            found = _auc(units[a] @ units[b].T, is_same, norms[b], norm_ratio)
            rows += [{"layer": low, "later_layer": high, **found}] if found else []
    columns = ["layer", "later_layer", "auc", "n_latents", "same", "others"]
    return pd.DataFrame(rows, columns=columns)


def _auc(
    cosines: Float[np.ndarray, "low high"],
    is_same: Bool[np.ndarray, "low high"],
    norms: Float[np.ndarray, " high"],
    norm_ratio: float,
) -> dict[str, float]:
    """Of the latents of both layers; empty if there is none with others like it."""
    wins: list[float] = []
    same: list[float] = []
    others: list[float] = []
    for i, j in np.argwhere(is_same):
        alike = (norms <= norms[j] * norm_ratio) & (norms * norm_ratio >= norms[j])
        alike[j] = False
        if not alike.any():
            continue
        other, own = cosines[i, alike], cosines[i, j]
        wins.append(float(((own > other) + 0.5 * (own == other)).mean()))
        same.append(float(own))
        others.append(float(other.mean()))
    if not wins:
        return {}
    means = [float(np.mean(values)) for values in (wins, same, others)]
    return {
        "auc": means[0],
        "n_latents": float(len(wins)),
        "same": means[1],
        "others": means[2],
    }
