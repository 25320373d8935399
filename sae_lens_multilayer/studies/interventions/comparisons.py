"""Layers of effects against layers of activations, and meanings at two layers."""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array
from scipy.stats import rankdata


def layer_profiles(
    latent: Int[np.ndarray, " edit"],
    layer: Int[np.ndarray, " edit"],
    effects: dict[str, Float[np.ndarray, " edit"]],
    probs: Float[np.ndarray, "latent layer"],
    n_permutations: int,
    seed: int,
) -> pd.DataFrame:
    """C(l | j), proportional to the sum of effects, against P(l | j) of each latent.

    Args:
        latent: Row of `probs` of each edit.
        effects: The edits' own ("") and those of controls, by the end of their columns;
            at least 0, NaN where there is none.

    Returns:
        For each row of `probs`: `w1` in layers; `spearman` of C and P over the layers
        with edits; the same for each control, as `w1_random`; means of both over
        permutations of C among these layers (`w1_null`, `spearman_null`); `p_w1`, the
        part of the permutations with at most this `w1` (one is added to both counts);
        `n_layers` with edits. Spearman's and the null are NaN below three layers.
    """
    rng = np.random.default_rng(seed)
    n_latents, n_layers = probs.shape
    cell = latent * n_layers + layer
    edited = np.bincount(cell, minlength=probs.size).reshape(probs.shape) > 0
    table = pd.DataFrame({"n_layers": edited.sum(1).astype(float)})
    own = np.full(probs.shape, np.nan)
    for name, effect in effects.items():
        sums = np.bincount(cell, np.nan_to_num(effect), probs.size).reshape(probs.shape)
        total = sums.sum(1, keepdims=True)
        c = np.divide(sums, total, np.full(probs.shape, np.nan), where=total > 0)
        own = c if name == "" else own
        rank = [
            spearman(c[j : j + 1, at], probs[j, at])[0] for j, at in enumerate(edited)
        ]
        end = f"_{name}" if name else ""
        table[f"w1{end}"], table[f"spearman{end}"] = wasserstein(c, probs), rank
    null = [
        _permuted(own[j], probs[j], edited[j], n_permutations, rng)
        for j in range(n_latents)
    ]
    return table.join(pd.DataFrame(null, columns=["w1_null", "spearman_null", "p_w1"]))


def _permuted(
    c: Float[np.ndarray, " layer"],
    p: Float[np.ndarray, " layer"],
    edited: Bool[np.ndarray, " layer"],
    n_permutations: int,
    rng: np.random.Generator,
) -> tuple[float, float, float]:
    """The null of one latent: means of W1 and Spearman, and the p-value of W1."""
    if edited.sum() < 3 or np.isnan(c).any():
        return np.nan, np.nan, np.nan
    rows = np.tile(c, (1 + n_permutations, 1))  # the first one stays
    rows[1:, edited] = rng.permuted(rows[1:, edited], axis=1)
    own, *w1 = wasserstein(rows, p.reshape(1, -1))
    rank = spearman(rows[1:, edited], p[edited])
    # Two permutations may be the same one, with another rounding.
    at_most = (np.array(w1) <= own + 1e-9).sum()
    p_value = (1 + at_most) / (1 + n_permutations)
    return float(np.mean(w1)), float(rank.mean()), float(p_value)


def wasserstein(
    p: Float[np.ndarray, "row layer"], q: Float[np.ndarray, "#row layer"]
) -> Float[np.ndarray, " row"]:
    """`W1 = sum_l |CDF_p(l) - CDF_q(l)|`, in layers."""
    return np.abs(np.cumsum(p - q, axis=-1)).sum(-1)


def spearman(
    x: Float[np.ndarray, "row n"], y: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " row"]:
    """Correlation of ranks, with mean ranks for ties; NaN if either is constant, or
    below three values."""
    unknown = np.full(len(x), np.nan)
    if x.shape[1] < 3:
        return unknown
    a, b = (rankdata(values, axis=-1) for values in (x, y))
    a, b = a - a.mean(1, keepdims=True), b - b.mean()
    scale = np.sqrt((a * a).sum(1) * (b * b).sum())
    return np.divide(a @ b, scale, unknown, where=scale > 0)


