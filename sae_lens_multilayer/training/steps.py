"""Gradients and metrics of a training batch, for multi-layer and stock SAEs."""

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import TrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor

from sae_lens_multilayer.evaluation.metrics import LayerSums
from sae_lens_multilayer.ranks import ALONE, Ranks
from sae_lens_multilayer.sae.sparse_training import SparseTrainingSAE
from sae_lens_multilayer.topk.reference import standardize
from sae_lens_multilayer.topk.select import block_rows
from sae_lens_multilayer.topk.tile import LayerMoments, wide_dtype


@dataclass
class StepStats:
    """Losses and sums of one training batch, over the tokens of all ranks."""

    sums: LayerSums
    """In raw space, or in the space of the SAE's lens."""
    losses: dict[str, Tensor]
    """The losses by name; "overall_loss" is the one that was differentiated."""
    fire_counts: Int[Tensor, " d_sae"]
    """Number of activations of each latent over all tokens and layers."""
    max_acts: Float[Tensor, " d_sae"]
    """Largest activation of each latent; 0 if it was silent."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Other values that the architecture logs."""
    is_in_lens_space: bool = False

    @property
    def n_tokens(self) -> int:
        """Tokens of the batch."""
        return self.sums.n_tokens

    def constant_layers(self) -> list[int]:
        """Indices of the layers at which all vectors of the batch are the same."""
        deviation = self.sums.moments.sum_sq_deviation
        return (deviation == 0).nonzero().flatten().tolist()

    def by_layer(self) -> dict[str, Float[Tensor, " layer"]]:
        """One value per layer; `lens_fvu`, `lens_mse` are in the space of a lens."""
        space = "lens_" if self.is_in_lens_space else ""
        return {
            f"{space}fvu": self.sums.fvu,
            f"{space}mse": self.sums.mse,
            "l0": self.sums.l0,
            "l1": self.sums.l1,
        }

    def to_log_dict(self, labels: list[str]) -> dict[str, float]:
        """All values: `losses/...`, `metrics/...`, and `label/...` for each layer."""
        by_layer = self.by_layer()
        if len(self.sums.l0) != len(labels):
            labels = ["routed"]  # a routed SAE encodes one vector of each token
        return {
            **{f"losses/{name}": loss.item() for name, loss in self.losses.items()},
            **{f"metrics/{name}": v.mean().item() for name, v in by_layer.items()},
            **{
                f"{label}/{name}": v[i].item()
                for i, label in enumerate(labels)
                for name, v in by_layer.items()
            },
            **{f"metrics/{name}": _number(v) for name, v in self.metrics.items()},
        }


def _number(value: Any) -> float:
    value = value() if callable(value) else value
    return float(value)


def topk_gradients(
    sae: SparseTrainingSAE[Any],
    x: Float[Tensor, "token layer d_in"],
    dead_latents: Bool[Tensor, " d_sae"],
    micro_batch_size_tokens: int | None,
    ranks: Ranks = ALONE,
) -> StepStats:
    """Add the gradients of a batch by the sparse step of the SAE.

    Args:
        micro_batch_size_tokens: As in `MultiLayerConfig`.
        ranks: Each holds an equal share of the batch's tokens.
    """
    micro = micro_batch_size_tokens or block_rows(sae.cfg.d_sae, x.device.type)
    step = sae.accumulate_gradients(x, dead_latents, micro, ranks)
    return StepStats(
        LayerSums(step.moments, step.sum_sq_error, step.n_active, step.sum_acts),
        losses={
            "overall_loss": step.loss,
            "mse_loss": step.mse_loss,
            "auxiliary_reconstruction_loss": step.aux_loss,
        },
        fire_counts=step.fire_counts,
        max_acts=step.max_acts,
        metrics={"unproven_rows": step.n_unproven},
        is_in_lens_space=sae.lens is not None,
    )


