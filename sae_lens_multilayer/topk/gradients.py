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
from sae_lens_multilayer.topk.tile import Tile, squared_norms

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
        scale = scale.to(self.h.dtype)
        self.W_enc_rows.index_add_(0, at, other.W_enc_rows * scale)
        self.W_dec.index_add_(0, at, other.W_dec * scale)
        self.h.index_add_(0, at, other.h * scale)


class AuxK:
    """Gao's auxiliary loss: dead latents reconstruct the residual `e = z - z_hat`.

    Its gradient is divided by the variance of `e` at a layer, which is complete after
    the layer's last tile. If a tile has all tokens, its vectors are scaled; otherwise
    the gradients of the layer are kept apart and scaled at its end.
    """

    def __init__(
        self,
        dead: DeadLatents,
        coefficient: float,
        ranks: Ranks,
        n_tokens: int,
        n_layers: int,
    ) -> None:
        """`n_tokens` of this rank, `n_layers` of the batch."""
        self.dead = dead
        self.coefficient = coefficient
        self.ranks = ranks
        self.n_tokens = n_tokens
        self.n_layers = n_layers
        self.losses: list[Float[Tensor, " layer"]] = []
        self._gradients: LatentGradients | None = None
        self._sums: Float[Tensor, "3 layer"] | None = None

    def add_tile(
        self,
        tile: Tile,
        selection: Selection,
        residual: Float[Tensor, "act d_in"],
        n_layers: int,
    ) -> None:
        """Add a tile of `n_layers`, given its residual `z_hat - z = -e`."""
        assert selection.dead is not None
        values, indices = selection.dead.values.relu(), selection.dead.indices
        acts = make_acts(values, indices, len(self.dead.indices))
        difference = (acts.matmul(self.dead.W_dec) * tile.std).add_(residual)
        squares = squared_norms(residual)
        sum_e = -residual.sum(dim=1, dtype=squares.dtype)
        per_act = torch.stack([sum_e, squares, squared_norms(difference)])
        sums = per_act.unflatten(1, (-1, n_layers)).sum(1)
        self._sums = sums if self._sums is None else self._sums + sums
        weight = tile.std
        if len(residual) == self.n_tokens * n_layers:
            scale = self._finish_layers().to(weight.dtype)
            weight = weight * scale.repeat(self.n_tokens).unsqueeze(1)
        if self._gradients is None:
            self._gradients = LatentGradients.zeros_like(self.dead.W_dec)
        self._gradients.add(acts, difference.mul_(weight), tile.v, self.dead.W_dec)

    def finish_group(self, total: LatentGradients) -> None:
        """End a group of layers; adds the gradients that were kept apart."""
        if self._sums is not None:
            self._add_to(total, self._finish_layers())

    def finish(self, total: LatentGradients) -> None:
        """Add the gradients of all tiles whose vectors were scaled."""
        if self._gradients is not None:
            self._add_to(total, torch.ones(1, device=total.h.device))

    def _finish_layers(self) -> Float[Tensor, " layer"]:
        """Store the losses of complete layers; returns the scales of gradients."""
        assert self._sums is not None
        self.ranks.sum_(self._sums)
        sum_e, squares, squared_error = self._sums
        self._sums = None
        n = self.n_tokens * self.dead.W_dec.shape[1] * self.ranks.count
        variance = (squares - sum_e.square() / n) / (n - 1)
        self.losses.append(squared_error / n / variance)
        return 2 * self.coefficient / (self.n_layers * n * variance)

    def _add_to(self, total: LatentGradients, scale: Float[Tensor, " 1"]) -> None:
        assert self._gradients is not None
        total.add_scaled(self._gradients, scale, self.dead.indices)
        self._gradients = None
