"""The lens of a training run: from its config, checkpoint or given SAE."""

from pathlib import Path
from typing import Any

from sae_lens import SAE

from sae_lens_multilayer.config import MultiLayerConfig
from sae_lens_multilayer.lens.carrier import lens_of, saved_lens
from sae_lens_multilayer.lens.config import LensConfig
from sae_lens_multilayer.lens.lens import LayerLens
from sae_lens_multilayer.lens.read import read_lens
from sae_lens_multilayer.models.model import ModelShape


def lens_of_run(
    cfg: MultiLayerConfig[Any],
    hook_names: list[str],
    shape: ModelShape,
    override_sae: SAE[Any] | None = None,
) -> LayerLens | None:
    """Read and validate the lens of a run, before a model is loaded.

    Without `lens`, it is that of the SAE that the run starts from. With it, both
    must have the same lens.
    """
    starts: dict[str, LayerLens | None] = {}
    if start := cfg.resume_from_checkpoint or cfg.from_pretrained_path:
        starts[f"The checkpoint at {start}"] = saved_lens(Path(start))
    if override_sae is not None:
        starts["`override_sae`"] = lens_of(override_sae)
    present = [lens for lens in starts.values() if lens is not None]
    lens = present[-1] if present else None
    if cfg.lens is not None:
        lens = _given_lens(cfg, lens, hook_names, shape)
    if lens is None:
        return None
    lens.config.check_shape(shape, cfg.model_name)
    lens.config.check_sae(cfg.sae.d_in, hook_names)
    if lens.config.alignment != cfg.lens_alignment:
        raise ValueError(
            f"`lens_alignment` must be that of the lens, {lens.config.alignment!r}; "
            f"got {cfg.lens_alignment!r}."
        )
    for origin, found in starts.items():
        if found is None or not lens.is_same(found):
            raise ValueError(
                f"{origin} must have the run's `lens`, {lens.config}; it has "
                f"{_difference(lens, found)}. Omit `lens` to keep the SAE's lens."
            )
    return lens


def _given_lens(
    cfg: MultiLayerConfig[Any],
    saved: LayerLens | None,
    hook_names: list[str],
    shape: ModelShape,
) -> LayerLens:
    source = cfg.lens
    assert source is not None
    if isinstance(source, dict):
        if saved is None or saved.config != LensConfig(**source):
            raise ValueError(
                "`lens` has the settings of a lens; its tensors are in the saved SAE. "
                "Give the object, such as `SAE.load_from_disk(folder).lens`."
            )
        return saved
    return read_lens(source, hook_names, shape.n_layers, cfg.lens_alignment)


def _difference(lens: LayerLens, found: LayerLens | None) -> str:
    if found is None:
        return "none"
    if found.config == lens.config:
        return "one with other tensors"
    return str(found.config)
