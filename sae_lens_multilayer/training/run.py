"""The start of a training run: every check, once, and a description of the run."""

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sae_lens import TrainingSAE
from sae_lens.util import temporary_seed

from sae_lens_multilayer.config import LATEST, MultiLayerConfig
from sae_lens_multilayer.files import (
    check_writable,
    remove_leftovers,
)
from sae_lens_multilayer.lens.carrier import LensCarrier
from sae_lens_multilayer.lens.lens import LayerLens
from sae_lens_multilayer.models import loading
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.models.model import ModelShape, check_widths
from sae_lens_multilayer.ranks import Ranks, own_device, ranks_of_environment
from sae_lens_multilayer.record import Record, model_fingerprints
from sae_lens_multilayer.store.cache import ActivationCache, vector_settings
from sae_lens_multilayer.store.source import Source
from sae_lens_multilayer.training import checkpoint as checkpoints
from sae_lens_multilayer.training.evaluator import steps_between_evaluations
from sae_lens_multilayer.training.lens_of_run import lens_of_run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A training run whose parts have been loaded and fit together."""

    cfg: MultiLayerConfig[Any]
    """The config as this rank uses it: its devices, and the folders of rank 0."""
    ranks: Ranks
    checkpoint: Path | None
    """Resumed from; None: a new run."""
    cache: ActivationCache | None
    """Trained on; None: the vectors come from the model or `source`."""
    source: Source | None
    """Trained on, as it was given."""
    model: Any | None
    """None in a run from a source, or from a cache without evaluation."""
    hook_names: list[str]
    sae: TrainingSAE[Any]
    """On its device."""
    starts_anew: bool
    """Whether the weights are newly initialised."""
    record: Record
    """What its checkpoints are made of: the settings that decide the weights, hashes of
    the model and its tokenizer, to which the store adds that of the dataset."""


def prepare(
    cfg: MultiLayerConfig[Any],
    override_model: Any | None = None,
    override_sae: TrainingSAE[Any] | None = None,
    override_source: Source | None = None,
) -> Run:
    """Check and load what a run needs, except its data.

    In the order in which mistakes can be found: the device; `override_sae`; the ranks
    and paths to write to; the model's shape and hooks; the checkpoint or weights to
    start from; the lens; the SAE; the cache; the loaded model. The store, which is made
    next, checks the hooks' widths and the dataset. For `Args`, see the runner.
    """
    loading.check_device("`device`", cfg.device)
    identity = checkpoints.identity_of(cfg.sae, cfg.normalize_activations)
    if override_sae is not None:
        _check_given(override_sae, identity)
    vectors, settings = vector_settings(cfg), cfg.decisive_settings()
    ranks, cfg = _join_ranks(cfg, settings)
    if override_source is None:
        needs_model = not cfg.use_cached_activations or _evaluates(cfg)
        cache = _open_cache(cfg, ranks)
        model, shape = _model_and_shape(cfg, cache, override_model)
        hook_names = hooks_of_run(cfg, shape)
    else:
        needs_model, cache, shape = False, None, override_source.shape
        model = override_model
        hook_names = override_source.hook_names
        check_widths(dict.fromkeys(hook_names, override_source.d_in), cfg.sae.d_in)
    start = cfg.resume_from_checkpoint and Path(cfg.resume_from_checkpoint)
    with ranks.together():
        if cfg.from_pretrained_path is not None:
            checkpoints.check_checkpoint(cfg.from_pretrained_path, identity)
        if start:
            wanted = identity | {"hook_names": hook_names}
            checkpoints.check_resumable(start, wanted, settings, ranks.count)
    lens = lens_of_run(cfg, hook_names, shape, override_sae)
    sae = override_sae or _make_sae(cfg, lens, len(hook_names))
    _check_n_layers(sae, hook_names)
    if cache is not None:
        cache.check(vectors, hook_names)
    if model is None and needs_model:
        model = _load_model(cfg, hook_names)
    fingerprints: dict[str, Any] = {} if model is None else model_fingerprints(model)
    if cache is not None:
        cache.check(vectors, hook_names, fingerprints)
    if override_source is not None:
        fingerprints["source"] = override_source.fingerprint
    if lens is not None and model is not None:
        lens.check_model(model, stacklevel=5)
    return Run(
        cfg=cfg,
        ranks=ranks,
        checkpoint=start or None,
        cache=cache,
        source=override_source,
        model=model,
        hook_names=hook_names,
        sae=sae.to(cfg.device),
        starts_anew=override_sae is None and cfg.from_pretrained_path is None,
        record=Record(checkpoints.CHECKPOINT_KIND, settings, fingerprints),
    )


def hooks_of_run(cfg: MultiLayerConfig[Any], shape: ModelShape) -> list[str]:
    """Hook names of a run; ValueError if it does not fit the shape of its model."""
    hook_names = cfg.resolve_hook_names(shape.n_layers)
    shape.check_context_size(cfg.context_size, cfg.model_name)
    shape.check_width(hook_names, cfg.sae.d_in)
    return hook_names


def _check_given(sae: Any, wanted: dict[str, Any]) -> None:
    found = checkpoints.identity_of(sae.cfg, sae.cfg.normalize_activations)
    if found != wanted or not isinstance(sae, TrainingSAE):
        raise ValueError(
            f"`override_sae` must be in training and as the config's `sae`, {wanted}; "
            f"it has {found} and is a {type(sae).__name__}."
        )


def _join_ranks(
    cfg: MultiLayerConfig[Any], settings: dict[str, Any]
) -> tuple[Ranks, MultiLayerConfig[Any]]:
    """The ranks, and the config of this one: its GPU, and the folders of rank 0."""
    ranks = ranks_of_environment(str(cfg.device))
    if not ranks.is_alone:
        if cfg.train_batch_size_tokens % ranks.count:
            raise ValueError(
                "`train_batch_size_tokens` must be a multiple of the number of "
                "processes, which share it; got "
                f"{cfg.train_batch_size_tokens} and {ranks.count}."
            )
        if cfg.sae.normalize_activations == "covariance_whitening":
            raise ValueError(
                "`normalize_activations='covariance_whitening'` needs a single "
                f"process; got {ranks.count}. Use another normalisation."
            )
        ranks.check_same("Settings", settings)
    folders = cfg.resume_from_checkpoint, cfg.checkpoint_path
    with ranks.together():
        if ranks.is_first and cfg.resume_from_checkpoint == LATEST:
            folders = _find_latest(cfg, settings)
        if ranks.is_first:
            _check_outputs(cfg.output_path, folders[1])
    resume, checkpoint_path = ranks.of_first(folders)
    changes = {"resume_from_checkpoint": resume, "checkpoint_path": checkpoint_path}
    if not ranks.is_alone:
        log_to_wandb = cfg.logger.log_to_wandb and ranks.is_first
        changes["logger"] = replace(cfg.logger, log_to_wandb=log_to_wandb)
        for name in ("device", "llm_device", "act_store_device"):
            changes[name] = own_device(str(getattr(cfg, name)))
    return ranks, cfg.replaced(**changes)


def _find_latest(
    cfg: MultiLayerConfig[Any], settings: dict[str, Any]
) -> tuple[str | None, str]:
    """The newest checkpoint of such a run, if any, and the folder of its run.

    It is searched for in all folders of runs, or in one if there is a `wandb_id`.
    """
    assert cfg.checkpoint_path is not None  # checked by the config
    own = Path(cfg.checkpoint_path)
    runs = [own] if cfg.logger.wandb_id else [own.parent, *own.parent.glob("*")]
    found = checkpoints.latest_checkpoint(runs, settings)
    if found is None:
        return None, str(own)
    remove_leftovers(found.parent)
    return str(found), str(found.parent)


def _check_outputs(output: str | None, folder: str | None) -> None:
    """Check `output_path` and `checkpoint_path`."""
    if output is not None:
        check_writable(output, "output_path")
    if folder is not None:
        check_writable(Path(folder) / "new", "checkpoint_path")
        if output and Path(folder).resolve().is_relative_to(Path(output).resolve()):
            raise ValueError(
                "`checkpoint_path` must lie outside `output_path`, which must be empty "
                f"when the SAE is saved there; got {folder} and {output}."
            )


def _open_cache(cfg: MultiLayerConfig[Any], ranks: Ranks) -> ActivationCache | None:
    if not cfg.use_cached_activations:
        return None
    assert cfg.cached_activations_path is not None  # checked by the config
    cache = ActivationCache(cfg.cached_activations_path)
    n_epochs = cfg.training_tokens / cache.n_tokens
    if n_epochs > 1 and ranks.is_first:
        logger.warning("The run takes %.2f epochs of the cache.", n_epochs)
    return cache


def _model_and_shape(
    cfg: MultiLayerConfig[Any], cache: ActivationCache | None, model: Any | None
) -> tuple[Any | None, ModelShape]:
    """The given model, if any, and the shape of the model of the run.

    The model is loaded only if its shape cannot be found otherwise.
    """
    if model is None:
        shape = cache.model_shape if cache else loading.shape_by_name(*cfg.named_model)
        if shape is not None:
            return None, shape
        model = loading.load_by_name(*cfg.named_model, cfg.llm_device)
    return model, as_model(model).shape


def _load_model(cfg: MultiLayerConfig[Any], hook_names: list[str]) -> Any:
    loading.check_modules(*cfg.named_model, hook_names)
    return loading.load_by_name(*cfg.named_model, cfg.llm_device, hook_names)


def _evaluates(cfg: MultiLayerConfig[Any]) -> bool:
    every = steps_between_evaluations(cfg.logger)
    n_steps = math.ceil(cfg.training_tokens / cfg.train_batch_size_tokens)
    return every is not None and n_steps >= every


def _check_n_layers(sae: TrainingSAE[Any], hook_names: list[str]) -> None:
    n_layers = getattr(sae.cfg, "n_layers", len(hook_names))
    if n_layers != len(hook_names):
        raise ValueError(
            f"`n_layers` must be the number of hooks of the run, {len(hook_names)}; "
            f"the SAE has {n_layers}. Use `n_layers=None`, or other `layers`."
        )


def _make_sae(
    cfg: MultiLayerConfig[Any], lens: LayerLens | None, n_layers: int
) -> TrainingSAE[Any]:
    if cfg.from_pretrained_path is not None:
        return TrainingSAE.load_from_disk(cfg.from_pretrained_path, cfg.device)
    settings = cfg.get_training_sae_cfg_dict()
    settings["normalize_activations"] = cfg.normalize_activations
    if settings.get("n_layers", n_layers) is None:
        settings["n_layers"] = n_layers
    with temporary_seed(cfg.seed):
        sae = TrainingSAE.from_dict(settings)
    if lens is not None:
        assert isinstance(sae, LensCarrier)  # checked by the config
        sae.lens = lens
    return sae
