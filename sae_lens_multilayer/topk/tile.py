"""A tile of vectors before and after the encoder, shared by inference and training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_multilayer.ranks import Ranks
from sae_lens_multilayer.topk.reference import STANDARDIZE_EPS

_CHUNK_ELEMENTS = 2**17


@dataclass
class Tile:
    """Vectors, centred and standardised."""

    centred: Float[Tensor, "act d_in"]
    mean: Float[Tensor, "act 1"]
    std: Float[Tensor, "act 1"]
    v: Float[Tensor, "act d_in"]
    """What the encoder multiplies; contiguous, whatever the vectors were."""


def make_tile(
    z: Float[Tensor, "act d_in"],
    b_dec: Float[Tensor, " d_in"],
    standardize_inputs: bool,
) -> Tile:
    """Standardise vectors as `reference.standardize` does and subtract the bias.

    The norm of the centred vectors is vectorised on the CPU, `Tensor.std` is not.
    """
    if not standardize_inputs:
        ones = z.new_ones(len(z), 1)
        return Tile(z, torch.zeros_like(ones), ones, (z - b_dec).contiguous())
    mean = z.mean(dim=1, keepdim=True)
    centred = z - mean
    norm = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    std = norm / math.sqrt(z.shape[1] - 1)
    v = torch.div(centred, std + STANDARDIZE_EPS) - b_dec
    return Tile(centred, mean, std, v.contiguous())


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """Float64 for float64 parameters, float32 for all others."""
    return torch.promote_types(parameter.dtype, torch.float32)


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums over a batch: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def sum_of_squares(x: Float[Tensor, "act d_in"]) -> Float[Tensor, ""]:
    """Sum of squares of all entries: a vectorised norm of each row, then a wide sum."""
    norms = torch.linalg.vector_norm(x, dim=1)
    return norms.to(sum_dtype(x.device)).square().sum()


def row_chunks(rows: Float[Tensor, "row d_in"]) -> tuple[Tensor, ...]:
    """Rows in pieces that stay in the cache of a CPU; all at once elsewhere."""
    on_cpu = rows.device.type == "cpu"
    return rows.split(max(1, _CHUNK_ELEMENTS // rows.shape[1]) if on_cpu else len(rows))


@dataclass
class LayerMoments:
    """Spread of the vectors of a layer, or of each of several, over some tokens.

    `a + b` is that over the tokens of both. Squares are taken about the mean of each
    part and combined with the distance between the means (Chan et al. 1979), which
    loses nothing where the mean is large.
    """

    n_tokens: int
    mean: Float[Tensor, "*layer d_in"]
    sum_sq_deviation: Float[Tensor, "*layer"]
    """Sum of squares about the mean vector."""

    @classmethod
    def of(cls, z: Float[Tensor, "token d_in"]) -> "LayerMoments":
        """The moments of the vectors of one layer."""
        mean = z.mean(dim=0)
        squares = sum_of_squares(z - mean)
        return cls(len(z), mean.to(squares.dtype), squares)

    @classmethod
    def stack(cls, layers: Sequence["LayerMoments"]) -> "LayerMoments":
        """The moments of several layers over the same tokens."""
        return cls(
            layers[0].n_tokens,
            torch.stack([layer.mean for layer in layers]),
            torch.stack([layer.sum_sq_deviation for layer in layers]),
        )

    def __add__(self, other: "LayerMoments") -> "LayerMoments":
        n_tokens = self.n_tokens + other.n_tokens
        share = other.n_tokens / n_tokens
        step = other.mean - self.mean
        between = step.square().sum(-1) * (other.n_tokens * (1 - share))
        return LayerMoments(
            n_tokens,
            self.mean + step * share,
            self.sum_sq_deviation + other.sum_sq_deviation + between,
        )

    @property
    def n_entries(self) -> int:
        """Tokens times dimensions."""
        return self.n_tokens * self.mean.shape[-1]

    @property
    def variance(self) -> Float[Tensor, "*layer"]:
        """Unbiased variance of all entries about one scalar mean."""
        means = self.mean - self.mean.mean(-1, keepdim=True)
        squares = self.sum_sq_deviation + self.n_tokens * means.square().sum(-1)
        return squares / (self.n_entries - 1)

    def over_ranks(self, ranks: Ranks) -> "LayerMoments":
        """The moments of all ranks' tokens, of which each has as many."""
        if ranks.is_alone:
            return self
        both = torch.cat([self.mean, self.sum_sq_deviation.unsqueeze(-1)], dim=-1)
        parts = [
            LayerMoments(self.n_tokens, part[..., :-1], part[..., -1])
            for part in ranks.gather(both)
        ]
        return reduce(add, parts)
