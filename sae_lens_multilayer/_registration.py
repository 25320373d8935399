"""Registers this package with SAELens and patches one method of its runner."""

import functools
import warnings
from dataclasses import fields
from typing import Any

from sae_lens import LanguageModelSAETrainingRunner
from sae_lens.loading.pretrained_sae_loaders import (
    NAMED_PRETRAINED_SAE_CONFIG_GETTERS,
    NAMED_PRETRAINED_SAE_LOADERS,
)
from sae_lens.loading.pretrained_saes_directory import (
    PretrainedSAELookup,
    get_pretrained_saes_directory,
)
from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_class,
    register_sae_training_class,
)

from sae_lens_multilayer.config import MultiLayerConfig
from sae_lens_multilayer.published.loader import (
    LOADER_NAME,
    get_mlsae_config_from_hf,
    mlsae_huggingface_loader,
)
from sae_lens_multilayer.published.releases import directory_entries
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
from sae_lens_multilayer.training.runner import MultiLayerSAETrainingRunner

_MARK = "_sae_lens_multilayer"
_CLASSES: list[tuple[type, type]] = [
    (MultiLayerSAE, MultiLayerSAEConfig),
    (CrosscoderSAE, CrosscoderSAEConfig),
    (RoutedSAE, RoutedSAEConfig),
]
_TRAINING_CLASSES: list[tuple[type, type]] = [
    (MultiLayerTrainingSAE, MultiLayerTrainingSAEConfig),
    (CrosscoderTrainingSAE, CrosscoderTrainingSAEConfig),
    (RoutedTrainingSAE, RoutedTrainingSAEConfig),
]


def register() -> None:
    """Register our SAEs, the published checkpoints and the runner.

    Calling it again has no effect, except after a reload of this package.
    """
    # A training config looks up its inference class when it is created.
    for sae_class, config_class in _CLASSES:
        _register_once(SAE_CLASS_REGISTRY, register_sae_class, sae_class, config_class)
    for sae_class, config_class in _TRAINING_CLASSES:
        _register_once(
            SAE_TRAINING_CLASS_REGISTRY,
            register_sae_training_class,
            sae_class,
            config_class,
        )
    _register_releases()
    _patch_runner()


def _register_releases() -> None:
    """Add the published checkpoints to the directory of `SAE.from_pretrained`."""
    NAMED_PRETRAINED_SAE_LOADERS[LOADER_NAME] = mlsae_huggingface_loader
    NAMED_PRETRAINED_SAE_CONFIG_GETTERS[LOADER_NAME] = get_mlsae_config_from_hf
    directory = get_pretrained_saes_directory()
    for release, entry in directory_entries().items():
        present = directory.get(release)
        # If SAELens lists a release itself, its entry is kept.
        if present is None or present.conversion_func == LOADER_NAME:
            directory[release] = _lookup(entry)


def _lookup(entry: dict[str, Any]) -> PretrainedSAELookup:
    entry = {
        **entry,
        "conversion_func": LOADER_NAME,
        # SAELens' value where nothing was measured.
        "expected_var_explained": dict.fromkeys(entry["saes_map"], 1.0),
        "neuronpedia_id": {},
        "norm_scaling_factor": {},
    }
    # The other fields differ between versions of SAELens.
    values: dict[str, Any] = {
        field.name: entry.get(field.name) for field in fields(PretrainedSAELookup)
    }
    return PretrainedSAELookup(**values)


def _register_once(
    registry: dict[str, Any], register_class: Any, sae_class: Any, config_class: Any
) -> None:
    name = config_class.architecture()
    present = registry.get(name)
    if present is not None and present[0].__module__ == sae_class.__module__:
        del registry[name]
    register_class(name, sae_class, config_class)


def _patch_runner() -> None:
    """Make SAELens' runner use our class when it receives a `MultiLayerConfig`.

    SAELens has no registry of runners. Every way to start a run calls this constructor:
    both runner classes, users' subclasses and the command line, in any import order.
    """
    original = LanguageModelSAETrainingRunner.__init__
    if getattr(original, _MARK, None) is MultiLayerConfig:
        return
    if hasattr(original, _MARK):
        # Patched by this package before it was reloaded, for the old config class.
        original = original.__wrapped__  # type: ignore[attr-defined]

    @functools.wraps(original)
    def init(self: Any, cfg: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(cfg, MultiLayerConfig):
            original(self, cfg, *args, **kwargs)
            return
        if not isinstance(self, MultiLayerSAETrainingRunner):
            self.__class__ = _multi_layer_runner(type(self))
        MultiLayerSAETrainingRunner.__init__(self, cfg, *args, **kwargs)

    setattr(init, _MARK, MultiLayerConfig)
    LanguageModelSAETrainingRunner.__init__ = init


@functools.cache
def _multi_layer_runner(runner: type) -> type[MultiLayerSAETrainingRunner]:
    """A class with the overrides of the caller's runner class on top of our runner."""
    if issubclass(MultiLayerSAETrainingRunner, runner):
        return MultiLayerSAETrainingRunner
    with warnings.catch_warnings():
        # Subclassing the deprecated SAETrainingRunner would repeat its warning.
        warnings.simplefilter("ignore", DeprecationWarning)
        return type(runner.__name__, (runner, MultiLayerSAETrainingRunner), {})
