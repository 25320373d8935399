"""The cache of a training run, and whether the run needs a model beside it."""

import logging
import math
from typing import Any

from sae_lens_multilayer.config import MultiLayerConfig
from sae_lens_multilayer.ranks import Ranks
from sae_lens_multilayer.store.cache import ActivationCache
from sae_lens_multilayer.training.evaluator import steps_between_evaluations

logger = logging.getLogger(__name__)


def cache_of_run(cfg: MultiLayerConfig[Any], ranks: Ranks) -> ActivationCache | None:
    """Open and check the cache that a run trains on; None if it trains on a model.

    The first rank warns of one that is smaller than the run.

    Raises:
        FileNotFoundError: If there is none at the path.
        ValueError: If it is not whole, or not what the run needs.
    """
    if not cfg.use_cached_activations:
        return None
    assert cfg.cached_activations_path is not None  # checked by the config
    cache = ActivationCache(cfg.cached_activations_path)
    cache.check(cfg)
    if cfg.training_tokens > cache.n_tokens and ranks.is_first:
        logger.warning(
            "The run takes %d tokens and the cache at %s has %d: %.2f epochs, so some "
            "tokens are used more than once.",
            cfg.training_tokens,
            cache.path,
            cache.n_tokens,
            cfg.training_tokens / cache.n_tokens,
        )
    return cache


def evaluates(cfg: MultiLayerConfig[Any]) -> bool:
    """Whether an evaluation, which needs a model, comes in a run."""
    every = steps_between_evaluations(cfg.logger)
    n_steps = math.ceil(cfg.training_tokens / cfg.train_batch_size_tokens)
    return every is not None and n_steps >= every
