"""Accumulators of the gradients of a training step, and AuxK.

The gradient of a loss with respect to the reconstruction reaches the weights through
the active latents only: a weight gradient is a product with the transposed activations.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_multilayer.ranks import Ranks
from sae_lens_multilayer.topk.products import DenseActs, SparseActs, as_matrix
from sae_lens_multilayer.topk.select import DeadLatents, Selection
from sae_lens_multilayer.topk.tile import Tile, sum_dtype, sum_of_squares

_ENTRIES_PER_LATENT = 4
"""Activations per latent from which a product costs more than writing its rows."""


class LatentGradients:
    """Gradients of the weights of some latents, one row for each latent.

    A product with transposed activations writes all rows, however few vectors there
    are, so the vectors of small tiles wait until there are enough of them.
    """

    def __init__(
        self,
        W_enc_rows: Float[Tensor, "latent d_in"],
        W_dec: Float[Tensor, "latent d_in"],
    ) -> None:
        """Take the tensors to add to.

        Args:
            W_enc_rows: Gradients of the encoder, a row for each latent.
            W_dec: Gradients of the decoder.
        """
        self.W_enc_rows = W_enc_rows
        self.W_dec = W_dec
        self.h = W_dec.new_zeros(len(W_dec))
        """Sum over vectors of the gradients of the pre-activations."""
        self._waiting: list[_SparseTile] = []

    @classmethod
    def zeros_like(cls, rows: Float[Tensor, "latent d_in"]) -> "LatentGradients":
        """No gradient yet, for latents with these weights."""
        zeros = torch.zeros_like(rows, memory_format=torch.contiguous_format)
        return cls(zeros, zeros.clone())

    def add(
        self,
        acts: SparseActs | DenseActs,
        u_hat_gradient: Float[Tensor, "act d_in"],
        v: Float[Tensor, "act d_in"],
        W_dec: Float[Tensor, "latent d_in"],
    ) -> None:
        """Add the gradients of a tile, given the one of its decoder's output."""
        h_gradient = acts.dots(u_hat_gradient, W_dec).mul_(acts.values > 0)
        acts.add_sums(self.h, h_gradient)
        if isinstance(acts, DenseActs):
            acts.add_transposed_product(self.W_dec, acts.values, u_hat_gradient)
            acts.add_transposed_product(self.W_enc_rows, h_gradient, v)
            return
        self._waiting.append(_SparseTile(acts, h_gradient, u_hat_gradient, v))
        n_entries = sum(tile.h_gradient.numel() for tile in self._waiting)
        if n_entries >= _ENTRIES_PER_LATENT * len(self.W_dec):
            self.finish()

    def finish(self) -> None:
        """Add what still waits."""
        if not self._waiting:
            return
        tile = _SparseTile.concatenate(self._waiting)
        self._waiting = []
        acts = tile.acts
        acts.add_transposed_product(self.W_dec, acts.values, tile.u_hat_gradient)
        acts.add_transposed_product(self.W_enc_rows, tile.h_gradient, tile.v)

    def add_scaled(self, other: "LatentGradients", scale: Tensor, at: Tensor) -> None:
        """Add the gradients of the latents `at`, multiplied by a scalar."""
        other.finish()
        self.W_enc_rows.index_add_(0, at, other.W_enc_rows * scale)
        self.W_dec.index_add_(0, at, other.W_dec * scale)
        self.h.index_add_(0, at, other.h * scale)


@dataclass
class _SparseTile:
    """What a tile gives to the weight gradients."""

    acts: SparseActs
    h_gradient: Float[Tensor, "act k"]
    u_hat_gradient: Float[Tensor, "act d_in"]
    v: Float[Tensor, "act d_in"]

    @staticmethod
    def concatenate(tiles: "list[_SparseTile]") -> "_SparseTile":
        """Put tiles one below the other."""
        if len(tiles) == 1:
            return tiles[0]
        return _SparseTile(
            SparseActs(
                torch.cat([tile.acts.values for tile in tiles]),
                torch.cat([tile.acts.indices for tile in tiles]),
                tiles[0].acts.n_latents,
            ),
            torch.cat([tile.h_gradient for tile in tiles]),
            torch.cat([tile.u_hat_gradient for tile in tiles]),
            torch.cat([tile.v for tile in tiles]),
        )


class AuxK:
    """Gao's auxiliary loss: dead latents reconstruct the residual `e = z - z_hat`.

    The variance of `e` at a layer is known only after the layer's last tile; until then
    gradients are kept apart, for the dead latents alone, and not divided by it.
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
        self.ranks.sum_(self.sums)
        total_e, squares, squared_error = self.sums
        n = self.n_entries * self.ranks.count
        variance = (squares - total_e.square() / n) / (n - 1)
        self.losses.append(squared_error / n / variance)
        scale = 2 * self.coefficient / (n_layers * n * variance)
        total.add_scaled(self.gradients, scale, self.dead.indices)
        self._start_layer()
