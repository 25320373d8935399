"""Bits per token of sparse codes, and the quantiser of their values."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_STEPS = 1_000
"""Most steps of Lloyd's algorithm."""


def log2_choose(
    n: int | Int[Tensor, "*batch"], k: int | Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """`log2 C(n, k)`: bits that say which k of n latents are active, float64.

    Example:
        >>> log2_choose(4, 2)  # log2 6
        tensor(2.5850, dtype=torch.float64)
    """
    n, k = (torch.as_tensor(value).double() for value in (n, k))
    factorials = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return factorials / math.log(2)


def n_distinct(
    latents: Int[Tensor, "token *group k"], active: Bool[Tensor, "token *group k"]
) -> Int[Tensor, " token"]:
    """U: the number of distinct latents that are active at a token, at any layer."""
    none = -1
    flat = latents.masked_fill(~active, none).flatten(1).sort(1).values
    is_new = torch.ones_like(flat, dtype=torch.bool)
    is_new[:, 1:] = flat[:, 1:] != flat[:, :-1]
    return (is_new & (flat != none)).sum(1)


def bits_of_shared_latents(
    latents: Int[Tensor, "token layer k"],
    active: Bool[Tensor, "token layer k"],
    d_sae: int,
    bits_per_value: int,
) -> Float[Tensor, " token"]:
    """`log2 C(n, U) + U L + A q`: bits of latents that all layers share.

    Which U latents are active at the token, at which of the L layers each is (a mask of
    L bits), and q bits for each of the A activations, L k if none is cut by the ReLU.
    """
    n_latents, n_layers = n_distinct(latents, active), latents.shape[1]
    values = active.flatten(1).sum(1) * bits_per_value
    return log2_choose(d_sae, n_latents) + n_latents * n_layers + values


def bits_of_separate_latents(
    active: Bool[Tensor, "token group k"], d_sae: int, bits_per_value: int
) -> Float[Tensor, " token"]:
    """`sum_g log2 C(n, A_g) + A_g q`: bits of one code or of several independent ones.

    The groups are the layers of single-layer SAEs; a crosscoder has one.
    """
    n_active = active.sum(2)
    return (log2_choose(d_sae, n_active) + n_active * bits_per_value).sum(1)


def k_of_bits(bits: float, d_sae: int, n_groups: int, bits_per_value: int) -> int:
    """The k at which `n_groups (log2 C(d_sae, k) + k q)` is nearest to `bits`.

    At most half of the latents, up to which the bits grow with k; at least 1.
    """
    k = torch.arange(1, max(2, d_sae // 2 + 1))
    found = n_groups * (log2_choose(d_sae, k) + k * bits_per_value)
    return int(k[(found - bits).abs().argmin()])


@dataclass(frozen=True)
class Quantiser:
    """Rounds values to the nearest of 2^q levels; zeros, which are not coded, stay."""

    levels: Float[Tensor, " level"]
    """Ascending."""

    @classmethod
    def fit(cls, values: Float[Tensor, "*batch"], bits: int) -> "Quantiser":
        """Levels of least squared error by Lloyd's algorithm, from quantiles.

        Args:
            values: Values that are coded; zeros are left out.
            bits: q; there are 2^q levels, or as many as there are distinct values.

        References:
            Lloyd (1982), doi:10.1109/TIT.1982.1056489.
        """
        values = values[values != 0].cpu().double().sort().values
        if not len(values):
            return cls(torch.zeros(1))
        shares = (torch.arange(2**bits).double() + 0.5) / 2**bits
        levels = values[(shares * len(values)).long()].unique()
        sums = torch.cat([values.new_zeros(1), values.cumsum(0)])
        for _ in range(_STEPS):
            after = _means(values, sums, levels)
            is_done = torch.equal(after, levels)
            levels = after
            if is_done:
                break
        return cls(levels)

    def __call__(self, values: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """The nearest level of each value."""
        levels = self.levels.to(values)
        nearest = levels[torch.bucketize(values, _edges(levels))]
        return torch.where(values == 0, values, nearest)


def _edges(levels: Float[Tensor, " level"]) -> Float[Tensor, " edge"]:
    return (levels[1:] + levels[:-1]) / 2


def _means(
    values: Float[Tensor, " value"],
    sums: Float[Tensor, " value_and_one"],
    levels: Float[Tensor, " level"],
) -> Float[Tensor, " level"]:
    """The mean of the sorted values nearest to each level; a level without stays."""
    inner = torch.searchsorted(values, _edges(levels))
    ends = torch.cat([inner.new_zeros(1), inner, inner.new_tensor([len(values)])])
    counts = ends.diff()
    means = sums[ends].diff() / counts.clamp(min=1)
    return torch.where(counts > 0, means, levels)
