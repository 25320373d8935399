"""The lens of a training run: from its config, checkpoint or given SAE."""

from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE

from sae_lens_multilayer.config import MultiLayerConfig
from sae_lens_multilayer.lens.carrier import lens_of, saved_lens
from sae_lens_multilayer.lens.config import LensConfig
from sae_lens_multilayer.lens.lens import LayerLens
from sae_lens_multilayer.lens.tuned_lens_files import read_tuned_lens
from sae_lens_multilayer.store.cache import ActivationCache


def lens_of_run(
    cfg: MultiLayerConfig[Any], override_sae: SAE[Any] | None = None
) -> LayerLens | None:
    """Read and validate the lens of a run, before a model is loaded.

    A run that starts from a checkpoint or from `override_sae` has the lens of that SAE.

    Raises:
        ValueError: If the lens cannot be read or does not fit the run, or the SAE that
            the run starts from has another lens than the config.
    """
    start = cfg.resume_from_checkpoint or cfg.from_pretrained_path
    saved = None if start is None else saved_lens(Path(start))
    lens = _lens_of_config(cfg, saved)
    if start is not None:
        _check_same(lens, saved, f"The checkpoint at {start}")
    if override_sae is None:
        return lens
    given = lens_of(override_sae)
    if lens is not None:
        _check_same(lens, given, "`override_sae`")
    elif given is not None:
        cfg.check_lens(given.config)
    return given


def check_lens_of_model(
    sae: SAE[Any], model: Any | None, cache: ActivationCache | None
) -> None:
    """Check that an SAE's lens, if it has one, was made for a run's model.

    Args:
        model: None if the run has loaded no model; its shape is then the cache's.

    Raises:
        ValueError: As `LayerLens.check_model`, which may also warn.
    """
    lens = lens_of(sae)
    if lens is None:
        return
    if model is None:
        assert cache is not None
        lens.config.check_shape(cache.model_shape, cache.record.settings["model_name"])
    else:
        lens.check_model(model, stacklevel=5)


def _lens_of_config(
    cfg: MultiLayerConfig[Any], saved: LayerLens | None
) -> LayerLens | None:
    source: Any = cfg.tuned_lens
    if source is None:
        if saved is not None:
            cfg.check_lens(saved.config)
        return saved
    if isinstance(source, LayerLens):
        return source
    if isinstance(source, dict):
        if saved is None or saved.config != LensConfig(**source):
            raise ValueError(
                "`tuned_lens` holds the settings of a lens that was given as an object "
                "to an earlier run; its tensors are in the saved SAE. Start from a "
                "checkpoint that has this lens, or give the object: "
                "`SAE.load_from_disk(folder).lens`."
            )
        return saved
    tuned_config, tensors = read_tuned_lens(source)
    hook_names = cfg.resolve_hook_names(tuned_config.num_hidden_layers)
    lens = LayerLens.from_translators(
        tuned_config, tensors, hook_names, cfg.lens_alignment
    )
    cfg.check_lens(lens.config)
    return lens


def _check_same(lens: LayerLens | None, found: LayerLens | None, origin: str) -> None:
    if lens is found:
        return
    assert lens is not None
    if found is None:
        difference = "none"
    elif found.config != lens.config:
        difference = str(found.config)
    elif not _same_tensors(lens, found):
        difference = "one with other tensors"
    else:
        return
    raise ValueError(
        f"{origin} must have the run's `tuned_lens`, {lens.config}; it has "
        f"{difference}. Leave out `tuned_lens` to keep the lens of the SAE."
    )


def _same_tensors(lens: LayerLens, found: LayerLens) -> bool:
    theirs = found.state_dict()
    return all(
        # The lens of an SAE is in the SAE's dtype.
        torch.equal(tensor.to(theirs[name]), theirs[name])
        for name, tensor in lens.state_dict().items()
    )