@dataclass
class StockStep:
    """The training step of a stock SAELens architecture on a multi-layer batch."""

    sae: TrainingSAE[Any]
    coefficients: dict[str, float]
    n_training_steps: int
    is_logging_step: bool
    scaler: ActivationScaler
    """SAELens' scale of raw vectors; losses are computed on scaled vectors."""
    autocast: AbstractContextManager[Any]
    standardize_inputs: bool
    """Before the SAE instead of in it: its losses are of standardised vectors."""
    ranks: Ranks = ALONE
    """Each holds an equal share of the batch's tokens."""

    def gradients(
        self,
        x: Float[Tensor, "token layer d_in"],
        dead_latents: Bool[Tensor, " d_sae"],
        micro_batch_size_tokens: int | None,
    ) -> StepStats:
        """Add the gradients of a batch to the SAE's parameters, by autograd.

        Vectors of all layers are rows of one batch. Losses, and buffers such as the
        threshold of BatchTopK, are means over the micro-batches and ranks.
        """
        stats: StepStats | None = None
        for part in x.split(micro_batch_size_tokens or len(x)):
            share = len(part) / len(x)
            output, x_hat = self._forward(part.to(self.sae.dtype), dead_latents)
            (output.loss * share).backward()
            found = _stats_of_part(part, x_hat, output, share)
            stats = found if stats is None else _add_parts(stats, found)
        assert stats is not None
        return stats if self.ranks.is_alone else self._over_ranks(stats)

    def _over_ranks(self, stats: StepStats) -> StepStats:
        for parameter in self.sae.parameters():
            # Whether there is a gradient may depend on the vectors.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self.ranks.mean_(parameter.grad)
        self.ranks.mean_(*(b for b in self.sae.buffers() if b.is_floating_point()))
        self.ranks.mean_(*stats.losses.values())
        self.ranks.sum_(stats.fire_counts)
        self.ranks.max_(stats.max_acts)
        return replace(stats, sums=stats.sums.over_ranks(self.ranks))

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
    """Turn off a layer-norm SAE's own norm, as its inputs are already standardised."""
    if not active:
        yield
        return
    names = ("run_time_activation_norm_fn_in", "run_time_activation_norm_fn_out")
    saved = {name: getattr(sae, name) for name in names}
    normalize = sae.cfg.normalize_activations
    sae.cfg.normalize_activations = "none"
    for name in names:
        setattr(sae, name, _identity)
    try:
        yield
    finally:
        sae.cfg.normalize_activations = normalize
        for name, function in saved.items():
            setattr(sae, name, function)


def _identity(x: Tensor) -> Tensor:
    return x


@torch.no_grad()
def _stats_of_part(
    x: Float[Tensor, "token layer d_in"],
    x_hat: Float[Tensor, "token layer d_in"],
    output: TrainStepOutput,
    share: float,
) -> StepStats:
    """The stats of a micro-batch; its losses are multiplied by its share."""
    dtype = wide_dtype(x.dtype)
    acts = output.feature_acts.detach()
    acts = (acts.to_dense() if acts.is_sparse else acts).to(dtype)
    by_layer = acts.view(*x.shape[:2], -1)
    x = x.to(dtype)
    losses = {"overall_loss": output.loss, **output.losses}
    return StepStats(
        LayerSums(
            LayerMoments.of(x),
            sum_sq_error=(x_hat.to(dtype) - x).square().sum((0, 2)),
            n_active=(by_layer != 0).sum((0, 2)),
            sum_acts=by_layer.abs().sum((0, 2)),
        ),
        losses={name: loss.detach() * share for name, loss in losses.items()},
        fire_counts=(acts != 0).sum(0),
        max_acts=acts.abs().amax(0),
        metrics=output.metrics,
    )


def _add_parts(a: StepStats, b: StepStats) -> StepStats:
    return StepStats(
        a.sums + b.sums,
        losses={name: loss + b.losses[name] for name, loss in a.losses.items()},
        fire_counts=a.fire_counts + b.fire_counts,
        max_acts=torch.maximum(a.max_acts, b.max_acts),
        metrics=b.metrics,
    )
