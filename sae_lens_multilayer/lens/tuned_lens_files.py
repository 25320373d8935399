"""Reads lenses of the package tuned-lens."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tuned_lens import TunedLens
from tuned_lens.load_artifacts import load_lens_artifacts
from tuned_lens.nn.lenses import TunedLensConfig

from sae_lens_multilayer.files import first_sentence

_CONFIG, _TENSORS = "config.json", "params.pt"


def read_tuned_lens(
    source: TunedLens | str | Path, **load_kwargs: Any
) -> tuple[TunedLensConfig, dict[str, Tensor]]:
    """The settings and translators' tensors of a lens; see `LayerLens.from_tuned_lens`.

    Raises ValueError if there is no such lens, or a file of it cannot be read.
    """
    if isinstance(source, TunedLens):
        return source.config, source.layer_translators.state_dict()
    path = Path(source).expanduser()
    try:
        config_path, tensors_path = load_lens_artifacts(str(path), **load_kwargs)
        config = TunedLensConfig.from_dict(json.loads(config_path.read_text()))
        # A pickle of anything but tensors could run any code.
        return config, torch.load(tensors_path, map_location="cpu", weights_only=True)
    except Exception as error:  # the class depends on the bytes in the file
        raise ValueError(
            f"There is no tuned lens {str(source)!r}: it must be a folder with "
            f"{_CONFIG} and {_TENSORS} (tensors only), or a name in tuned-lens' hub "
            f"space that can be downloaded ({first_sentence(error)})."
        ) from error
