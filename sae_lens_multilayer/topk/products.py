"""Matrix products with activations that have k non-zero entries per vector.

`SparseActs` reads only those entries; `DenseActs` has the same methods and uses dense
matrix products, which are faster if k is a sizeable share of the latents. On the CPU
sparse products of float32 numbers use the C++ kernel if there is one.
"""

import warnings
from collections.abc import Sequence
from copy import copy
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_multilayer.topk.patterns import Pattern, can_multiply

_GATHER_ELEMENTS = 2**26
_DENSE_SHARE = 8
_DENSE_SHARE_KERNEL = 4
"""Latents per active one up to which dense products are used; measured on the CPU."""


class SparseActs:
    """Activations as a matrix [act, latent] with k stored entries per row."""

    def __init__(
        self,
        values: Float[Tensor, "act k"],
        indices: Int[Tensor, "act k"],
        n_latents: int,
    ) -> None:
        self.values = values
        self.indices = indices
        self.n_latents = n_latents

    @classmethod
    def cat(cls, tiles: Sequence["SparseActs"]) -> "SparseActs":
        """The activations of several tiles of vectors as one."""
        if len(tiles) == 1:
            return tiles[0]
        values = torch.cat([tile.values for tile in tiles])
        indices = torch.cat([tile.indices for tile in tiles])
        return cls(values, indices, tiles[0].n_latents)

    def among(self, latents: Int[Tensor, " latent"], n_latents: int) -> "SparseActs":
        """The same, with `n_latents` latents of which these are `latents`."""
        return SparseActs(self.values, latents[self.indices], n_latents)

    def matmul(self, rows: Float[Tensor, "latent d_in"]) -> Float[Tensor, "act d_in"]:
        """Sum of the rows of the active latents, weighted by the activations."""
        if can_multiply(self.values, rows):
            out = rows.new_zeros(len(self.values), rows.shape[1])
            self._by_act.add_product(out, self.values, rows)
            return out
        return weighted_row_sum(self.values, self.indices, rows)

    def with_values(self, values: Float[Tensor, "act k"]) -> "SparseActs":
        """Other values at the same entries."""
        other = copy(self)
        other.values = values
        return other

    def dots(
        self, x: Float[Tensor, "act d_in"], rows: Float[Tensor, "latent d_in"]
    ) -> Float[Tensor, "act k"]:
        """Dot product of each vector with the row of each stored latent."""
        if can_multiply(x, rows):
            out = torch.empty_like(self.values, dtype=x.dtype)
            self._by_act.sampled_product(out, x, rows)
            return out
        return row_dots(x, rows, self.indices)

    def add_transposed_matmul(
        self,
        out: Float[Tensor, "latent d_in"],
        values: Float[Tensor, "act k"],
        x: Float[Tensor, "act d_in"],
    ) -> None:
        """Add `values^T x` to `out`; `values` are stored at the same entries."""
        if can_multiply(out, values, x):
            self._by_latent.add_product(out, values, x)
            return
        order, acts, starts = self._sorted_by_latent
        values = values.flatten()[order]
        if not has_sparse_products(x):
            out += F.embedding_bag(
                acts, x, starts[:-1], mode="sum", per_sample_weights=values
            )
            return
        matrix = _csr(starts, acts, values, (self.n_latents, len(x)))
        if out.is_contiguous():
            torch.addmm(out, matrix, x, out=out)
        else:
            out += matrix @ x

    def add_sums(
        self, out: Float[Tensor, " latent"], values: Float[Tensor, "act k"]
    ) -> None:
        """Add to `out` the sum of the `values` of each latent."""
        if can_multiply(out, values):
            self._by_latent.add_row_sums(out, values)
            return
        out.index_add_(0, self.indices.flatten(), values.flatten())

    @cached_property
    def _by_act(self) -> Pattern:
        return Pattern.of(self.indices, self.n_latents)

    @cached_property
    def _by_latent(self) -> Pattern:
        return self._by_act.transposed()

    @cached_property
    def _sorted_by_latent(
        self,
    ) -> tuple[Int[Tensor, " entry"], Int[Tensor, " entry"], Int[Tensor, " start"]]:
        """Entries sorted by latent: their order, their vectors, each latent's start."""
        flat = self.indices.flatten()
        order = flat.sort(stable=True).indices
        counts = flat.bincount(minlength=self.n_latents)
        acts = order.div(self.indices.shape[1], rounding_mode="floor")
        return order, acts, F.pad(counts.cumsum(0), (1, 0))


