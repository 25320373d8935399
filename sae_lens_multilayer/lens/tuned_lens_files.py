"""Reads the lenses of the package tuned-lens and checks what they hold."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tuned_lens import TunedLens
from tuned_lens.load_artifacts import load_lens_artifacts
from tuned_lens.nn.lenses import TunedLensConfig

from sae_lens_multilayer.sae.config import check_size

_FILES = ("config.json", "params.pt")


def read_tuned_lens(
    source: TunedLens | str | Path, load_kwargs: Mapping[str, Any]
) -> tuple[TunedLensConfig, dict[str, Tensor]]:
    """The settings and the checked tensors of a lens of tuned-lens.

    Raises:
        ValueError: If there is no such lens, or it is not what tuned-lens saves.
    """
    if isinstance(source, TunedLens):
        return _checked(source.config, source.layer_translators.state_dict())
    config, tensors = _read_files(source, load_kwargs)
    try:
        return _checked(config, tensors)
    except ValueError as error:
        raise ValueError(
            f"The tuned lens {str(source)!r} cannot be used: {error}"
        ) from error


def _checked(
    config: TunedLensConfig, tensors: dict[str, Tensor]
) -> tuple[TunedLensConfig, dict[str, Tensor]]:
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
    folder = Path(source).expanduser()
    try:
        config_path, tensors_path = load_lens_artifacts(str(folder), **load_kwargs)
    except (OSError, ValueError) as error:
        missing = [name for name in _FILES if not (folder / name).is_file()]
        found = f"without {' or '.join(missing)}" if folder.is_dir() else "no folder"
        raise ValueError(
            f"There is no tuned lens {str(source)!r}: it must be a folder with "
            f"{' and '.join(_FILES)}, and this is {found}; or a name in tuned-lens' "
            "hub space that is cached or can be reached "
            f"({type(error).__name__}: {error})."
        ) from error
    config = _read_config(config_path)
    try:
        # Nothing but tensors: a pickle can run any code.
        tensors = torch.load(tensors_path, map_location="cpu", weights_only=True)
    except Exception as error:  # What it raises depends on the bytes that it meets.
        raise ValueError(
            f"{tensors_path} must hold tensors only, as tuned-lens saves them: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not _is_state_dict(tensors):
        raise ValueError(
            f"{tensors_path} must hold tensors only, by their names; got another value."
        )
    return config, tensors


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor)
        for name, tensor in value.items()
    )


def _read_config(path: Path) -> TunedLensConfig:
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}, not settings.")
        config = TunedLensConfig.from_dict(values)
        check_size("d_model", config.d_model)
        check_size("num_hidden_layers", config.num_hidden_layers)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not of a tuned lens: {error}") from error
    return config


def local_config(source: TunedLens | str | Path) -> TunedLensConfig | None:
    """The settings of a lens if no hub need be asked; None if it must.

    Raises:
        ValueError: If the file is not of a tuned lens.
    """
    if isinstance(source, TunedLens):
        return source.config
    path = Path(source) / _FILES[0]
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
        if tensor.layout != torch.strided or not tensor.is_floating_point():
            raise ValueError(
                f"{name!r} of the lens must be a dense tensor of real numbers; got "
                f"{tensor.dtype}, {tensor.layout}."
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{name!r} of the lens holds NaN or infinite values.")
