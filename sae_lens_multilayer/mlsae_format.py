"""The format of the paper's own checkpoints: two files -> SAELens' config and tensors.

Only safetensors are read, and of a file that holds the transformer, too, only the
autoencoder's tensors are.
"""

import json
import logging
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import __version__ as sae_lens_version
from sae_lens.util import str_to_dtype
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformer_lens.loading_from_pretrained import (
    OFFICIAL_MODEL_NAMES,  # pyright: ignore[reportPrivateImportUsage]  (of 2.x, too)
)

from sae_lens_multilayer import hooks
from sae_lens_multilayer.releases import PublishedName, nearest, published_model
from sae_lens_multilayer.sae_config import ARCHITECTURE

logger = logging.getLogger(__name__)

_TENSORS = ("encoder.weight", "decoder.weight", "pre_encoder_bias")
_BESIDE_TRANSFORMER = "autoencoder."
_BLOCK = re.compile(rf"transformer\.model\.{hooks.HF_BLOCK}(\d+)\.")
# Of the paper's training runs; a `-tfm` config has its own context size.
_DATASET, _CONTEXT_SIZE = "monology/pile-uncopyrighted", 2048


@dataclass(frozen=True)
class _Origin:
    """What a checkpoint was trained on."""

    model_name: str | None
    """The language model; None if nothing names it."""
    hook_names: list[str]
    """The hooks; none if the model is not known."""
    d_in: int | None
    """The model's width, where it is known without the tensors."""