class DenseActs:
    """The methods of `SparseActs` for a dense matrix [act, latent]."""

    def __init__(
        self,
        values: Float[Tensor, "act k"],
        indices: Int[Tensor, "act k"],
        n_latents: int,
    ) -> None:
        dense = values.new_zeros(values.shape[0], n_latents)
        self.values = dense.scatter_(1, indices, values)

    def with_values(self, values: Float[Tensor, "act latent"]) -> "DenseActs":
        other = copy(self)
        other.values = values
        return other

    def matmul(self, rows: Float[Tensor, "latent d_in"]) -> Float[Tensor, "act d_in"]:
        return self.values @ rows

    def dots(
        self, x: Float[Tensor, "act d_in"], rows: Float[Tensor, "latent d_in"]
    ) -> Float[Tensor, "act latent"]:
        return x @ rows.T

    def add_transposed_matmul(
        self,
        out: Float[Tensor, "latent d_in"],
        values: Float[Tensor, "act latent"],
        x: Float[Tensor, "act d_in"],
    ) -> None:
        out.addmm_(values.T, x)

    def add_sums(
        self, out: Float[Tensor, " latent"], values: Float[Tensor, "act latent"]
    ) -> None:
        out += values.sum(dim=0)


def make_acts(
    values: Float[Tensor, "act k"], indices: Int[Tensor, "act k"], n_latents: int
) -> SparseActs | DenseActs:
    """Use the faster of the two forms for k of `n_latents` entries per row."""
    share = _DENSE_SHARE_KERNEL if can_multiply(values) else _DENSE_SHARE
    dense = n_latents <= share * values.shape[1]
    return (DenseActs if dense else SparseActs)(values, indices, n_latents)


def weighted_row_sum(
    values: Float[Tensor, "act k"],
    indices: Int[Tensor, "act k"],
    rows: Float[Tensor, "latent d_in"],
) -> Float[Tensor, "act d_in"]:
    """`sum_i values[n, i] rows[indices[n, i]]`."""
    return F.embedding_bag(indices, rows, mode="sum", per_sample_weights=values)


def row_dots(
    x: Float[Tensor, "act d_in"],
    rows: Float[Tensor, "latent d_in"],
    indices: Int[Tensor, "act k"],
) -> Float[Tensor, "act k"]:
    """`x[n] . rows[indices[n, i]]`."""
    if x.device.type != "cpu":
        return gathered_row_dots(x, rows, indices)
    n_acts, k = indices.shape
    starts = torch.arange(0, n_acts * k + 1, k, device=x.device)
    pattern = _csr(
        starts, indices.flatten(), x.new_zeros(n_acts * k), (n_acts, len(rows))
    )
    product = torch.sparse.sampled_addmm(pattern, x, rows.T, beta=0.0)
    return product.values().view(n_acts, k)


def gathered_row_dots(
    x: Float[Tensor, "act d_in"],
    rows: Float[Tensor, "latent d_in"],
    indices: Int[Tensor, "act k"],
) -> Float[Tensor, "act k"]:
    """`row_dots` for any device; gathers at most 2^26 numbers at a time."""
    chunk_size = max(1, _GATHER_ELEMENTS // (indices.shape[1] * x.shape[1]))
    parts = zip(x.split(chunk_size), indices.split(chunk_size), strict=True)
    return torch.cat([torch.bmm(rows[i], y.unsqueeze(2)).squeeze(2) for y, i in parts])


def has_sparse_products(x: Tensor) -> bool:
    """Whether torch can multiply CSR matrices on the device of `x` (CUDA, or MKL)."""
    return x.device.type == "cuda" or (
        x.device.type == "cpu" and torch.backends.mkl.is_available()
    )


def _csr(
    starts: Int[Tensor, " start"],
    columns: Int[Tensor, " entry"],
    values: Float[Tensor, " entry"],
    shape: tuple[int, int],
) -> Tensor:
    """A CSR matrix, without torch's warnings that such matrices are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(
            starts, columns, values, shape, device=values.device, check_invariants=False
        )
