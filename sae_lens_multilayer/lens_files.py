"""Reads the lenses of the package tuned-lens and checks what they hold."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tuned_lens import TunedLens
from tuned_lens.load_artifacts import load_lens_artifacts
from tuned_lens.nn.lenses import TunedLensConfig


def read_tuned_lens(
    source: TunedLens | str | Path, load_kwargs: Mapping[str, Any]
) -> tuple[TunedLensConfig, dict[str, Tensor]]:
    """The settings and the checked tensors of a lens of tuned-lens."""
    if isinstance(source, TunedLens):
        config, tensors = source.config, source.layer_translators.state_dict()
    else:
        config, tensors = _read_files(source, load_kwargs)
    if config.lens_type != TunedLensConfig.lens_type:
        raise ValueError(
            f"`lens_type` must be {TunedLensConfig.lens_type!r}; got "
            f"{config.lens_type!r}."
        )
    d_in, numbers = config.d_model, range(config.num_hidden_layers)
    shapes = {f"{i}.weight": torch.Size([d_in, d_in]) for i in numbers}
    if config.bias:
        shapes.update({f"{i}.bias": torch.Size([d_in]) for i in numbers})
    check_tensors(tensors, shapes)
    if not config.bias:
        zeros = {f"{i}.bias": tensors[f"{i}.weight"].new_zeros(d_in) for i in numbers}
        tensors = {**tensors, **zeros}
    return config, tensors


def _read_files(
    source: str | Path, load_kwargs: Mapping[str, Any]
) -> tuple[TunedLensConfig, dict[str, Tensor]]:
    try:
        config_path, tensors_path = load_lens_artifacts(str(source), **load_kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"There is no tuned lens {str(source)!r}: it must be a folder with "
            "config.json and params.pt, or a name in tuned-lens' hub space that is "
            f"cached or can be reached ({type(error).__name__}: {error})."
        ) from error
    config = _read_config(config_path)
    try:
        # Nothing but tensors: a pickle can run any code.
        tensors = torch.load(tensors_path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{tensors_path} must hold tensors only, as tuned-lens saves them: {error}"
        ) from error
    return config, tensors


def _read_config(path: Path) -> TunedLensConfig:
    try:
        return TunedLensConfig.from_dict(json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not of a tuned lens: {error}") from error


def local_config(source: TunedLens | str | Path) -> TunedLensConfig | None:
    """The settings of a lens if no hub need be asked; None if it must.

    Raises:
        ValueError: If the file is not of a tuned lens.
    """
    if isinstance(source, TunedLens):
        return source.config
    path = Path(source) / "config.json"
    return _read_config(path) if path.is_file() else None


def check_tensors(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
) -> None:
    if set(tensors) != set(shapes):
        raise ValueError(
            f"The lens must hold the tensors {sorted(shapes)}; missing: "
            f"{sorted(set(shapes) - set(tensors))}, unknown: "
            f"{sorted(set(tensors) - set(shapes))}. Is it for a model of another depth?"
        )
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise ValueError(
                f"{name!r} of the lens must have the shape {tuple(shapes[name])}; got "
                f"{tuple(tensor.shape)}. Is it for a model of another width?"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{name!r} of the lens holds NaN or infinite values.")