def load(
    config_path: Path,
    weights_path: Path,
    place: str,
    device: str,
    overrides: dict[str, Any] | None,
    *,
    hook_name: str | None = None,
    model_name: str | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and tensors of a multi-layer SAE, or of the stock SAE of one hook.

    Args:
        config_path: The published `config.json`.
        weights_path: The published `model.safetensors`.
        place: The repository or folder, whose name may be of the published form.
        device: Where the tensors are read to.
        overrides: Entries of the config that replace what was found; None: none.
        hook_name: Give the SAE of this hook only.
        model_name: The language model; None: as the files or their place say.

    Raises:
        ValueError: If the files are not those of an MLSAE, torn, or disagree.
    """
    settings = _read_settings(config_path)
    with _open(weights_path, device) as file:
        names = list(file.keys())
        prefix = _prefix(names, weights_path)
        shapes = [tuple(file.get_slice(prefix + n).get_shape()) for n in _TENSORS]
        sizes = _check_sizes(settings, shapes, config_path)
        origin = _origin(settings, place, _n_layers_stored(names), model_name)
        cfg = _config(settings, *sizes, origin, hook_name)
        encoder, decoder, bias = (file.get_tensor(prefix + name) for name in _TENSORS)
    dtype = str(encoder.dtype).removeprefix("torch.")
    cfg.update({"dtype": dtype, "device": device, **(overrides or {})})
    tensors = {"W_enc": encoder.T, "W_dec": decoder.T.contiguous(), "b_dec": bias}
    if cfg["architecture"] != ARCHITECTURE:
        tensors["W_enc"] = encoder.T.contiguous()
        tensors["b_enc"] = bias.new_zeros(cfg["d_sae"])
    return cfg, _checked(tensors, str_to_dtype(cfg["dtype"]), weights_path)


def load_config(
    config_path: Path,
    place: str,
    device: str | None,
    overrides: dict[str, Any] | None,
    hook_name: str | None = None,
) -> dict[str, Any]:
    """The config alone; a `-tfm` one does not state its sizes, so the model gives them.

    Raises:
        ValueError: If the file is not of an MLSAE, or its sizes are not known.
    """
    settings = _read_settings(config_path)
    origin = _origin(settings, place, None, None)
    d_in = settings.get("n_inputs", origin.d_in)
    if d_in is None:
        raise ValueError(f"{config_path} must state 'n_inputs'; it has {settings}.")
    d_sae = settings.get("n_latents") or settings["expansion_factor"] * d_in
    cfg = _config(settings, d_in, d_sae, origin, hook_name)
    cfg.update({"dtype": "float32", "device": device or "cpu", **(overrides or {})})
    return cfg


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON; {error}.") from error
    sizes = {"n_latents", "expansion_factor"}
    if (
        not isinstance(settings, dict)
        or type(settings.get("k")) is not int
        or not sizes & set(settings)
    ):
        raise ValueError(
            f"{path} is not the config of an MLSAE, which has the whole number 'k' and "
            f"'n_latents' or 'expansion_factor'; it holds {str(settings)[:300]}."
        )
    return settings


@contextmanager
def _open(path: Path, device: str) -> Generator[Any, None, None]:
    try:
        file = safe_open(path, framework="pt", device=device)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} must be a whole safetensors file; it has {path.stat().st_size:,} "
            f"bytes and cannot be read ({error}). Fetch it again: "
            "`SAE.from_pretrained(..., force_download=True)`."
        ) from error
    with file:
        yield file


def _prefix(names: list[str], path: Path) -> str:
    """What stands before the autoencoder's names in the file."""
    for prefix in ("", _BESIDE_TRANSFORMER):
        if all(prefix + name in names for name in _TENSORS):
            return prefix
    raise ValueError(
        f"{path} is not an MLSAE: it must hold {list(_TENSORS)}, with or without "
        f"{_BESIDE_TRANSFORMER!r} before; it holds {sorted(names)[:8]}."
    )


def _n_layers_stored(names: list[str]) -> int | None:
    """Number of blocks of the transformer beside the SAE; None if there is none."""
    blocks = [int(block[1]) for block in map(_BLOCK.match, names) if block]
    return max(blocks) + 1 if blocks else None


def _check_sizes(
    settings: dict[str, Any], shapes: list[tuple[int, ...]], path: Path
) -> tuple[int, int]:
    """d_in and d_sae, on which the tensors and the config must agree."""
    encoder, decoder, bias = shapes
    if len(encoder) != 2 or decoder != encoder[::-1] or bias != encoder[1:]:
        raise ValueError(
            "The tensors of an MLSAE must have the shapes (d_sae, d_in), (d_in, d_sae) "
            f"and (d_in,); got {shapes} for {list(_TENSORS)}."
        )
    d_sae, d_in = encoder
    found = {"n_inputs": d_in, "n_latents": d_sae, "expansion_factor": d_sae / d_in}
    stated = {name: settings[name] for name in found if name in settings}
    if any(found[name] != value for name, value in stated.items()):
        raise ValueError(
            f"The tensors must have the sizes that {path} states, {stated}; they have "
            f"{ {name: found[name] for name in stated} }."
        )
    if not 0 < settings["k"] <= d_sae:
        raise ValueError(f"'k' in {path} must be in [1, {d_sae}]; got {settings['k']}.")
    return d_in, d_sae


def _origin(
    settings: dict[str, Any],
    place: str,
    n_layers_stored: int | None,
    model_name: str | None,
) -> _Origin:
    name = _name_in(place)
    if settings.get("tuned_lens") or (name is not None and name.has_lens):
        raise ValueError(f"The MLSAE at {place} needs its tuned lens.")
    named = (settings.get("model_name"), name.model if name else None)
    stated = [m for m in ((model_name,) if model_name else named) if m]
    known = next(filter(None, map(published_model, stated)), None)
    d_in = None
    if known is not None:
        model_name, n_layers, d_in = known.name, known.n_layers, known.d_in
    elif stated and n_layers_stored is None:
        shape = _shape_of(stated[0])
        model_name, n_layers, d_in = stated[0], shape.n_layers, shape.d_model
    else:
        model_name, n_layers = stated[0] if stated else None, n_layers_stored
    n_layers = n_layers_stored or n_layers
    if n_layers is None:
        logger.warning(
            "Nothing says on which model the MLSAE at %s was trained, so it knows no "
            "hooks and has no views. Give the folder the repository's name, or name "
            "the model: converter=partial(mlsae_disk_loader, model_name=...).",
            place,
        )
        return _Origin(None, [], None)
    layers = settings.get("layers")
    if layers is None and name is not None and name.layer is not None:
        layers = [name.layer]
    hook_names = hooks.resolve_hook_names(
        hooks.DEFAULT_HOOK_NAME, None, layers, n_layers, str(model_name)
    )
    return _Origin(model_name, hook_names, d_in)


def _name_in(place: str) -> PublishedName | None:
    """The published name in a repository's name or a path, also of the hub's cache."""
    parts = reversed(re.split("/|--", place))
    return next(filter(None, map(PublishedName.parse, parts)), None)


def _shape_of(model_name: str) -> hooks.ModelShape:
    try:
        shape = hooks.shape_of_named_model("HookedTransformer", model_name)
    except ValueError as error:
        raise ValueError(
            f"The MLSAE was trained on {model_name!r}, which is not a model that "
            f"TransformerLens knows; the nearest are "
            f"{nearest(model_name, OFFICIAL_MODEL_NAMES)}. Load a folder with "
            "converter=partial(mlsae_disk_loader, model_name=...)."
        ) from error
    if shape is None:
        raise FileNotFoundError(
            f"The number of layers comes from the config of {model_name!r}, which is "
            "not cached, and the Hugging Face hub cannot be reached."
        )
    return shape


def _config(
    settings: dict[str, Any],
    d_in: int,
    d_sae: int,
    origin: _Origin,
    hook_name: str | None,
) -> dict[str, Any]:
    hook_names = origin.hook_names
    if hook_name is not None:
        hook_names = [hook_names[hooks.find_hook(hook_names, hook_name)]]
    is_of_one_hook = len(hook_names) == 1
    metadata = {
        # Without it, SAELens takes the config for one of its old ones.
        "sae_lens_version": sae_lens_version,
        "model_name": origin.model_name,
        "model_class_name": "HookedTransformer",
        "model_from_pretrained_kwargs": {},
        "dataset_path": _DATASET,
        "context_size": settings.get("max_length", _CONTEXT_SIZE),
        "prepend_bos": False,
        "exclude_special_tokens": settings.get("skip_special_tokens", True),
    }
    if is_of_one_hook:
        metadata["hook_name"] = hook_names[0]
    elif hook_names:
        metadata["hook_names"] = hook_names
    standardize = settings.get("standardize", True)
    return {
        "architecture": "topk" if is_of_one_hook else ARCHITECTURE,
        "d_in": d_in,
        "d_sae": d_sae,
        "k": settings["k"],
        "normalize_activations": "layer_norm" if standardize else "none",
        "apply_b_dec_to_input": True,
        "metadata": metadata,
    }


def _checked(
    tensors: dict[str, Tensor], dtype: torch.dtype, path: Path
) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(
                f"{path} must hold finite floating-point numbers; {name} has the dtype "
                f"{tensor.dtype}, or NaN or infinite values."
            )
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}
