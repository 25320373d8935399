"""Lenses in closed form of the vectors that a run trains on."""

from collections.abc import Generator
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.config import HfDataset
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_multilayer.config import MultiLayerConfig
from sae_lens_multilayer.lens.closed_form import fit_closed_form
from sae_lens_multilayer.lens.config import LensConfig, LensKind
from sae_lens_multilayer.lens.lens import LayerLens
from sae_lens_multilayer.models import loading
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.store.cache import ActivationCache, vector_settings
from sae_lens_multilayer.store.source import CacheSource, ModelSource, Source
from sae_lens_multilayer.training.run import hooks_of_run


def fit_lens(
    cfg: MultiLayerConfig[Any],
    kind: LensKind,
    n_tokens: int = 65_536,
    *,
    shrinkage: float = 0.0,
    override_model: Any | None = None,
    override_dataset: HfDataset | None = None,
) -> LayerLens:
    """Fit a lens in closed form to the first vectors that a training run reads.

    They come from the run's cache or else from its model and text, in one pass. For
    other kinds, see `fit_tuned_lens` and `fit_jacobian_lens`.

    Args:
        cfg: The run: its model, hooks and text, or its cache.
        kind: "procrustes" (rotation, scale and shift to the last hook),
            "least_squares" (any affine map to the last hook) or "whitening".
        n_tokens: Tokens to read, in whole batches; more than `d_in`.
        shrinkage: See `fit_closed_form`.
        override_model: Used instead of `cfg.model_name`.
        override_dataset: Used instead of `cfg.dataset_path`.
    """
    model = override_model
    if cfg.use_cached_activations:
        assert cfg.cached_activations_path is not None  # checked by the config
        cache = ActivationCache(cfg.cached_activations_path)
        shape, unembed_hash = cache.model_shape, None
        hook_names = hooks_of_run(cfg, shape)
        cache.check(vector_settings(cfg), hook_names)
        source: Source = CacheSource.from_config(cache, hook_names, cfg)
    else:
        if model is None:
            model = loading.load_by_name(*cfg.named_model, cfg.llm_device)
        lm = as_model(model)
        shape, unembed_hash = lm.shape, lm.unembedding_hash()
        hook_names = hooks_of_run(cfg, shape)
        source = ModelSource.from_config(model, hook_names, cfg, override_dataset)
    config = LensConfig(
        hook_names,
        shape.n_layers,
        d_in=source.d_in,
        base_model_name=cfg.model_name,
        unembed_hash=unembed_hash,
        kind=kind,
    )
    return fit_closed_form(_first_vectors(source, n_tokens), config, shrinkage)


def _first_vectors(
    source: Source, n_tokens: int
) -> Generator[Float[Tensor, "token layer d_in"]]:
    with tqdm(total=n_tokens, desc="Vectors for the lens", unit="token") as bar:
        while bar.n < n_tokens and not source.epoch_ended:
            chunk = source.next_chunk()
            if chunk is None:
                break
            # A generator whose vectors may be overwritten by the next ones.
            x = torch.stack([x.clone() for x in source.vectors(chunk)], 1)
            bar.update(len(x))
            yield x
