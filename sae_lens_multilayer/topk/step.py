"""One training step: losses, gradients and statistics from the k active latents."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from itertools import repeat
from operator import add

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lens_multilayer.ranks import ALONE, Ranks
from sae_lens_multilayer.topk.gradients import AuxK, LatentGradients
from sae_lens_multilayer.topk.products import SparseActs
from sae_lens_multilayer.topk.select import (
    DeadLatents,
    Encoder,
    Selection,
    make_encoder,
)
from sae_lens_multilayer.topk.tile import (
    LayerGroup,
    LayerMoments,
    Tile,
    Transform,
    layer_groups,
    make_tile,
    squared_norms,
    wide_dtype,
)


@dataclass
class TopKStep:
    """Losses and statistics of one training batch, summed over the whole batch."""

    loss: Float[Tensor, ""]
    """`mse_loss + aux_coefficient * aux_loss`."""
    mse_loss: Float[Tensor, ""]
    """Mean over layers of the mean squared error over the layer's variance."""
    aux_loss: Float[Tensor, ""]
    """AuxK loss, not multiplied by its coefficient; 0 if no latent is dead."""
    sum_sq_error: Float[Tensor, " layer"]
    """Sum over tokens and dimensions of `(z - z_hat)^2`."""
    n_active: Int[Tensor, " layer"]
    """Number of activations above 0; those of a crosscoder are at all layers."""
    sum_acts: Float[Tensor, " layer"]
    """Sum of the activations (L1), for a crosscoder times the norm of the latent's
    decoder at the layer."""
    moments: LayerMoments
    """Mean and squared deviations of the vectors z of each layer."""
    max_acts: Float[Tensor, " d_sae"]
    """Largest activation of each latent over all layers and tokens, or 0."""
    fire_counts: Int[Tensor, " d_sae"]
    """Number of activations above 0 of each latent over all layers and tokens."""
    n_unproven: Int[Tensor, ""]
    """Selections, of all latents or of the dead ones, without a bfloat16 proof."""


@torch.no_grad()
def training_step(
    z: Float[Tensor, "token layer d_in"],
    W_enc: Float[Tensor, "d_enc d_sae"],
    W_dec: Float[Tensor, "d_sae d_enc"],
    b_dec: Float[Tensor, " d_enc"],
    *,
    k: int,
    dead_latents: Bool[Tensor, " d_sae"] | None,
    k_aux: int,
    aux_coefficient: float,
    micro_batch_size: int,
    standardize_inputs: bool = True,
    certified: bool | None = None,
    transform: Transform | None = None,
    ranks: Ranks = ALONE,
    z_gradient: Float[Tensor, "token 1 d_in"] | None = None,
) -> TopKStep:
    """Add the gradients of `reference.training_loss` to `.grad` of the parameters.

    Of `reference.crosscoder_loss` if the weights are those of a crosscoder: `d_enc` is
    `d_in` for the former, `n_layers * d_in` for the latter.

    In closed form, tile by tile. A tile has vectors of one layer, or all tokens of
    several layers, or (crosscoder) some tokens of all layers. Variances are those of
    the whole batch, so the result does not depend on `micro_batch_size`. Memory does
    not grow with the batch, except for the selected latents of a crosscoder with dead
    latents. Losses are NaN if an input is not finite. Parameters of less than 32 bits
    are converted to float32, and their gradients are rounded once.

    Args:
        micro_batch_size: Vectors computed at a time (tokens for a crosscoder); at most
            [micro_batch_size, d_sae] pre-activations are held.
        certified: True chooses candidates from a bfloat16 encoder product, computes
            their values in float32 and proves for each vector that the k largest are
            among them, or computes the vector in float32. False computes all in the
            dtype of the parameters. None chooses by `select.is_certified_faster`.
        transform: Applied first to each tile, such as a tuned lens.
        ranks: Each rank passes equally many tokens of the batch; losses, gradients and
            statistics are those of all ranks, and previous `.grad` are summed too.
        z_gradient: The gradient of `z` is written to it; for one layer of vectors that
            are not standardised.
    """
    assert z_gradient is None or not standardize_inputs
    dtype = wide_dtype(W_enc.dtype)
    dead = _gather_dead(W_enc, W_dec, dead_latents, k_aux)
    n_acts = z.numel() // len(b_dec)
    encoder = make_encoder(
        W_enc.T.to(dtype).contiguous(),
        k,
        n_acts=n_acts,
        max_rows=min(micro_batch_size, n_acts),
        certified=certified,
        dead=dead,
    )
    gradients, decoder = _start_gradients(W_enc, W_dec), W_dec.to(dtype).contiguous()
    aux = None
    if dead is not None:
        weights = encoder.W_enc_rows, decoder
        aux = AuxK(dead, aux_coefficient, ranks, z.shape, weights, gradients)
    batch = _Batch(
        encoder,
        decoder,
        b_dec.to(dtype),
        gradients,
        aux,
        standardize_inputs,
        ranks,
        z_gradient,
    )
    if len(b_dec) == z.shape[2]:
        groups = layer_groups(z, micro_batch_size, dtype, transform)
    else:
        groups = [LayerGroup(z, 0, micro_batch_size, dtype, transform)]
    batch.add(groups)
    batch.write_gradients(W_enc, W_dec, b_dec)
    step = batch.result(aux_coefficient)
    if z_gradient is not None:
        _add_gradient_of_variance(step, z, z_gradient)
    return step


