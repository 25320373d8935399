"""Estimates SAELens' scale or whitening of inputs, and folds it into the weights."""

from collections.abc import Iterable
from typing import Any

import torch
from sae_lens import TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor

from sae_lens_multilayer.ranks import Ranks


def needs_estimate(scaler: ActivationScaler, normalize_activations: str) -> bool:
    """Whether batches are needed to estimate the scale."""
    if normalize_activations == "expected_average_only_in":
        return scaler.scaling_factor is None
    return normalize_activations == "covariance_whitening" and scaler.whitening is None


def estimate_scale(
    scaler: ActivationScaler,
    sae: TrainingSAE[Any],
    batches: Iterable[Tensor],
    n_batches: int,
    ranks: Ranks,
) -> None:
    """Estimate the scale from the next batches `[token, layer, d_in]`."""
    rows = (batch.flatten(0, 1) for batch in batches)
    with ranks.together():
        if sae.cfg.normalize_activations == "covariance_whitening":
            scaler.estimate_whitening(sae.cfg.d_in, rows, n_batches)
        else:
            scaler.estimate_scaling_factor(sae.cfg.d_in, rows, n_batches)
    if scaler.scaling_factor is not None and not ranks.is_alone:
        # The factor is inversely proportional to the mean norm: average its inverse.
        inverse = torch.tensor(1 / scaler.scaling_factor, device=sae.device)
        ranks.mean_(inverse)
        scaler.scaling_factor = 1 / inverse.item()


def fold_scale(scaler: ActivationScaler, sae: TrainingSAE[Any]) -> None:
    """Fold the scale into the weights, so that the SAE receives raw vectors."""
    if scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
        scaler.scaling_factor = None
    if scaler.whitening is not None:
        sae.fold_activation_whitening(
            mean=scaler.whitening.mean,
            whitening_matrix=scaler.whitening.matrix,
            unwhitening_matrix=scaler.whitening.inverse_matrix,
        )
        scaler.whitening = None
