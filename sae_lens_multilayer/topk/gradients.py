"""Accumulators of the gradients of a training step, and AuxK.

The gradient of a loss with respect to the reconstruction reaches the weights through
the active latents only: a weight gradient is a product with the transposed activations.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_multilayer.topk.products import DenseActs, SparseActs, as_matrix
from sae_lens_multilayer.topk.select import DeadLatents, Selection
from sae_lens_multilayer.topk.tile import Tile, sum_dtype, sum_of_squares


@dataclass
class LatentGradients:
    """Gradients of the weights of some latents, one row for each latent."""

    W_enc_rows: Float[Tensor, "latent d_in"]
    W_dec: Float[Tensor, "latent d_in"]
    h: Float[Tensor, " latent"]
    """Sum over vectors of the gradients of the pre-activations."""

    @classmethod
    def zeros_like(cls, rows: Float[Tensor, "latent d_in"]) -> "LatentGradients":
        """No gradient yet, for latents with these weights."""
        zeros = torch.zeros_like(rows, memory_format=torch.contiguous_format)
        return cls(zeros, zeros.clone(), zeros.new_zeros(len(rows)))

    def add(
        self,
        acts: SparseActs | DenseActs,
        u_hat_gradient: Float[Tensor, "act d_in"],
        v: Float[Tensor, "act d_in"],
        W_dec: Float[Tensor, "latent d_in"],
    ) -> None:
        """Add the gradients of a tile, given the one of its decoder's output."""
        acts.add_transposed_product(self.W_dec, acts.values, u_hat_gradient)
        h_gradient = acts.dots(u_hat_gradient, W_dec).mul_(acts.values > 0)
        acts.add_transposed_product(self.W_enc_rows, h_gradient, v)
        acts.add_sums(self.h, h_gradient)

    def add_scaled(self, other: "LatentGradients", scale: Tensor, at: Tensor) -> None:
        """Add the gradients of the latents `at`, multiplied by a scalar."""
        self.W_enc_rows.index_add_(0, at, other.W_enc_rows * scale)
        self.W_dec.index_add_(0, at, other.W_dec * scale)
        self.h.index_add_(0, at, other.h * scale)


class AuxK:
    """Gao's auxiliary loss: dead latents reconstruct the residual `e = z - z_hat`.

    The variance of `e` at a layer is known only after the layer's last tile; until then
    gradients are kept apart, for the dead latents alone, and not divided by it.
    """

    def __init__(self, dead: DeadLatents, coefficient: float) -> None:
        self.dead = dead
        self.coefficient = coefficient
        self.losses: list[Tensor] = []
        self._start_layer()

    def _start_layer(self) -> None:
        self.gradients = LatentGradients.zeros_like(self.dead.W_dec)
        self.n_entries = 0
        self.sums = torch.zeros(
            3, dtype=sum_dtype(self.dead.W_dec.device), device=self.dead.W_dec.device
        )

    def add_tile(
        self, tile: Tile, selection: Selection, residual: Float[Tensor, "act d_in"]
    ) -> None:
        """Add a tile of a layer, given its residual `z_hat - z = -e`."""
        assert selection.dead_values is not None
        assert selection.dead_indices is not None
        values = selection.dead_values.relu()
        acts = as_matrix(values, selection.dead_indices, len(self.dead.indices))
        difference = (acts.times(self.dead.W_dec) * tile.std).add_(residual)
        self.n_entries += residual.numel()
        self.sums += torch.stack(
            [
                -residual.sum(dtype=self.sums.dtype),
                sum_of_squares(residual),
                sum_of_squares(difference),
            ]
        )
        self.gradients.add(acts, difference.mul_(tile.std), tile.v, self.dead.W_dec)

    def finish_layer(self, total: LatentGradients, n_layers: int) -> None:
        """Add the layer's gradients to the total, and its loss to the losses."""
        total_e, squares, squared_error = self.sums
        n = self.n_entries
        variance = (squares - total_e.square() / n) / (n - 1)
        self.losses.append(squared_error / n / variance)
        scale = 2 * self.coefficient / (n_layers * n * variance)
        total.add_scaled(self.gradients, scale, self.dead.indices)
        self._start_layer()
