"""The tuned lens of a training run: its config's, or its first checkpoint's."""

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


def lens_of_run(cfg: MultiLayerConfig[Any]) -> LayerLens | None:
    """Read and check the lens of a run; no model is needed.

    A run that starts from a checkpoint has the lens of that checkpoint.

    Raises:
        ValueError: If the lens cannot be read or does not fit the run (its alignment
            too), or the checkpoint has another one than `tuned_lens` names.
    """
    start = cfg.resume_from_checkpoint or cfg.from_pretrained_path
    found = None if start is None else saved_lens(Path(start))
    if cfg.tuned_lens is None:
        if found is not None:
            cfg.check_lens(found.config)
        return found
    if isinstance(cfg.tuned_lens, dict):
        if found is None or found.config != LensConfig.from_dict(cfg.tuned_lens):
            raise ValueError(
                "`tuned_lens` holds the settings of a lens that was given as an object "
                "to the run that this config is from; its tensors are in the saved "
                "SAE. Start from a checkpoint that has it, or give the object: "
                "`SAE.load_from_disk(folder).lens`."
            )
        return found
    lens = _lens_of_config(cfg)
    if start is not None:
        check_same_lens(lens, found, f"The checkpoint at {start}")
    return lens


def _lens_of_config(cfg: MultiLayerConfig[Any]) -> LayerLens:
    source: Any = cfg.tuned_lens
    if isinstance(source, LayerLens):
        return source
    stated, tensors = read_tuned_lens(source, {})
    hook_names = cfg.resolve_hook_names(stated.num_hidden_layers)
    config = LensConfig.from_tuned_lens(stated, hook_names, cfg.lens_alignment)
    cfg.check_lens(config)
    return LayerLens.from_translators(config, tensors)


def check_same_lens(lens: LayerLens, found: LayerLens | None, what: str) -> None:
    """Raise ValueError if an SAE that is trained on has another lens than the run.

    Args:
        found: Its lens.
        what: What it is, for the message.
    """
    if found is None:
        has = "none"
    elif found.config != lens.config:
        has = str(found.config)
    elif not _same_tensors(lens, found):
        has = "one with other tensors"
    else:
        return
    raise ValueError(
        f"{what} must have the run's `tuned_lens`, {lens.config}; it has {has}. Leave "
        "out `tuned_lens` to train with what is there."
    )


def check_lens_of_model(
    sae: SAE[Any], model: Any | None, cache: ActivationCache | None
) -> None:
    """Check that an SAE's lens, if it has one, was made for a run's model.

    Args:
        model: None in a run that has loaded none.
        cache: Of such a run; it knows the shape of the model alone.

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


def _same_tensors(lens: LayerLens, found: LayerLens) -> bool:
    theirs = found.state_dict()
    return all(
        # An SAE has its lens in its own dtype.
        torch.equal(tensor.to(theirs[name]), theirs[name])
        for name, tensor in lens.state_dict().items()
    )
