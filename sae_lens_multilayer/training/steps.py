"""From a training batch to gradients: sparsely for ours, as SAELens for the rest."""

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import TrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor

from sae_lens_multilayer.ranks import ALONE, Ranks
from sae_lens_multilayer.sae.multi_layer_sae import MultiLayerTrainingSAE
from sae_lens_multilayer.topk.reference import standardize
from sae_lens_multilayer.topk.select import block_rows
from sae_lens_multilayer.topk.tile import LayerMoments


@dataclass
class StepStats:
    """What one training batch gave, as sums; raw space unless it has a lens."""

    n_tokens: int
    d_in: int
    losses: dict[str, Tensor]
    """The losses by name; "overall_loss" is the one that was differentiated."""
    sum_sq_error: Float[Tensor, " layer"]
    sum_sq_deviation: Float[Tensor, " layer"]
    """Sum of squared distances from the layer's mean vector over the batch."""
    n_active: Int[Tensor, " layer"]
    sum_acts: Float[Tensor, " layer"]
    fire_counts: Int[Tensor, " d_sae"]
    """Number of activations of each latent over all tokens and layers."""
    max_acts: Float[Tensor, " d_sae"]
    """Largest activation of each latent; 0 if it was silent."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """What the architecture itself wants logged."""
    is_in_lens_space: bool = False
    """Whether errors and deviations are of transformed vectors, as the loss is."""

    @property
    def fvu(self) -> Float[Tensor, " layer"]:
        """Fraction of variance unexplained in this batch."""
        return self.sum_sq_error / self.sum_sq_deviation

    def by_layer(self) -> dict[str, Float[Tensor, " layer"]]:
        """The metrics of this batch, one value per layer.

        Those in the space of a lens have names of their own: `lens_fvu`, `lens_mse`.
        """
        space = "lens_" if self.is_in_lens_space else ""
        return {
            f"{space}fvu": self.fvu,
            f"{space}mse": self.sum_sq_error / (self.n_tokens * self.d_in),
            "l0": self.n_active / self.n_tokens,
            "l1": self.sum_acts / self.n_tokens,
        }


def topk_gradients(
    sae: MultiLayerTrainingSAE,
    x: Float[Tensor, "token layer d_in"],
    dead_latents: Bool[Tensor, " d_sae"],
    micro_batch_size_tokens: int | None,
    ranks: Ranks = ALONE,
) -> StepStats:
    """Add the gradients of a batch to a multi-layer SAE's parameters.

    Args:
        micro_batch_size_tokens: Tokens whose vectors at one layer are encoded at a
            time; None: as many as fit the cache, and 512 at least. The gradients do not
            depend on it.
        ranks: Each holds as many other tokens of the batch.
    """
    micro = micro_batch_size_tokens or block_rows(sae.cfg.d_sae, x.device.type)
    step = sae.accumulate_gradients(x, dead_latents, min(micro, len(x)), ranks)
    return StepStats(
        n_tokens=x.shape[0] * ranks.count,
        d_in=x.shape[2],
        losses={
            "overall_loss": step.loss,
            "mse_loss": step.mse_loss,
            "auxiliary_reconstruction_loss": step.aux_loss,
        },
        sum_sq_error=step.sum_sq_error,
        sum_sq_deviation=step.sum_sq_deviation,
        n_active=step.n_active,
        sum_acts=step.sum_acts,
        fire_counts=step.fire_counts,
        max_acts=step.max_acts,
        is_in_lens_space=sae.lens is not None,
    )


@dataclass
class StockStep:
    """How a stock SAELens architecture is trained on a multi-layer batch."""

    sae: TrainingSAE[Any]
    coefficients: dict[str, float]
    n_training_steps: int
    is_logging_step: bool
    scaler: ActivationScaler
    """The host's scale of raw vectors; the losses are taken between scaled ones."""
    autocast: AbstractContextManager[Any]
    standardize_inputs: bool
    """Whether vectors are standardised here instead of by the SAE, so that its losses
    are taken between standardised vectors."""
    ranks: Ranks = ALONE
    """Each holds as many other tokens of the batch."""

    def gradients(
        self,
        x: Float[Tensor, "token layer d_in"],
        dead_latents: Bool[Tensor, " d_sae"],
        micro_batch_size_tokens: int | None,
    ) -> StepStats:
        """Add the gradients of a batch to the SAE's parameters, by autograd.

        Vectors of all layers are rows of one batch. The loss is the mean over the
        micro-batches of all ranks, and what the SAE itself estimates from batches, as
        BatchTopK its threshold, is the mean over ranks.
        """
        stats = _empty_stats(x, self.sae.cfg.d_sae, self.ranks)
        for part in x.split(micro_batch_size_tokens or len(x)):
            share = len(part) / len(x)
            output, x_hat = self._forward(part.to(self.sae.dtype), dead_latents)
            (output.loss * share).backward()
            _add_losses(stats, output, share)
            _add_sums(stats, part, x_hat, output)
        self._reduce(stats)
        return stats

    def _reduce(self, stats: StepStats) -> None:
        if self.ranks.is_alone:
            return
        for parameter in self.sae.parameters():
            # Whether there is a gradient may depend on the vectors.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self.ranks.mean_(parameter.grad)
        self.ranks.mean_(*(b for b in self.sae.buffers() if b.is_floating_point()))
        self.ranks.mean_(*stats.losses.values())
        sums = (stats.sum_sq_error, stats.n_active, stats.sum_acts, stats.fire_counts)
        self.ranks.sum_(*sums)
        self.ranks.max_(stats.max_acts)

    def _forward(
        self, x: Tensor, dead_latents: Tensor
    ) -> tuple[TrainStepOutput, Float[Tensor, "token layer d_in"]]:
        rows, mean, std = self.scaler(x.flatten(0, 1)), 0.0, 1.0
        if self.standardize_inputs:
            rows, mean, std = standardize(rows)
        step_input = TrainStepInput(
            sae_in=rows,
            coefficients=self.coefficients,
            dead_neuron_mask=dead_latents,
            n_training_steps=self.n_training_steps,
            is_logging_step=self.is_logging_step,
        )
        with self.autocast, _without_own_norm(self.sae, self.standardize_inputs):
            output = self.sae.training_forward_pass(step_input)
        x_hat = output.sae_out.detach().to(x.dtype) * std + mean
        return output, self.scaler.unscale(x_hat).view_as(x)


