"""A tile of vectors before and after the encoder, shared by inference and training."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

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
    """Spread of the vectors of one layer over a whole batch."""

    n_entries: int
    """Tokens times dimensions."""
    variance: Float[Tensor, ""]
    """Unbiased variance of all entries about one scalar mean."""
    sum_sq_deviation: Float[Tensor, ""]
    """Sum of squares about the mean vector."""


def layer_moments(tiles: Iterable[Float[Tensor, "_ d_in"]]) -> LayerMoments:
    """Moments of a layer from one look at each tile.

    Squares are taken about each tile's own mean and combined with the distance between
    the means (Chan et al. 1979), which loses nothing where the mean is large.
    """
    n_tokens = 0
    mean = squares = torch.zeros(())
    for z in tiles:
        tile_mean = z.mean(dim=0)
        tile_squares = sum_of_squares(z - tile_mean)
        tile_mean = tile_mean.to(tile_squares.dtype)
        n_tokens += len(z)
        share = len(z) / n_tokens
        step = tile_mean - mean.to(tile_mean)
        mean = mean.to(tile_mean) + step * share
        between = step.square().sum() * (len(z) * (1 - share))
        squares = squares.to(tile_squares) + tile_squares + between
    n_entries = n_tokens * mean.numel()
    about_scalar = squares + n_tokens * (mean - mean.mean()).square().sum()
    return LayerMoments(n_entries, about_scalar / (n_entries - 1), squares)
