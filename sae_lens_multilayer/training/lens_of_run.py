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


def lens_of_run(
    cfg: MultiLayerConfig[Any], override_sae: SAE[Any] | None = None
) -> LayerLens | None:
    """Read and validate the lens of a run, before a model is loaded.

    Without `tuned_lens`, it is that of the SAE that the run starts from. With it, both
    must have the same lens.
    """
    starts: dict[str, LayerLens | None] = {}
    if start := cfg.resume_from_checkpoint or cfg.from_pretrained_path:
        starts[f"The checkpoint at {start}"] = saved_lens(Path(start))
    if override_sae is not None:
        starts["`override_sae`"] = lens_of(override_sae)
    present = [lens for lens in starts.values() if lens is not None]
    lens = _lens_of_config(cfg, present[-1] if present else None)
    if lens is None:
        return None
    cfg.check_lens(lens.config)
    for origin, found in starts.items():
        if found is None or not _is_same(lens, found):
            raise ValueError(
                f"{origin} must have the run's `tuned_lens`, {lens.config}; it has "
                f"{_difference(lens, found)}. Omit `tuned_lens` to keep the SAE's lens."
            )
    return lens


def _lens_of_config(
    cfg: MultiLayerConfig[Any], saved: LayerLens | None
) -> LayerLens | None:
    source: Any = cfg.tuned_lens
    if source is None or isinstance(source, LayerLens):
        return saved if source is None else source
    if isinstance(source, dict):
        if saved is None or saved.config != LensConfig(**source):
            raise ValueError(
                "`tuned_lens` has the settings of a lens; its tensors are in the saved "
                "SAE. Give the object, such as `SAE.load_from_disk(folder).lens`."
            )
        return saved
    tuned_config, tensors = read_tuned_lens(source)
    hook_names = cfg.resolve_hook_names(tuned_config.num_hidden_layers)
    return LayerLens.from_translators(
        tuned_config, tensors, hook_names, cfg.lens_alignment
    )


def _is_same(lens: LayerLens, found: LayerLens) -> bool:
    theirs = found.state_dict()
    return found.config == lens.config and all(
        # The lens of an SAE is in the SAE's dtype.
        torch.equal(tensor.to(theirs[name]), theirs[name])
        for name, tensor in lens.state_dict().items()
    )


def _difference(lens: LayerLens, found: LayerLens | None) -> str:
    if found is None:
        return "none"
    if found.config == lens.config:
        return "one with other tensors"
    return str(found.config)
