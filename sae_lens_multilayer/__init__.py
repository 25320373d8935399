"""Multi-layer sparse autoencoders for SAELens: one SAE, tied across all layers."""

from sae_lens_multilayer._registration import register
from sae_lens_multilayer.config import MultiLayerConfig
from sae_lens_multilayer.evaluation.evaluation import evaluate, reconstruction_metrics
from sae_lens_multilayer.evaluation.metrics import LayerMetrics, SpliceMetrics
from sae_lens_multilayer.lens.config import LensConfig
from sae_lens_multilayer.lens.fit import fit_tuned_lens, lens_kl, new_tuned_lens
from sae_lens_multilayer.lens.jacobian import fit_jacobian_lens
from sae_lens_multilayer.lens.lens import LayerLens
from sae_lens_multilayer.published.loader import (
    mlsae_disk_loader,
    mlsae_huggingface_loader,
)
from sae_lens_multilayer.published.releases import releases
from sae_lens_multilayer.sae.config import (
    CrosscoderSAEConfig,
    CrosscoderTrainingSAEConfig,
    MultiLayerSAEConfig,
    MultiLayerTrainingSAEConfig,
    RoutedSAEConfig,
    RoutedTrainingSAEConfig,
)
from sae_lens_multilayer.sae.crosscoder import CrosscoderSAE, CrosscoderTrainingSAE
from sae_lens_multilayer.sae.multi_layer_sae import MultiLayerSAE, MultiLayerTrainingSAE
from sae_lens_multilayer.sae.routed import RoutedSAE, RoutedTrainingSAE
from sae_lens_multilayer.sae.views import view, views
from sae_lens_multilayer.store.cache import ActivationCache
from sae_lens_multilayer.store.harvest import MultiLayerCacheActivationsRunner
from sae_lens_multilayer.store.source import NonFiniteActivationError
from sae_lens_multilayer.store.store import MultiLayerActivationsStore
from sae_lens_multilayer.sweeps.evaluation import SweepEvaluation
from sae_lens_multilayer.sweeps.points import grid
from sae_lens_multilayer.sweeps.resumable import PointsFailedError
from sae_lens_multilayer.sweeps.sweep import sweep
from sae_lens_multilayer.text.prompts import Prompts, Text
from sae_lens_multilayer.training.fit_lens import fit_lens
from sae_lens_multilayer.training.runner import MultiLayerSAETrainingRunner

__version__ = "0.1.0.dev0"

__all__ = [
    "ActivationCache",
    "CrosscoderSAE",
    "CrosscoderSAEConfig",
    "CrosscoderTrainingSAE",
    "CrosscoderTrainingSAEConfig",
    "LayerLens",
    "LayerMetrics",
    "LensConfig",
    "MultiLayerActivationsStore",
    "MultiLayerCacheActivationsRunner",
    "MultiLayerConfig",
    "MultiLayerSAE",
    "MultiLayerSAEConfig",
    "MultiLayerSAETrainingRunner",
    "MultiLayerTrainingSAE",
    "MultiLayerTrainingSAEConfig",
    "NonFiniteActivationError",
    "PointsFailedError",
    "Prompts",
    "RoutedSAE",
    "RoutedSAEConfig",
    "RoutedTrainingSAE",
    "RoutedTrainingSAEConfig",
    "SpliceMetrics",
    "SweepEvaluation",
    "Text",
    "evaluate",
    "fit_jacobian_lens",
    "fit_lens",
    "fit_tuned_lens",
    "grid",
    "lens_kl",
    "mlsae_disk_loader",
    "mlsae_huggingface_loader",
    "new_tuned_lens",
    "reconstruction_metrics",
    "releases",
    "sweep",
    "view",
    "views",
]

register()
