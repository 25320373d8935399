"""Products with sparse matrices in C++ (`products.cpp`), in float32 on the CPU.

`products.py` uses them if there is a compiler, and computes the same in PyTorch if not.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_multilayer.topk import native

_MAX_ENTRIES = 2**31 - 1
"""Indices of entries are int32."""


@dataclass(frozen=True)
class Pattern:
    """Where the entries of a sparse matrix [row, column] are, sorted by row.

    Those of row r are `starts[r]` to `starts[r + 1] - 1`. Products take the numbers of
    all entries as one tensor of any shape, in any order.
    """

    starts: Int[Tensor, " start"]
    columns: Int[Tensor, " entry"]
    at: Int[Tensor, " entry"]
    """The index of each entry's number, in the flattened tensor of numbers."""
    n_columns: int

    @classmethod
    def of(cls, indices: Int[Tensor, "row k"], n_columns: int) -> "Pattern":
        """The pattern with k entries in each row, whose numbers are [row, k]."""
        n, k = indices.shape
        starts = torch.arange(0, n * k + 1, k, device=indices.device)
        at = torch.arange(n * k, dtype=torch.int32, device=indices.device)
        return cls(starts, indices.flatten().to(torch.int32), at, n_columns)

    @property
    def n_rows(self) -> int:
        return len(self.starts) - 1

    def transposed(self) -> "Pattern":
        """The pattern of the transposed matrix; its columns ascend in each row."""
        starts = self.starts.new_empty(self.n_columns + 1)
        columns, at = torch.empty_like(self.columns), torch.empty_like(self.at)
        native.call("transpose_pattern", *self._arguments, starts, columns, at)
        return Pattern(starts, columns, at, self.n_rows)

    def add_product(
        self,
        out: Float[Tensor, "row d_in"],
        values: Float[Tensor, "..."],
        x: Float[Tensor, "column d_in"],
    ) -> None:
        """Add to `out` the product of the matrix of these values and `x`."""
        _check(out, values, x)
        native.call("add_product", *self._arguments, values, x, x.shape[1], out)

    def add_row_sums(
        self, out: Float[Tensor, " row"], values: Float[Tensor, "..."]
    ) -> None:
        """Add to `out` the sum of the values of each row."""
        _check(out, values)
        native.call("add_row_sums", self.starts, self.at, self.n_rows, values, out)

    def sampled_product(
        self,
        out: Float[Tensor, "..."],
        x: Float[Tensor, "row d_in"],
        rows: Float[Tensor, "column d_in"],
    ) -> None:
        """Write the entries of `x rows^T` at this pattern to `out`."""
        _check(out, x, rows)
        native.call("sampled_product", *self._arguments, x, rows, x.shape[1], out)

    @property
    def _arguments(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        return self.starts, self.columns, self.at, self.n_rows, self.n_columns


def can_multiply(*tensors: Tensor) -> bool:
    """Whether the kernel is available and takes these tensors."""
    return native.is_available(tensors[0]) and all(
        x.dtype == torch.float32 and x.is_contiguous() and x.numel() <= _MAX_ENTRIES
        for x in tensors
    )


def _check(*tensors: Tensor) -> None:
    for tensor in tensors:
        native.check(tensor, torch.float32, tensor.is_contiguous())