@contextmanager
def _without_own_norm(sae: TrainingSAE[Any], active: bool) -> Generator[None]:
    """Let a layer-norm SAE take vectors that are standardised already.

    Its loss and its auxiliary loss (which the host refuses under layer norm) are then
    taken between standardised vectors.
    """
    if not active:
        yield
        return
    saved = (
        sae.cfg.normalize_activations,
        sae.run_time_activation_norm_fn_in,
        sae.run_time_activation_norm_fn_out,
    )
    sae.cfg.normalize_activations = "none"
    sae.run_time_activation_norm_fn_in = _identity
    sae.run_time_activation_norm_fn_out = _identity
    try:
        yield
    finally:
        (
            sae.cfg.normalize_activations,
            sae.run_time_activation_norm_fn_in,
            sae.run_time_activation_norm_fn_out,
        ) = saved


def _identity(x: Tensor) -> Tensor:
    return x


def _empty_stats(x: Tensor, d_sae: int, ranks: Ranks) -> StepStats:
    n_layers, d_in = x.shape[1:]
    raw = x.float()
    mean = raw.mean(0)
    moments = LayerMoments(len(x), mean, (raw - mean).square().sum((0, 2)))
    moments = moments.over_ranks(ranks)
    zeros = partial(torch.zeros, device=x.device)
    return StepStats(
        n_tokens=moments.n_tokens,
        d_in=d_in,
        losses={},
        sum_sq_error=zeros(n_layers),
        sum_sq_deviation=moments.sum_sq_deviation,
        n_active=zeros(n_layers, dtype=torch.int64),
        sum_acts=zeros(n_layers),
        fire_counts=zeros(d_sae, dtype=torch.int64),
        max_acts=zeros(d_sae),
    )


def _add_losses(stats: StepStats, output: TrainStepOutput, share: float) -> None:
    for name, loss in {"overall_loss": output.loss, **output.losses}.items():
        stats.losses[name] = stats.losses.get(name, 0.0) + loss.detach() * share
    stats.metrics = output.metrics


@torch.no_grad()
def _add_sums(
    stats: StepStats, x: Tensor, x_hat: Tensor, output: TrainStepOutput
) -> None:
    acts = output.feature_acts.detach()
    acts = (acts.to_dense() if acts.is_sparse else acts).float()
    by_layer = acts.view(*x.shape[:2], -1)
    stats.sum_sq_error += (x_hat.float() - x.float()).square().sum((0, 2))
    stats.n_active += (by_layer != 0).sum((0, 2))
    stats.sum_acts += by_layer.abs().sum((0, 2))
    stats.fire_counts += (acts != 0).sum(0)
    stats.max_acts = torch.maximum(stats.max_acts, acts.abs().amax(0))
