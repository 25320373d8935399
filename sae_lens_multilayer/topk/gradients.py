"""Accumulators of the gradients of a training step, and the AuxK loss.

The gradient of a loss with respect to the reconstruction reaches the weights only
through the active latents, so each weight gradient is a product with the transposed
activations.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_multilayer.ranks import Ranks
from sae_lens_multilayer.topk.products import DenseActs, SparseActs, make_acts
from sae_lens_multilayer.topk.select import DeadLatents, Selection
from sae_lens_multilayer.topk.tile import Tile, sum_dtype, sum_of_squares

_ENTRIES_PER_LATENT = 4
"""Activations per latent from which a product costs more than writing its rows."""


class LatentGradients:
    """Gradients of the weights of some latents, one row for each latent.

    Adds to the two tensors given. A product with transposed activations writes all
    rows, even for few vectors, so small tiles are collected and added together.
    """

    def __init__(
        self,
        W_enc_rows: Float[Tensor, "latent d_in"],
        W_dec: Float[Tensor, "latent d_in"],
    ) -> None:
        self.W_enc_rows = W_enc_rows
        self.W_dec = W_dec
        self.h = W_dec.new_zeros(len(W_dec))
        """Sum over vectors of the gradients of the pre-activations."""
        self._pending: list[tuple[Tensor, ...]] = []

    @classmethod
    def zeros_like(cls, rows: Float[Tensor, "latent d_in"]) -> "LatentGradients":
        """New accumulators for latents with these weights."""
        zeros = torch.zeros_like(rows, memory_format=torch.contiguous_format)
        return cls(zeros, zeros.clone())

    def add(
        self,
        acts: SparseActs | DenseActs,
        u_hat_gradient: Float[Tensor, "act d_in"],
        v: Float[Tensor, "act d_in"],
        W_dec: Float[Tensor, "latent d_in"],
    ) -> None:
        """Add the gradients of a tile, given the gradient of its decoder's output."""
        h_gradient = acts.dots(u_hat_gradient, W_dec).mul_(acts.values > 0)
        acts.add_sums(self.h, h_gradient)
        if isinstance(acts, DenseActs):
            acts.add_transposed_matmul(self.W_dec, acts.values, u_hat_gradient)
            acts.add_transposed_matmul(self.W_enc_rows, h_gradient, v)
            return
        tile = acts.values, acts.indices, h_gradient, u_hat_gradient, v
        self._pending.append(tile)
        n_entries = sum(values.numel() for values, *_ in self._pending)
        if n_entries >= _ENTRIES_PER_LATENT * len(self.W_dec):
            self.flush()

    def flush(self) -> None:
        """Add the tiles collected so far."""
        if not self._pending:
            return
        values, indices, h_gradient, u_hat_gradient, v = (
            tiles[0] if len(tiles) == 1 else torch.cat(tiles)
            for tiles in zip(*self._pending, strict=True)
        )
        self._pending = []
        acts = SparseActs(values, indices, len(self.W_dec))
        acts.add_transposed_matmul(self.W_dec, values, u_hat_gradient)
        acts.add_transposed_matmul(self.W_enc_rows, h_gradient, v)

    def add_scaled(self, other: "LatentGradients", scale: Tensor, at: Tensor) -> None:
        """Add `scale` times the gradients of `other` to the latents of indices `at`."""
        other.flush()
        self.W_enc_rows.index_add_(0, at, other.W_enc_rows * scale)
        self.W_dec.index_add_(0, at, other.W_dec * scale)
        self.h.index_add_(0, at, other.h * scale)


class AuxK:
    """Gao's auxiliary loss: dead latents reconstruct the residual `e = z - z_hat`.

    The variance of `e` at a layer is complete only after the layer's last tile; until
    then the gradients of the dead latents are kept apart, not yet divided by it.
    """

    def __init__(self, dead: DeadLatents, coefficient: float, ranks: Ranks) -> None:
        self.dead = dead
        self.coefficient = coefficient
        self.ranks = ranks
        self.losses: list[Tensor] = []
        self._start_layer()

    def _start_layer(self) -> None:
        self.gradients = LatentGradients.zeros_like(self.dead.W_dec)
        self.n_entries = 0
        device = self.dead.W_dec.device
        self.sums = torch.zeros(3, dtype=sum_dtype(device), device=device)

    def add_tile(
        self, tile: Tile, selection: Selection, residual: Float[Tensor, "act d_in"]
    ) -> None:
        """Add a tile of a layer, given its residual `z_hat - z = -e`."""
        assert selection.dead is not None
        values, indices = selection.dead.values.relu(), selection.dead.indices
        acts = make_acts(values, indices, len(self.dead.indices))
        difference = (acts.matmul(self.dead.W_dec) * tile.std).add_(residual)
        self.n_entries += residual.numel()
        sum_e = -residual.sum(dtype=self.sums.dtype)
        self.sums += torch.stack(
            [sum_e, sum_of_squares(residual), sum_of_squares(difference)]
        )
        self.gradients.add(acts, difference.mul_(tile.std), tile.v, self.dead.W_dec)

    def finish_layer(self, total: LatentGradients, n_layers: int) -> None:
        """Add the layer's gradients to the total, and its loss to the losses."""
        self.ranks.sum_(self.sums)
        sum_e, squares, squared_error = self.sums
        n = self.n_entries * self.ranks.count
        variance = (squares - sum_e.square() / n) / (n - 1)
        self.losses.append(squared_error / n / variance)
        scale = 2 * self.coefficient / (n_layers * n * variance)
        total.add_scaled(self.gradients, scale, self.dead.indices)
        self._start_layer()
