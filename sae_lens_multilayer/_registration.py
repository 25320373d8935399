"""The only place that writes to SAELens: its registries, one method of its runner."""

import functools
import warnings
from typing import Any

from sae_lens import LanguageModelSAETrainingRunner
from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_class,
    register_sae_training_class,
)

from sae_lens_multilayer.config import MultiLayerConfig
from sae_lens_multilayer.sae import MultiLayerSAE, MultiLayerTrainingSAE
from sae_lens_multilayer.sae_config import (
    ARCHITECTURE,
    MultiLayerSAEConfig,
    MultiLayerTrainingSAEConfig,
)
from sae_lens_multilayer.training import MultiLayerSAETrainingRunner

_MARK = "_sae_lens_multilayer"


def register() -> None:
    """Make SAELens know the multi-layer SAE and run multi-layer configs.

    Calling it again changes nothing. After this package is imported anew, its new
    classes take the place of the old ones.

    Raises:
        RuntimeError: If another package has registered our architecture's name.
    """
    # A training config looks its inference class up when it is built.
    _register_once(
        SAE_CLASS_REGISTRY, register_sae_class, MultiLayerSAE, MultiLayerSAEConfig
    )
    _register_once(
        SAE_TRAINING_CLASS_REGISTRY,
        register_sae_training_class,
        MultiLayerTrainingSAE,
        MultiLayerTrainingSAEConfig,
    )
    _patch_runner()


def _register_once(
    registry: dict[str, Any], register_class: Any, sae_class: Any, config_class: Any
) -> None:
    present = registry.get(ARCHITECTURE)
    if present is None:
        register_class(ARCHITECTURE, sae_class, config_class)
    elif present[0].__module__ == sae_class.__module__:
        registry[ARCHITECTURE] = (sae_class, config_class)
    else:
        raise RuntimeError(
            f"The SAELens architecture {ARCHITECTURE!r} must be free for "
            f"sae_lens_multilayer; {present[0].__module__}.{present[0].__qualname__} "
            "is registered under it. Import only one of the two packages."
        )


def _patch_runner() -> None:
    """Let SAELens' runner become ours when it is given a `MultiLayerConfig`.

    SAELens has no registry of runners. Its constructor is the one place that every way
    of starting a run passes through: both runner classes, users' subclasses and the
    command line, whichever package was imported first.
    """
    original = LanguageModelSAETrainingRunner.__init__
    if getattr(original, _MARK, None) is MultiLayerConfig:
        return
    if hasattr(original, _MARK):
        # This package was loaded before; that patch knows the old config class only.
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
    """The caller's runner class with our runner beneath it, so its overrides win."""
    if issubclass(MultiLayerSAETrainingRunner, runner):
        return MultiLayerSAETrainingRunner
    with warnings.catch_warnings():
        # Subclassing the deprecated SAETrainingRunner warns; calling it did already.
        warnings.simplefilter("ignore", DeprecationWarning)
        return type(runner.__name__, (runner, MultiLayerSAETrainingRunner), {})
