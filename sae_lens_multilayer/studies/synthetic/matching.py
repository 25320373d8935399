"""Which latent stands for which feature, and which is nearest where both are active."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from torch import Tensor

from sae_lens_multilayer.analysis.active import ActiveLatents

NONE = -1
"""In a matching: the feature has no latent, as there are fewer of them."""


def join_tokens(parts: Sequence[ActiveLatents]) -> ActiveLatents:
    """The activations of several batches of tokens as those of one."""
    firsts = np.cumsum([0, *(part.n_tokens for part in parts)]).tolist()
    token = [part.token + n for part, n in zip(parts, firsts[:-1], strict=True)]
    return ActiveLatents(
        firsts[-1],
        parts[0].n_layers,
        parts[0].d_sae,
        torch.cat(token),
        *(torch.cat([getattr(p, n) for p in parts]) for n in _COLUMNS),
    )


_COLUMNS = ("layer", "latent", "value")


def correlations(
    acts: ActiveLatents, truth: ActiveLatents
) -> Float[Tensor, "latent feature"]:
    """Correlation over tokens and layers of each latent with each feature.

    0 for a latent or a feature that does not vary.
    """
    a, f = _matrix(acts), _matrix(truth)
    n = acts.n_tokens * acts.n_layers
    mean_a, mean_f = a.sum(0) / n, f.sum(0) / n
    covariance = (a.T @ f).toarray() / n - np.outer(mean_a, mean_f)
    var_a = (a * a).sum(0) / n - mean_a**2
    var_f = (f * f).sum(0) / n - mean_f**2
    scale = np.sqrt(np.outer(var_a, var_f))
    found = np.divide(covariance, scale, np.zeros_like(scale), where=scale > 0)
    return torch.from_numpy(found)


def _matrix(acts: ActiveLatents) -> Any:
    """Activations as a sparse matrix [token * layer, latent]."""
    row = acts.token * acts.n_layers + acts.layer
    shape = acts.n_tokens * acts.n_layers, acts.d_sae
    return csr_array((acts.value.numpy(), (row.numpy(), acts.latent.numpy())), shape)


def cosines(
    decoder: Float[Tensor, "layer latent d_in"],
    directions: Float[Tensor, "layer feature d_in"],
) -> Float[Tensor, "layer latent feature"]:
    """|cos| of each latent's and each feature's direction at each layer."""
    a = torch.nn.functional.normalize(decoder, dim=-1)
    b = torch.nn.functional.normalize(directions, dim=-1)
    return torch.einsum("ljd,lfd->ljf", a, b).abs()


def match(scores: Float[Tensor, "latent feature"]) -> Int[Tensor, " feature"]:
    """The latent of each feature in the best one-to-one matching; or `NONE`."""
    latents, features = linear_sum_assignment(scores.numpy(), maximize=True)
    found = torch.full((scores.shape[1],), NONE)
    found[torch.from_numpy(features)] = torch.from_numpy(latents)
    return found


def nearest(
    cosines: Float[Tensor, "layer latent feature"],
    acts: ActiveLatents,
    truth: ActiveLatents,
) -> tuple[Int[Tensor, " part"], Int[Tensor, " act"]]:
    """The active latent nearest to each active feature, and the other way round.

    Nearest: of the largest |cos| among those that are active at the same token and
    layer.

    Returns:
        The latent of each entry of `truth` and the feature of each entry of `acts`;
        `NONE` where nothing is active.
    """
    act, part = _pairs(acts, truth)
    scores = cosines[truth.layer[part], acts.latent[act], truth.latent[part]]
    of_part = _best(scores, part, act, len(truth.value))
    of_act = _best(scores, act, part, len(acts.value))
    return _take(acts.latent, of_part), _take(truth.latent, of_act)


def _take(names: Tensor, index: Tensor) -> Tensor:
    return torch.where(index < 0, NONE, names[index])


def _pairs(acts: ActiveLatents, truth: ActiveLatents) -> tuple[Tensor, Tensor]:
    """Indices into both of all pairs that are active at the same token and layer."""
    n_layers = acts.n_layers
    rows, order = (acts.token * n_layers + acts.layer).sort()
    wanted = truth.token * n_layers + truth.layer
    first = torch.searchsorted(rows, wanted)
    counts = torch.searchsorted(rows, wanted, right=True) - first
    part = torch.arange(len(wanted)).repeat_interleave(counts)
    ends = counts.cumsum(0)
    within = torch.arange(len(part)) - (ends - counts)[part]
    return order[first[part] + within], part


def _best(scores: Tensor, group: Tensor, name: Tensor, n_groups: int) -> Tensor:
    """The name with the largest score in each group; `NONE` in an empty one."""
    order = scores.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    best = torch.full((n_groups,), NONE)
    groups, counts = group[order].unique_consecutive(return_counts=True)
    best[groups] = name[order[counts.cumsum(0) - 1]]
    return best


def chain(
    decoders: Sequence[Float[Tensor, "latent d_in"]],
) -> list[Int[Tensor, " latent"]]:
    """Join the latents of single-layer SAEs by matching decoder rows.

    Each layer's latents are matched to those of the layer before by |cos|, as in SAE
    Match (arXiv:2410.07656).

    Returns:
        For each layer, the number of the joint latent that each latent belongs to.
    """
    joint = [torch.arange(len(decoders[0]))]
    for before, after in pairwise(decoders):
        partner = match(cosines(before[None], after[None])[0])
        joint.append(joint[-1][partner])
    return joint
