"""The evaluation that runs during training, at SAELens' cadence."""

import logging
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from sae_lens import LoggingConfig, TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.types import DataProvider
from torch import Tensor

from sae_lens_multilayer.evaluation.evaluation import evaluate
from sae_lens_multilayer.evaluation.metrics import SpliceMetrics
from sae_lens_multilayer.lens.carrier import lens_of
from sae_lens_multilayer.store.store import MultiLayerActivationsStore
from sae_lens_multilayer.text.prompts import mark_counted
from sae_lens_multilayer.training.batches import RunBatches

logger = logging.getLogger(__name__)


def steps_between_evaluations(log: LoggingConfig) -> int | None:
    """At SAELens' cadence; None: a run with these settings does not evaluate."""
    if not log.log_to_wandb:
        return None
    return log.wandb_log_frequency * log.eval_every_n_wandb_logs


@dataclass
class MultiLayerEvaluator:
    """Splices each layer on the next tokens of the dataset, which are not trained on.

    The same call as SAELens' own evaluator of a training run.
    """

    model: Any
    store: MultiLayerActivationsStore
    n_batches: int
    """Batches of prompts in an evaluation."""
    batch_size_prompts: int
    """Prompts in a forward pass."""

    def __call__(
        self,
        sae: TrainingSAE[Any],
        data_provider: DataProvider,
        activation_scaler: ActivationScaler,
    ) -> dict[str, Any]:
        """Flat metrics: `layer_{l}/...`, and `metrics/...` for means over layers.

        As in SAELens, without those that are logged from the training batches.
        """
        if activation_scaler.scaling_factor or activation_scaler.whitening:
            logger.warning(
                "No evaluation: the SAE takes scaled activations until it is trained."
            )
            return {}
        if self.model is None:
            return {}
        if isinstance(data_provider, RunBatches) and data_provider.prompts is not None:
            with data_provider.paused():
                metrics = self._evaluate(sae, data_provider.prompts)
        elif (prompts := self.draw_prompts()) is not None:
            metrics = self._evaluate(sae, prompts)
        else:
            return {}
        # With a lens, the batches' errors are in its space.
        has_lens = lens_of(sae) is not None
        logged = ("l0", "l1") if has_lens else ("fvu", "mse", "l0", "l1")
        values = metrics.to_log_dict()
        values |= {f"metrics/{name}": float(v) for name, v in metrics.mean().items()}
        return {
            name: value
            for name, value in values.items()
            if name.split("/")[1] not in logged
        }

    def draw_prompts(self) -> Int[Tensor, "prompt pos"] | None:
        """Take the prompts of an evaluation; None: the store's source has no text."""
        n_prompts = self.n_batches * self.batch_size_prompts
        return self.store.source.evaluation_prompts(n_prompts)

    def _evaluate(
        self, sae: TrainingSAE[Any], tokens: Int[Tensor, "prompt pos"]
    ) -> SpliceMetrics:
        prompts = mark_counted(self.store, tokens)
        return evaluate(
            sae, self.model, prompts, batch_size_prompts=self.batch_size_prompts
        )
