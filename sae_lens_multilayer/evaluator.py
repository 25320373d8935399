"""The evaluation that runs during training, at SAELens' cadence."""

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.prefetch import PrefetchingIterator
from sae_lens.training.types import DataProvider

from sae_lens_multilayer.activations import MultiLayerActivationsStore
from sae_lens_multilayer.evaluation import evaluate
from sae_lens_multilayer.lens_carrier import lens_of

logger = logging.getLogger(__name__)

_LOGGED_IN_TRAINING = ("fvu", "mse", "l0", "l1")


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
        # The evaluation reads the store itself, which a prefetching thread must not.
        prefetches = isinstance(data_provider, PrefetchingIterator)
        with data_provider.paused() if prefetches else nullcontext():
            tokens = torch.cat(
                [
                    self.store.get_batch_tokens(self.batch_size_prompts)
                    for _ in range(self.n_batches)
                ]
            )
            excluded = self.store.exclude_special_tokens
            metrics = evaluate(
                sae,
                self.model,
                tokens,
                batch_size_prompts=self.batch_size_prompts,
                exclude_tokens=() if excluded is None else excluded.tolist(),
            )
        logged = _LOGGED_IN_TRAINING
        if lens_of(sae) is not None:
            # The batches' errors are in the space of the lens.
            logged = ("l0", "l1")
        values = metrics.to_log_dict()
        values |= {f"metrics/{name}": float(v) for name, v in metrics.mean().items()}
        return {
            name: value
            for name, value in values.items()
            if name.split("/")[1] not in logged
        }
