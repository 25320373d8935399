"""Reads and validates lenses of the package tuned-lens."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tuned_lens import TunedLens
from tuned_lens.load_artifacts import load_lens_artifacts
from tuned_lens.nn.lenses import TunedLensConfig

from sae_lens_multilayer.lens.affine import check_tensors
from sae_lens_multilayer.lens.config import Alignment, LensConfig
from sae_lens_multilayer.sae.config import check_size

_CONFIG, _TENSORS = "config.json", "params.pt"


@dataclass(frozen=True)
class Translators:
    """All translators of a tuned lens, validated."""

    config: TunedLensConfig
    tensors: dict[str, Tensor]
    """`{i}.weight` [d_in, d_in] and `{i}.bias` [d_in] of the translator of block i."""

    @classmethod
    def validated(
        cls, config: TunedLensConfig, tensors: Mapping[Any, Any]
    ) -> "Translators":
        """Check that the tensors are those of the config.

        Raises:
            ValueError: If not, or one is not finite.
        """
        check_size("d_model", config.d_model)
        check_size("num_hidden_layers", config.num_hidden_layers)
        if config.lens_type != TunedLensConfig.lens_type:
            raise ValueError(
                f"`lens_type` must be {TunedLensConfig.lens_type!r}; got "
                f"{config.lens_type!r}."
            )
        d_in, blocks = config.d_model, range(config.num_hidden_layers)
        biases = {f"{i}.bias": torch.Size([d_in]) for i in blocks}
        shapes = {f"{i}.weight": torch.Size([d_in, d_in]) for i in blocks}
        if config.bias:
            shapes |= biases
        check_tensors(tensors, shapes)
        tensors = dict(tensors)
        for name in biases:
            tensors.setdefault(name, tensors["0.weight"].new_zeros(d_in))
        return cls(config, tensors)

    def config_at(self, hook_names: Sequence[str], alignment: Alignment) -> LensConfig:
        """The settings of the lens of some hooks."""
        return LensConfig.from_tuned_lens(self.config, hook_names, alignment)

    def tensors_at(self, config: LensConfig) -> dict[str, Tensor]:
        """The state dict of the `LayerLens` with this config, copied."""
        return {
            # Two hooks may have the same translator; safetensors refuses shared memory.
            f"{i}.{part}": self.tensors[f"{translator}.{part}"].detach().clone()
            for i, name in enumerate(config.hook_names)
            if (translator := config.translator(name)) is not None
            for part in ("weight", "bias")
        }


def read_tuned_lens(
    source: TunedLens | str | Path, load_kwargs: Mapping[str, Any]
) -> Translators:
    """Read and validate a tuned lens.

    Args:
        load_kwargs: For `tuned_lens.load_artifacts.load_lens_artifacts`.

    Raises:
        ValueError: If there is no such lens, or its files are not valid.
    """
    if isinstance(source, TunedLens):
        tensors = source.layer_translators.state_dict()
        return Translators.validated(source.config, tensors)
    folder = str(Path(source).expanduser())
    try:
        config_path, tensors_path = load_lens_artifacts(folder, **load_kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"There is no tuned lens {str(source)!r}: it must be a folder with "
            f"{_CONFIG} and {_TENSORS}, or a name in tuned-lens' hub space that is "
            f"cached or can be downloaded ({type(error).__name__}: {error})."
        ) from error
    config = _read_config(config_path)
    try:
        # A pickle of anything but tensors could run any code.
        tensors = dict(torch.load(tensors_path, map_location="cpu", weights_only=True))
    except Exception as error:  # which one depends on the bytes in the file
        raise ValueError(
            f"{tensors_path} must hold tensors only, as tuned-lens saves them: "
            f"{type(error).__name__}: {error}"
        ) from error
    try:
        return Translators.validated(config, tensors)
    except ValueError as error:
        raise ValueError(
            f"The tuned lens {str(source)!r} is not valid: {error}"
        ) from error


def _read_config(path: Path) -> TunedLensConfig:
    try:
        return TunedLensConfig.from_dict(dict(json.loads(path.read_text())))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not the config of a tuned lens: {error}"
        ) from error


def local_config(source: TunedLens | str | Path) -> TunedLensConfig | None:
    """The settings of a lens in memory or in a folder; None if only the hub has them.

    Raises:
        ValueError: If the file is not the config of a tuned lens.
    """
    if isinstance(source, TunedLens):
        return source.config
    path = Path(source) / _CONFIG
    return _read_config(path) if path.is_file() else None