@dataclass
class _Batch:
    """Accumulates the gradients and statistics of a batch."""

    encoder: Encoder
    W_dec: Float[Tensor, "d_sae d_enc"]
    b_dec: Float[Tensor, " d_enc"]
    gradients: LatentGradients
    aux: AuxK | None
    standardize_inputs: bool
    ranks: Ranks
    z_gradient: Float[Tensor, "token 1 d_in"] | None = None

    def __post_init__(self) -> None:
        self.b_dec_gradient = torch.zeros_like(self.b_dec)
        self.max_acts = self.W_dec.new_zeros(len(self.W_dec))
        self.fire_counts = torch.zeros_like(self.max_acts, dtype=torch.int64)
        self.sums: list[Tensor] = []
        self._norms: Tensor | None = None

    def add(self, groups: list["LayerGroup"]) -> None:
        """Add groups of layers, which together are all layers of the batch."""
        own = [reduce(add, map(LayerMoments.of, group.tiles())) for group in groups]
        self.moments = LayerMoments.cat(own).over_ranks(self.ranks)
        variances = self.moments.variance
        weights = 2 / (len(variances) * self.moments.n_entries * variances)
        sizes = [group.n_layers for group in groups]
        for group, weight in zip(groups, weights.split(sizes), strict=True):
            self._add_group(group, weight.to(self.W_dec.dtype))
        if self.aux is not None:
            self.aux.finish()

    def _add_group(self, group: "LayerGroup", weight: Float[Tensor, " layer"]) -> None:
        sums, again = 0, list[tuple[Tensor, Selection, Tensor | None]]()
        for z, z_gradient in zip(
            group.tiles(), self._z_gradients(group.tokens_per_tile), strict=False
        ):
            tile = self._tile(z)
            selection = self.encoder(tile.v)
            residual, of_tile = self._add_tile(tile, selection, weight, z_gradient)
            sums = sums + of_tile
            if self.aux is not None and not self.aux.add_tile(
                tile, selection, residual, group.n_layers, z_gradient
            ):
                again.append((z, selection, z_gradient))
        if self.aux is not None:
            scale = self.aux.finish_group()
            for z, selection, z_gradient in again:
                assert scale is not None
                tile = self._tile(z)
                residual = self._residual(tile, self._acts(selection))
                self.aux.add_again(tile, selection, residual, scale, z_gradient)
        assert isinstance(sums, Tensor)
        self.sums.append(sums)

    def _z_gradients(self, n: int) -> Iterable[Float[Tensor, "vector d_in"] | None]:
        if self.z_gradient is None:
            return repeat(None)
        return self.z_gradient.squeeze(1).split(n)

    def _tile(self, z: Float[Tensor, "token layer d_in"]) -> Tile:
        return make_tile(z.flatten(0, 1), self.b_dec, self.standardize_inputs)

    def _acts(self, selection: Selection) -> SparseActs:
        return SparseActs(selection.values.relu(), selection.indices, len(self.W_dec))

    def _residual(self, tile: Tile, acts: SparseActs) -> Float[Tensor, "vector d_in"]:
        """`z_hat - z`; both contain the mean, which is left out here."""
        u_hat = acts.matmul(self.W_dec).add_(self.b_dec).view_as(tile.centred)
        return u_hat.mul_(tile.std).sub_(tile.centred)

    def _add_tile(
        self,
        tile: Tile,
        selection: Selection,
        weight: Float[Tensor, " layer"],
        z_gradient: Float[Tensor, "vector d_in"] | None,
    ) -> tuple[Float[Tensor, "vector d_in"], Float[Tensor, "3 layer"]]:
        """Add one tile without AuxK.

        Returns:
            The residual, and sums of squared error, active latents and activations.
        """
        acts, n_layers = self._acts(selection), len(weight)
        values, residual = acts.values, self._residual(tile, acts)
        weights = weight.repeat(len(residual) // n_layers).unsqueeze(1)
        gradient = (residual * (tile.std * weights)).view_as(tile.v)
        h = self.gradients.add(acts, gradient, tile.v, self.W_dec)
        if z_gradient is not None:
            z_gradient.copy_(h.matmul(self.encoder.W_enc_rows) - gradient)
        self.b_dec_gradient += gradient.sum(dim=0)
        active, flat = values > 0, selection.indices.flatten()
        vectors_per_act = len(residual) // len(values)
        fired = active.flatten().to(torch.int64) * vectors_per_act
        self.fire_counts.index_add_(0, flat, fired)
        self.max_acts.scatter_reduce_(0, flat, values.flatten(), "amax")
        n_active = active.sum(1).repeat_interleave(vectors_per_act)
        sums = squared_norms(residual), n_active, self._sum_acts(acts, vectors_per_act)
        per_vector = torch.stack(torch.broadcast_tensors(*sums))
        return residual, per_vector.unflatten(1, (-1, n_layers)).sum(1)

    def _sum_acts(self, acts: SparseActs, n_layers: int) -> Float[Tensor, " vector"]:
        if n_layers == 1:
            return acts.values.sum(1)
        by_layer = self._decoder_norms(n_layers)[acts.indices]
        return (acts.values.unsqueeze(-1) * by_layer).sum(1).flatten()

    def _decoder_norms(self, n_layers: int) -> Float[Tensor, "d_sae layer"]:
        """Of a crosscoder, at each layer."""
        if self._norms is None:
            self._norms = self.W_dec.unflatten(1, (n_layers, -1)).norm(dim=-1)
        return self._norms

    def write_gradients(self, W_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> None:
        """Sum over ranks, and add to `.grad` unless accumulated there already."""
        self.gradients.flush()
        h_gradient = self.gradients.h
        through_encoder = self.encoder.W_enc_rows.T @ h_gradient
        b_dec_gradient = self.b_dec_gradient - through_encoder
        self.ranks.sum_(b_dec_gradient, self.gradients.W_enc_rows, self.gradients.W_dec)
        _grad(b_dec).add_(b_dec_gradient)
        if W_enc.dtype != self.W_dec.dtype:
            _grad(W_enc).add_(self.gradients.W_enc_rows.T)
            _grad(W_dec).add_(self.gradients.W_dec)

    def result(self, aux_coefficient: float) -> TopKStep:
        sums = torch.cat(self.sums, dim=1)
        n_unproven = torch.tensor(self.encoder.n_unproven, device=sums.device)
        self.ranks.sum_(sums, self.fire_counts, n_unproven)
        self.ranks.max_(self.max_acts)
        mse = sums[0] / self.moments.n_entries
        mse_loss = (mse / self.moments.variance).mean()
        aux_loss = torch.zeros_like(mse_loss)
        if self.aux is not None:
            aux_loss = torch.cat(self.aux.losses).mean()
        return TopKStep(
            loss=mse_loss + aux_coefficient * aux_loss,
            mse_loss=mse_loss,
            aux_loss=aux_loss,
            sum_sq_error=sums[0],
            n_active=sums[1].to(torch.int64),
            sum_acts=sums[2],
            moments=self.moments,
            max_acts=self.max_acts,
            fire_counts=self.fire_counts,
            n_unproven=n_unproven,
        )


def _add_gradient_of_variance(
    step: TopKStep, z: Float[Tensor, "token 1 d_in"], z_gradient: Tensor
) -> None:
    """Add that of the variance of `z`, by which the loss is divided."""
    variance = step.moments.variance * (step.moments.n_entries - 1)
    scale = (-2 * step.mse_loss / variance).to(z.dtype)
    z_gradient += scale * (z - step.moments.mean.mean().to(z.dtype))


def _gather_dead(
    W_enc: Float[Tensor, "d_in d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    dead_latents: Bool[Tensor, " d_sae"] | None,
    k_aux: int,
) -> DeadLatents | None:
    if dead_latents is None or k_aux == 0:
        return None
    indices = dead_latents.nonzero().flatten()
    if len(indices) == 0:
        return None
    dtype = wide_dtype(W_enc.dtype)
    return DeadLatents(
        indices,
        W_enc.T.index_select(0, indices).to(dtype),
        W_dec.index_select(0, indices).to(dtype),
        min(k_aux, len(indices)),
    )


def _start_gradients(
    W_enc: Float[Tensor, "d_in d_sae"], W_dec: Float[Tensor, "d_sae d_in"]
) -> LatentGradients:
    """Accumulate into the parameters' `.grad` directly if its dtype is wide enough."""
    dtype = wide_dtype(W_enc.dtype)
    if W_enc.dtype != dtype:
        return LatentGradients.zeros_like(W_dec.to(dtype))
    return LatentGradients(_grad(W_enc).T, _grad(W_dec))


def _grad(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