def same_meaning(
    latent: Int[np.ndarray, " edit"],
    layer: Int[np.ndarray, " edit"],
    token: Int[np.ndarray, " edit"],
    ids: Int[np.ndarray, "edit top"],
    values: Float[np.ndarray, "edit top"],
    n_layers: int,
    norm_ratio: float = 2.0,
    seed: int = 0,
) -> pd.DataFrame:
    """Is the effect of a latent at two layers more alike than those of two latents?

    The tokens are split in halves at random. The effect of a latent at a layer and in a
    half is the mean over its tokens of the largest changes of logits. Cosines of one
    latent at layers l < m, in different halves, are compared with those of this latent
    at l and another at m, in the same halves, whose effect at m has a norm within
    `norm_ratio` of its own. So an effect that only depends on the token is no more
    alike for one latent than for two.

    Args:
        token: A number for each token; edits at the same token have the same one.

    Returns:
        For each latent, pair of layers and order of the halves: `auc`, the probability
        that the cosine of the same latent is the larger one (ties count half); this
        cosine, `same`, and the mean of the others, `others`.
    """
    _, token = np.unique(token, return_inverse=True)
    half = np.random.default_rng(seed).permutation(token.max() + 1) % 2
    cells, of_edit = np.unique(
        np.stack([half[token], layer, latent]), axis=1, return_inverse=True
    )
    units, norms = _mean_effects(of_edit.ravel(), ids, values)
    groups = {
        (h, at): np.flatnonzero((cells[0] == h) & (cells[1] == at))
        for h in (0, 1)
        for at in range(n_layers)
    }
    tables: list[pd.DataFrame] = []
    for low in range(n_layers):
        for high in range(low + 1, n_layers):
            for h in (0, 1):
                a, b = groups[h, low], groups[1 - h, high]
                if len(a) and len(b):
                    cosines = (units[a] @ units[b].T).toarray()
                    names = cells[2, a], cells[2, b]
                    found = _wins(cosines, *names, norms[b], norm_ratio)
                    tables.append(found.assign(layer=low, later_layer=high))
    columns = ["latent", "layer", "later_layer", "auc", "same", "others"]
    empty = pd.DataFrame(columns=columns, dtype=float)
    return pd.concat([empty, *tables]).reindex(columns=columns)


def _mean_effects(
    cell: Int[np.ndarray, " edit"],
    ids: Int[np.ndarray, "edit top"],
    values: Float[np.ndarray, "edit top"],
) -> tuple[csr_array, Float[np.ndarray, " cell"]]:
    """The mean effect of each cell over its edits, of length 1, and its norm."""
    n_top, shape = ids.shape[1], (int(cell.max()) + 1, int(ids.max()) + 1)
    where = np.repeat(cell, n_top), ids.ravel()
    sums = csr_array((values.ravel().astype(np.float64), where), shape)
    norms = np.sqrt((sums * sums).sum(1))
    scale = 1 / np.maximum(norms, 1e-300)
    units = sums * scale.reshape(-1, 1)
    return csr_array(units), norms / np.bincount(cell)


def _wins(
    cosines: Float[np.ndarray, "low high"],
    low: Int[np.ndarray, " low"],
    high: Int[np.ndarray, " high"],
    norms: Float[np.ndarray, " high"],
    norm_ratio: float,
) -> pd.DataFrame:
    """Of the latents of both that have others like them."""
    i, j = np.nonzero(low.reshape(-1, 1) == high)
    own, other = cosines[i, j], cosines[i]
    ratio = norms / np.maximum(norms[j], 1e-300).reshape(-1, 1)
    alike = (ratio <= norm_ratio) & (ratio * norm_ratio >= 1)
    alike[np.arange(len(j)), j] = False
    kept = alike.any(1)
    own, other, alike = own[kept].reshape(-1, 1), other[kept], alike[kept]
    wins = (own > other) + 0.5 * (own == other)
    n = alike.sum(1)
    return pd.DataFrame(
        {
            "latent": low[i[kept]],
            "auc": (wins * alike).sum(1) / n,
            "same": own[:, 0],
            "others": (other * alike).sum(1) / n,
        }
    )


def line_sums(
    x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]
) -> Float[np.ndarray, "5 n"]:
    """What `line_of_sums` needs of each point, to be added up over points."""
    return np.stack([x * x, x * y, y * y, x * y > 0, np.ones_like(x)])


def line_of_sums(sums: Float[np.ndarray, "*row 5"]) -> dict[str, Any]:
    """`y = slope x`: slope, R^2 of y about 0, and agreement of sign.

    R^2 is `1 - sum (y - slope x)^2 / sum y^2`.

    Args:
        sums: Sums of `line_sums` over points.
    """
    xx, xy, yy, same, n = np.moveaxis(sums, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {"slope": xy / xx, "r2": xy * xy / (xx * yy), "same_sign": same / n}
