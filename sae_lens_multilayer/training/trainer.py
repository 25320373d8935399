"""The training loop: steps, counters in tokens, logs and checkpoints."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sae_lens import TrainingSAE
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.sae_trainer import SAETrainer
from sae_lens.training.types import DataProvider
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import override

from sae_lens_multilayer.config import MultiLayerTrainerConfig
from sae_lens_multilayer.hooks import layer_labels
from sae_lens_multilayer.ranks import ALONE, Ranks, bits_of
from sae_lens_multilayer.sae.sparse_training import SparseTrainingSAE
from sae_lens_multilayer.topk.update import update_weights
from sae_lens_multilayer.training import checkpoint as checkpoints
from sae_lens_multilayer.training.checkpoint import check_finite, not_finite
from sae_lens_multilayer.training.geometric_median import median_of_inputs
from sae_lens_multilayer.training.memory import keep_freed_memory
from sae_lens_multilayer.training.scale import (
    estimate_scale,
    fold_scale,
    needs_estimate,
)
from sae_lens_multilayer.training.steps import StepStats, StockStep, topk_gradients

logger = logging.getLogger(__name__)


class MultiLayerTrainer(SAETrainer[TrainingSAE[Any], Any]):
    """SAELens' trainer for batches `[token, layer, d_in]`.

    It counts tokens where the host counts rows. A `SparseTrainingSAE` is trained by the
    sparse step, a stock SAE by its own `training_forward_pass`.
    """

    cfg: MultiLayerTrainerConfig
    tokens_since_fired: Tensor
    """Tokens since a latent last fired on any layer, [d_sae]."""
    stop_requested: bool = False
    """Set from outside to end training after the current step."""
    has_open_batch: bool = False
    """Whether a batch has been taken that is not yet trained on."""
    is_whole: bool = True
    """Whether weights, optimiser and counters are those after a whole step."""

    def __init__(
        self,
        cfg: MultiLayerTrainerConfig,
        sae: TrainingSAE[Any],
        data_provider: DataProvider,
        evaluator: Callable[..., dict[str, Any]] | None = None,
        save_checkpoint_fn: Any = None,
        *,
        initialize_b_dec: bool = True,
        ranks: Ranks = ALONE,
        before_checkpoint: Callable[[], None] | None = None,
    ) -> None:
        """Create the optimiser and the counters.

        Args:
            data_provider: Gives this rank's share of batches `[token, layer, d_in]`.
            save_checkpoint_fn: Writes the rest of a checkpoint into its folder.
            initialize_b_dec: Set `b_dec` of a multi-layer SAE to the geometric median
                of the first batch.
            before_checkpoint: Called on all ranks before the first writes a checkpoint.
        """
        self.ranks = ranks
        self._before_checkpoint = before_checkpoint
        super().__init__(cfg, sae, data_provider, evaluator, save_checkpoint_fn)
        is_sparse = isinstance(sae, SparseTrainingSAE)
        self._initialize_b_dec = initialize_b_dec and is_sparse
        for group in self.optimizer.param_groups:
            group.update(eps=cfg.adam_eps, fused=True)
        self.tokens_since_fired = torch.zeros(
            sae.cfg.d_sae, dtype=torch.int64, device=cfg.device
        )

    @property
    def dead_neurons(self) -> Tensor:
        """Which latents are dead, [d_sae] bool."""
        if isinstance(self.sae, SparseTrainingSAE):
            return self.tokens_since_fired >= self.sae.cfg.dead_after_tokens
        # The host: more than `dead_feature_window` steps.
        n_steps = self.cfg.dead_feature_window + 1
        return self.tokens_since_fired >= n_steps * self.cfg.train_batch_size_samples

    @override
    def fit(self) -> TrainingSAE[Any]:
        """Train on `total_training_samples` tokens, unless `stop_requested` is set."""
        keep_freed_memory()
        self.sae.to(self.cfg.device)
        self._check_replicas()
        self._estimate_scale()
        # Not `disable=False`, which would win over TQDM_DISABLE.
        only_first: dict[str, Any] = {} if self.ranks.is_first else {"disable": True}
        with tqdm(
            **only_first,
            total=self.cfg.total_training_samples,
            initial=self.n_training_samples,
            desc="Training SAE",
            unit="tok",
        ) as progress:
            while self.n_training_samples < self.cfg.total_training_samples:
                self._fit_batch(progress)
        check_finite(self.sae.state_dict())
        self.is_whole = False
        # The last sparsity window is not reset, so it has not been logged yet.
        if self.cfg.logger.log_to_wandb:
            self._log(self.full_sparsity_window_log())
        fold_scale(self.activation_scaler, self.sae)
        self.set_final_sae_metadata()
        if self.cfg.save_final_checkpoint:
            self.save_or_report(f"final_{self.n_training_samples}")
        return self.sae

    def _check_replicas(self) -> None:
        if not self.ranks.is_alone:
            self.ranks.check_same("The SAE", bits_of(self.sae.state_dict()))

    def _fit_batch(self, progress: Any) -> None:
        with self.ranks.together():
            self._log(self.maybe_reset_sparsity())
            self.has_open_batch = True
            batch = next(self.data_provider)
        stats = self.step(batch)
        self.has_open_batch = False
        try:
            with self.ranks.together():
                if self._is_logging_step():
                    tokens = self.n_training_samples
                    self._log(self.build_train_step_log_dict(stats, tokens))
                if self.cfg.logger.log_to_wandb:
                    self._run_and_log_evals()
        finally:
            # The step is done even if logging fails.
            self.n_training_steps += 1
        progress.update(stats.n_tokens)
        progress.set_postfix(
            loss=f"{stats.losses['overall_loss'].item():.4f}",
            fvu=f"{stats.sums.fvu.mean().item():.4f}",
            dead=f"{self.dead_neurons.float().mean().item():.1%}",
        )
        self._checkpoint_if_needed()
        if self.ranks.any(self.stop_requested):
            raise InterruptedException()

    @override
    def maybe_reset_sparsity(self) -> dict[str, Any]:
        """Start a new sparsity window if one is full; returns its values to log."""
        if self.cfg.logger.log_to_wandb:
            return super().maybe_reset_sparsity()
        # The host draws a W&B histogram even if nothing is logged.
        steps, window = self.n_training_steps, self.cfg.feature_sampling_window
        if steps > 0 and steps % window == 0:
            self._reset_running_sparsity_stats()
        return {}

    def _log(self, values: dict[str, Any]) -> None:
        if values and self.cfg.logger.log_to_wandb:
            import wandb

            wandb.log(values, step=self.n_training_steps)

    @override
    def step(self, batch: Tensor) -> StepStats:  # type: ignore[override]
        """Train on a raw batch `[token, layer, d_in]`; raise before a bad update."""
        batch = batch.to(self.sae.device)
        starts_b_dec = self.n_training_steps == 0 and self._initialize_b_dec
        if starts_b_dec:
            assert isinstance(self.sae, SparseTrainingSAE)
            self.sae.b_dec.data.copy_(median_of_inputs(self.sae, batch, self.ranks))
        self.sae.train()
        stats = self._gradients(batch)
        try:
            self._check_gradients(stats)
        except FloatingPointError:
            self.optimizer.zero_grad()
            if starts_b_dec:
                self.sae.b_dec.data.zero_()
            raise
        self.is_whole = False
        self._update_weights()
        self._count(stats)
        self.is_whole = True
        return stats

    def _check_gradients(self, stats: StepStats) -> None:
        loss = stats.losses["overall_loss"]
        gradients = {name: p.grad for name, p in self.sae.named_parameters()}
        if not (bad := not_finite({"loss": loss, **gradients})):
            return
        advice = "Lower `lr` or look at the data."
        if constant := stats.constant_layers():
            names = [self.cfg.hook_names[layer] for layer in constant]
            advice = f"All vectors of the batch are the same at {names}."
        raise FloatingPointError(
            f"The loss and its gradient must be finite; those of {bad} are not, and "
            f"the loss is {loss.item()} at step {self.n_training_steps} (token "
            f"{self.n_training_samples}). The weights are those before this batch. "
            + advice
        )

    def _gradients(self, batch: Tensor) -> StepStats:
        micro = self.cfg.micro_batch_size_tokens
        if isinstance(self.sae, SparseTrainingSAE):
            return topk_gradients(self.sae, batch, self.dead_neurons, micro, self.ranks)
        step = StockStep(
            sae=self.sae,
            coefficients=self.get_coefficients(),
            n_training_steps=self.n_training_steps,
            is_logging_step=self._is_logging_step(),
            scaler=self.activation_scaler,
            autocast=self.autocast_if_enabled,
            standardize_inputs=self.cfg.standardize_stock_inputs,
            ranks=self.ranks,
        )
        return step.gradients(batch, self.dead_neurons, micro)

    def _update_weights(self) -> None:
        if self.cfg.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(
                self.sae.parameters(), self.cfg.max_grad_norm
            )
        if isinstance(self.sae, SparseTrainingSAE):
            update_weights(self.optimizer, self.sae.W_enc, self.sae.W_dec)
        else:
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()

    def _count(self, stats: StepStats) -> None:
        threshold = getattr(self.sae.cfg, "dead_latent_threshold", 0.0)
        self.tokens_since_fired += stats.n_tokens
        self.tokens_since_fired[stats.max_acts > threshold] = 0
        self.act_freq_scores += stats.fire_counts
        # A routed SAE encodes one vector of each token.
        self.n_frac_active_samples += stats.n_tokens * len(stats.sums.n_active)
        self.n_training_samples += stats.n_tokens

    @override
    def build_train_step_log_dict(  # type: ignore[override]
        self, output: StepStats, n_training_samples: int
    ) -> dict[str, Any]:
        """The values logged for a step: the host's keys, and `layer_{l}/...`."""
        coefficients = self.get_coefficients()
        n_dead = self.dead_neurons.sum().item()
        return {
            **output.to_log_dict(layer_labels(self.cfg.hook_names)),
            **{f"details/{name}_coefficient": v for name, v in coefficients.items()},
            "sparsity/dead_features": n_dead,
            "sparsity/dead_fraction": n_dead / self.sae.cfg.d_sae,
            "details/current_learning_rate": self.optimizer.param_groups[0]["lr"],
            "details/n_training_samples": n_training_samples,
        }

    @property
    def estimates_scale(self) -> bool:
        """Whether `fit` starts by taking batches to estimate the scale."""
        is_over = self.n_training_samples >= self.cfg.total_training_samples
        normalization = self.sae.cfg.normalize_activations
        return not is_over and needs_estimate(self.activation_scaler, normalization)

    def _estimate_scale(self) -> None:
        if self.estimates_scale:
            n_batches = self.cfg.n_batches_for_norm_estimate
            scaler, batches = self.activation_scaler, self.data_provider
            estimate_scale(scaler, self.sae, batches, n_batches, self.ranks)

    @override
    def _checkpoint_if_needed(self) -> None:
        thresholds = self.checkpoint_thresholds
        if thresholds and self.n_training_samples > thresholds[0]:
            thresholds.pop(0)
            self.save_or_report(str(self.n_training_samples))

    def save_or_report(self, checkpoint_name: str) -> bool:
        """Write a checkpoint, or log the error and return False if that fails."""
        self._agree_before_checkpoint()
        with self.ranks.together():
            return not self.ranks.is_first or self._write_or_report(checkpoint_name)

    def _agree_before_checkpoint(self) -> None:
        self._check_replicas()
        if self._before_checkpoint is not None:
            self._before_checkpoint()

    def _write_or_report(self, checkpoint_name: str) -> bool:
        try:
            self._write_checkpoint(checkpoint_name)
        except (OSError, SafetensorError, FloatingPointError) as error:
            logger.error(
                "The checkpoint %s/%s could not be saved: %s. Earlier checkpoints are "
                "unchanged, and the run continues.",
                self.cfg.checkpoint_path,
                checkpoint_name,
                error,
            )
            return False
        return True

    @override
    def save_checkpoint(
        self,
        checkpoint_name: str,
        base_path: Path | str | None = None,
        wandb_aliases: list[str] | None = None,
    ) -> None:
        """Write a checkpoint that is complete or not there; the first rank writes."""
        self._agree_before_checkpoint()
        with self.ranks.together():
            if self.ranks.is_first:
                self._write_checkpoint(checkpoint_name, base_path, wandb_aliases)

    def _write_checkpoint(
        self,
        checkpoint_name: str,
        base_path: Path | str | None = None,
        wandb_aliases: list[str] | None = None,
    ) -> None:
        base = base_path if base_path is not None else self.cfg.checkpoint_path
        if base is None:
            super().save_checkpoint(checkpoint_name, None, wandb_aliases)
            return
        path, n_kept = Path(base) / checkpoint_name, self.cfg.keep_last_n_checkpoints
        checkpoints.write_checkpoint(self, path, n_kept, wandb_aliases)

    @override
    def save_trainer_state(self, checkpoint_path: Path) -> None:
        """Write optimiser, counters and random states, without pickle."""
        checkpoints.write_trainer_state(self, checkpoint_path)

    @override
    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        """Load a saved state; rates and schedules are the config's."""
        checkpoints.load_trainer_state(self, Path(checkpoint_path))
        self.checkpoint_thresholds = [
            n for n in self.checkpoint_thresholds if n > self.n_training_samples
        ]
