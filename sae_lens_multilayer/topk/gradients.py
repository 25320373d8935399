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
        self._pending: list[tuple[SparseActs, Tensor, Tensor, Tensor]] = []

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
    ) -> SparseActs | DenseActs:
        """Add the gradients of a tile, given the gradient of its decoder's output.

        Returns:
            The gradients of the pre-activations, at the entries of `acts`.
        """
        # Activations are not negative. A product with bools would be slow.
        h_gradient = acts.dots(u_hat_gradient, W_dec).mul_(acts.values.sign())
        acts.add_sums(self.h, h_gradient)
        if isinstance(acts, DenseActs):
            acts.add_transposed_matmul(self.W_dec, acts.values, u_hat_gradient)
            acts.add_transposed_matmul(self.W_enc_rows, h_gradient, v)
            return acts.with_values(h_gradient)
        self._pending.append((acts, h_gradient, u_hat_gradient, v))
        n_entries = sum(tile[0].values.numel() for tile in self._pending)
        if n_entries >= _ENTRIES_PER_LATENT * len(self.W_dec):
            self.flush()
        return acts.with_values(h_gradient)

    def flush(self) -> None:
        """Add the tiles collected so far."""
        if not self._pending:
            return
        of_tiles, *others = zip(*self._pending, strict=True)
        h_gradient, u_hat_gradient, v = (
            tiles[0] if len(tiles) == 1 else torch.cat(tiles) for tiles in others
        )
        self._pending = []
        acts = SparseActs.cat(of_tiles)
        acts.add_transposed_matmul(self.W_dec, acts.values, u_hat_gradient)
        acts.add_transposed_matmul(self.W_enc_rows, h_gradient, v)

    def sharing(self) -> "LatentGradients":
        """New accumulators for other activations that add to the same weights."""
        return LatentGradients(self.W_enc_rows, self.W_dec)

    def add_to(self, total: "LatentGradients", at: Tensor) -> None:
        """Add all to the latents of `total` with the indices `at`.

        If the accumulators share the weights of `total`, only the rest is added.
        """
        self.flush()
        if self.W_dec is total.W_dec:
            total.h += self.h
            return
        total.W_enc_rows.index_add_(0, at, self.W_enc_rows)
        total.W_dec.index_add_(0, at, self.W_dec)
        total.h.index_add_(0, at, self.h)

    def scale(self, factor: Float[Tensor, " 1"]) -> None:
        """Multiply all by a factor."""
        self.flush()
        for gradient in (self.W_enc_rows, self.W_dec, self.h):
            gradient.mul_(factor.to(gradient.dtype))


