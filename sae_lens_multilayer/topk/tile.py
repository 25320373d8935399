"""Inputs of the encoder in tiles, and moments of layers; for inference and training."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_multilayer.ranks import Ranks
from sae_lens_multilayer.topk.reference import STANDARDIZE_EPS

Transform = Callable[[Tensor, int], Tensor]
"""Maps raw vectors [act, d_in] of a layer, given the layer's index in the batch."""

_CHUNK_ELEMENTS = 2**17


@dataclass
class Tile:
    """Some vectors, centred and standardised.

    An MLSAE encodes each vector, so `d_enc` is `d_in`; a crosscoder encodes the vectors
    of all layers of a token as one, so `d_enc` is `n_layers * d_in`.
    """

    centred: Float[Tensor, "vector d_in"]
    mean: Float[Tensor, "vector 1"]
    std: Float[Tensor, "vector 1"]
    v: Float[Tensor, "act d_enc"]
    """Input of the encoder: standardised, minus the bias; contiguous."""


def make_tile(
    z: Float[Tensor, "vector d_in"],
    b_dec: Float[Tensor, " d_enc"],
    standardize_inputs: bool,
) -> Tile:
    """Standardise vectors as `reference.standardize` does and subtract the bias."""
    if not standardize_inputs:
        ones = z.new_ones(len(z), 1)
        v = z.reshape(-1, len(b_dec)) - b_dec
        return Tile(z, torch.zeros_like(ones), ones, v.contiguous())
    mean = z.mean(dim=1, keepdim=True)
    centred = z - mean
    # Unlike `Tensor.std`, the norm is vectorised on the CPU.
    norm = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    std = norm / math.sqrt(z.shape[1] - 1)
    v = torch.div(centred, std + STANDARDIZE_EPS).view(-1, len(b_dec)) - b_dec
    return Tile(centred, mean, std, v.contiguous())


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float64 for float64, float32 for all others."""
    return torch.promote_types(dtype, torch.float32)


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums over a batch: float64 if the device supports it."""
    return torch.float32 if device.type == "mps" else torch.float64


def squared_norms(x: Float[Tensor, "*act d_in"]) -> Float[Tensor, "*act"]:
    """Squared norm of each vector, in `sum_dtype` so that sums are exact enough."""
    return torch.linalg.vector_norm(x, dim=-1).to(sum_dtype(x.device)).square()


def row_chunks(rows: Float[Tensor, "row d_in"]) -> tuple[Tensor, ...]:
    """Split rows into pieces that fit the cache of a CPU; no split on other devices."""
    on_cpu = rows.device.type == "cpu"
    return rows.split(max(1, _CHUNK_ELEMENTS // rows.shape[1]) if on_cpu else len(rows))


@dataclass
class LayerMoments:
    """Mean and spread over tokens of the vectors of one layer, or of several layers.

    `a + b` has the moments over the tokens of both, by the update of Chan et al.
    (1979), which is accurate even if the mean is large.
    """

    n_tokens: int
    mean: Float[Tensor, "*layer d_in"]
    sum_sq_deviation: Float[Tensor, "*layer"]
    """Sum of squares about the mean vector."""

    @classmethod
    def of(cls, z: Float[Tensor, "token *layer d_in"]) -> "LayerMoments":
        mean = z.mean(dim=0)
        squares = squared_norms(z - mean).sum(dim=0)
        return cls(len(z), mean.to(squares.dtype), squares)

    @classmethod
    def cat(cls, groups: Sequence["LayerMoments"]) -> "LayerMoments":
        """Moments of all layers from those of groups of layers."""
        return cls(
            groups[0].n_tokens,
            torch.cat([group.mean for group in groups]),
            torch.cat([group.sum_sq_deviation for group in groups]),
        )

    def __add__(self, other: "LayerMoments") -> "LayerMoments":
        if self.n_tokens == 0 or other.n_tokens == 0:
            return other if self.n_tokens == 0 else self
        n_tokens = self.n_tokens + other.n_tokens
        weight = other.n_tokens / n_tokens
        difference = other.mean - self.mean
        between = difference.square().sum(-1) * (other.n_tokens * (1 - weight))
        return LayerMoments(
            n_tokens,
            self.mean + difference * weight,
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
        """Moments over the tokens of all ranks, which have equally many each."""
        if ranks.is_alone:
            return self
        packed = torch.cat([self.mean, self.sum_sq_deviation.unsqueeze(-1)], dim=-1)
        parts = [
            LayerMoments(self.n_tokens, part[..., :-1], part[..., -1])
            for part in ranks.gather(packed)
        ]
        return reduce(add, parts)


@dataclass
class LayerGroup:
    """Some layers of the batch, in tiles of tokens."""

    z: Float[Tensor, "token layer d_in"]
    first_layer: int
    tokens_per_tile: int
    dtype: torch.dtype
    transform: Transform | None

    @property
    def n_layers(self) -> int:
        return self.z.shape[1]

    def tiles(self) -> Iterator[Float[Tensor, "token layer d_in"]]:
        for tile in self.z.split(self.tokens_per_tile):
            wide = tile.to(self.dtype)
            if self.transform is not None:
                layers = enumerate(wide.unbind(1), self.first_layer)
                wide = torch.stack([self.transform(x, i) for i, x in layers], dim=1)
            yield wide


def layer_groups(
    z: Float[Tensor, "token layer d_in"],
    micro_batch_size: int,
    dtype: torch.dtype,
    transform: Transform | None,
) -> list[LayerGroup]:
    """Groups of as many layers as fit one tile; single layers if none does.

    Few vectors are slow to multiply, and a token activates similar latents at
    neighbouring layers, so rows of weights are read from the cache.
    """
    n_tokens, n_layers = z.shape[:2]
    per_group = max(1, micro_batch_size // n_tokens)
    n_groups = -(-n_layers // per_group)
    groups, first_layer = [], 0
    for part in z.chunk(n_groups, dim=1):
        group = LayerGroup(part, first_layer, micro_batch_size, dtype, transform)
        groups.append(group)
        first_layer += part.shape[1]
    return groups