class AuxK:
    """Gao's auxiliary loss: dead latents reconstruct the residual `e = z - z_hat`.

    Its gradient is divided by the variance of `e` at a layer, which is complete after
    the layer's last tile. If a tile has all tokens, its vectors are scaled and its
    gradients are added to those of the other losses. Otherwise, if each vector is
    encoded alone, the gradients of the layer are kept apart and scaled at its end;
    those of a crosscoder, whose encoder adds up layers with different scales, are added
    in a second pass over the tiles, and so they are if the gradient of the vectors is
    wanted.
    """

    def __init__(
        self,
        dead: DeadLatents,
        coefficient: float,
        ranks: Ranks,
        shape: torch.Size,
        weights: tuple[Float[Tensor, "latent d_enc"], Float[Tensor, "latent d_enc"]],
        total: LatentGradients,
    ) -> None:
        """Make an empty sum.

        Args:
            shape: Of the batch, [token, layer, d_in], with the tokens of this rank.
            weights: Encoder rows and decoder rows of all latents.
            total: To which gradients are added.
        """
        self.dead = dead
        self.weights = weights
        self.total = total
        self.coefficient = coefficient
        self.ranks = ranks
        self.n_tokens, self.n_layers, self.d_in = shape
        self.losses: list[Float[Tensor, " layer"]] = []
        self._gradients: LatentGradients | None = None
        self._sums: Float[Tensor, "3 layer"] | None = None

    def add_tile(
        self,
        tile: Tile,
        selection: Selection,
        residual: Float[Tensor, "vector d_in"],
        n_layers: int,
        z_gradient: Float[Tensor, "vector d_in"] | None = None,
    ) -> bool:
        """Add a tile of `n_layers`, given its residual `z_hat - z = -e`.

        The gradient of its vectors, if wanted, is added to `z_gradient`.

        Returns:
            Whether `finish_group` will add its gradients, or has them; if not,
            `add_again` must add them after it.
        """
        acts, difference = self._difference(tile, selection, residual)
        squares = squared_norms(residual)
        sum_e = -residual.sum(dim=1).to(squares.dtype)
        per_vector = torch.stack([sum_e, squares, squared_norms(difference)])
        sums = per_vector.unflatten(1, (-1, n_layers)).sum(1)
        self._sums = sums if self._sums is None else self._sums + sums
        if len(residual) == self.n_tokens * n_layers:
            scale = self._finish_layers()
            self._add_gradients(tile, acts, difference, scale, z_gradient)
        elif len(residual) == len(tile.v) and z_gradient is None:
            self._add_gradients(tile, acts, difference)
        else:
            return False
        return True

    def finish_group(self) -> Float[Tensor, " layer"] | None:
        """End a group of layers; adds the gradients that were kept apart.

        Returns:
            The scale of each layer for `add_again`; None if all tiles are added.
        """
        if self._sums is None:
            return None
        scale = self._finish_layers()
        if self._gradients is None:
            return scale
        self._gradients.scale(scale)
        self.finish()
        return None

    def add_again(
        self,
        tile: Tile,
        selection: Selection,
        residual: Float[Tensor, "vector d_in"],
        scale: Float[Tensor, " layer"],
        z_gradient: Float[Tensor, "vector d_in"] | None = None,
    ) -> None:
        """Add the gradients of a tile whose sums were added by `add_tile`."""
        acts, difference = self._difference(tile, selection, residual)
        self._add_gradients(tile, acts, difference, scale, z_gradient)

    def finish(self) -> None:
        """Add the gradients of all tiles whose vectors were scaled."""
        if self._gradients is not None:
            self._gradients.add_to(self.total, self.dead.indices)
            self._gradients = None

    def _difference(
        self, tile: Tile, selection: Selection, residual: Float[Tensor, "vector d_in"]
    ) -> tuple[SparseActs | DenseActs, Float[Tensor, "vector d_in"]]:
        """Activations of the dead latents, and `e_hat - e`."""
        assert selection.dead is not None
        values, indices = selection.dead.values.relu(), selection.dead.indices
        acts = make_acts(values, indices, len(self.dead.indices))
        e_hat = acts.matmul(self.dead.W_dec).view_as(residual)
        return acts, torch.addcmul(residual, e_hat, tile.std, out=e_hat)

    def _add_gradients(
        self,
        tile: Tile,
        acts: SparseActs | DenseActs,
        difference: Float[Tensor, "vector d_in"],
        scale: Float[Tensor, " layer"] | None = None,
        z_gradient: Float[Tensor, "vector d_in"] | None = None,
    ) -> None:
        weight = tile.std
        if scale is not None:
            n_times = len(difference) // len(scale)
            weight = weight * scale.to(weight.dtype).repeat(n_times).unsqueeze(1)
        gradient = difference.mul_(weight).view_as(tile.v)
        W_enc_rows, W_dec = self.dead.W_enc_rows, self.dead.W_dec
        is_direct = False
        if scale is not None and isinstance(acts, SparseActs):
            is_direct = True
            acts = acts.among(self.dead.indices, len(self.total.W_dec))
            W_enc_rows, W_dec = self.weights
        if self._gradients is None:
            zeros_like = LatentGradients.zeros_like
            self._gradients = self.total.sharing() if is_direct else zeros_like(W_dec)
        h = self._gradients.add(acts, gradient, tile.v, W_dec)
        if z_gradient is not None:
            z_gradient += h.matmul(W_enc_rows)

    def _finish_layers(self) -> Float[Tensor, " layer"]:
        """Store the losses of complete layers; returns the scales of gradients."""
        assert self._sums is not None
        self.ranks.sum_(self._sums)
        sum_e, squares, squared_error = self._sums
        self._sums = None
        n = self.n_tokens * self.d_in * self.ranks.count
        variance = (squares - sum_e.square() / n) / (n - 1)
        self.losses.append(squared_error / n / variance)
        return 2 * self.coefficient / (self.n_layers * n * variance)
