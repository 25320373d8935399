"""Reads the two files of a published checkpoint as SAELens' config and tensors.

Only safetensors are read, and from a file that also holds the transformer, only the
tensors of the autoencoder and its lens.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from sae_lens import __version__ as sae_lens_version
from sae_lens.util import str_to_dtype
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tuned_lens.nn.lenses import TunedLensConfig

from sae_lens_multilayer.lens.carrier import LENS_PREFIX
from sae_lens_multilayer.lens.config import LensConfig
from sae_lens_multilayer.lens.lens import LayerLens
from sae_lens_multilayer.lens.tuned_lens_files import Translators, read_tuned_lens
from sae_lens_multilayer.models.shape import ModelShape
from sae_lens_multilayer.published.origin import (
    Origin,
    find_origin,
    warn_of_differences,
)
from sae_lens_multilayer.sae.config import ARCHITECTURE

_TENSORS = ("encoder.weight", "decoder.weight", "pre_encoder_bias")
_BESIDE_TRANSFORMER = "autoencoder."
_TRANSLATORS = "lens.layer_translators."
# The first number in such a name is that of the block.
_BLOCK = re.compile(r"transformer\.model\.\D+\.(\d+)\.")
# Of the paper's training runs; a `-tfm` config has its own context size.
_DATASET, _CONTEXT_SIZE = "monology/pile-uncopyrighted", 2048


def load(
    config_path: Path,
    weights_path: Path,
    location: str,
    device: str,
    overrides: dict[str, Any] | None,
    *,
    hook_name: str | None = None,
    model_name: str | None = None,
    tuned_lens: str | Path | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and tensors of a multi-layer SAE, or of the SAE of one hook.

    The SAE of one hook is the stock TopK, or with a lens a multi-layer SAE of one hook.

    Args:
        config_path: The published `config.json`.
        weights_path: The published `model.safetensors`.
        location: The repository or folder, which may have a published name.
        device: Where the tensors are read to.
        overrides: Entries that replace those of the config.
        hook_name: Return the SAE of this hook only.
        model_name: The language model; None: from the config or the location.
        tuned_lens: The lens that it was trained with, as a folder or a name in
            tuned-lens' hub space; None: from the files or the model.

    Raises:
        ValueError: If the files are not those of an MLSAE, incomplete, or contradict
            each other; or its lens cannot be read.
    """
    settings = _read_settings(config_path)
    translators = None if tuned_lens is None else read_tuned_lens(tuned_lens, {})
    with _open(weights_path, device) as file:
        names = set(file.keys())
        is_plain = names.issuperset(_TENSORS)
        prefix = "" if is_plain else _BESIDE_TRANSFORMER
        d_in, d_sae = _sizes(file, prefix, settings, config_path, weights_path)
        n_layers = _n_layers_stored(names)
        if n_layers is None and translators is not None:
            n_layers = translators.config.num_hidden_layers
        origin = find_origin(settings, location, n_layers, model_name, hook_name)
        warn_of_differences(location, origin, settings, d_in, d_sae)
        translators = translators or _stored_translators(file, origin, d_in)
        lens = _make_lens(origin, d_in, translators)
        tensors = _read_tensors(file, prefix)
    cfg = _make_config(settings, d_in, d_sae, origin, lens and lens.config)
    dtype = str(tensors["W_enc"].dtype).removeprefix("torch.")
    cfg.update({"dtype": dtype, "device": device, **(overrides or {})})
    if cfg["architecture"] != ARCHITECTURE:
        tensors["W_enc"] = tensors["W_enc"].contiguous()
        tensors["b_enc"] = tensors["b_dec"].new_zeros(d_sae)
    if lens is not None:
        tensors.update(lens.to(device).state_dict(prefix=LENS_PREFIX))
    return cfg, _finite(tensors, str_to_dtype(cfg["dtype"]), weights_path)


def load_config(
    config_path: Path,
    location: str,
    device: str | None,
    overrides: dict[str, Any] | None,
    hook_name: str | None = None,
) -> dict[str, Any]:
    """The config alone. A `-tfm` config has no sizes, which are then the model's.

    Raises:
        ValueError: If the file is not of an MLSAE, or the sizes are unknown.
    """
    settings = _read_settings(config_path)
    origin = find_origin(settings, location, None, None, hook_name)
    d_in = settings.get("n_inputs", origin.d_in)
    if d_in is None:
        raise ValueError(f"{config_path} must have 'n_inputs'; it has {settings}.")
    d_sae = settings.get("n_latents") or settings["expansion_factor"] * d_in
    lens_config = None
    if origin.has_lens:
        assert origin.n_layers is not None  # a lens needs a known model
        lens_config = LensConfig(
            origin.hook_names, origin.n_layers, d_in, "reference", origin.model_name
        )
    cfg = _make_config(settings, d_in, d_sae, origin, lens_config)
    return {**cfg, "dtype": "float32", "device": device or "cpu", **(overrides or {})}


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if (
        not isinstance(settings, dict)
        or type(settings.get("k")) is not int
        or not {"n_latents", "expansion_factor"} & settings.keys()
        or not isinstance(settings.get("standardize", True), bool)
    ):
        raise ValueError(
            f"{path} is not the config of an MLSAE, which has an integer 'k', "
            "'n_latents' or 'expansion_factor', and 'standardize' true or false; it "
            f"holds {str(settings)[:300]}."
        )
    return settings


def _open(path: Path, device: str) -> Any:
    try:
        return safe_open(path, framework="pt", device=device)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} must be a complete safetensors file; its {path.stat().st_size:,} "
            f"bytes cannot be read ({error}). Download it again: "
            "`SAE.from_pretrained(..., force_download=True)`."
        ) from error


def _sizes(
    file: Any, prefix: str, settings: dict[str, Any], config_path: Path, path: Path
) -> tuple[int, int]:
    """d_in and d_sae of the tensors, once they agree with each other and the config."""
    try:
        shapes = [tuple(file.get_slice(prefix + n).get_shape()) for n in _TENSORS]
        (d_sae, d_in), decoder, bias = shapes
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{path} is not an MLSAE: it must hold {list(_TENSORS)}, with or without "
            f"the prefix {_BESIDE_TRANSFORMER!r} ({error})."
        ) from error
    found = {"n_inputs": d_in, "n_latents": d_sae, "expansion_factor": d_sae / d_in}
    wrong = [n for n in found if settings.get(n, found[n]) != found[n]]
    if not 0 < settings["k"] <= d_sae:
        wrong.append("k")
    if (decoder, bias) != ((d_in, d_sae), (d_in,)) or wrong:
        raise ValueError(
            f"{config_path} and {path} contradict each other in {wrong or 'shapes'}: "
            f"the config has {settings}, and {list(_TENSORS)} have the shapes {shapes}."
        )
    return d_in, d_sae


def _n_layers_stored(names: set[str]) -> int | None:
    """Number of blocks of the transformer beside the SAE; None if there is none."""
    blocks = [int(block[1]) for block in map(_BLOCK.match, names) if block]
    return max(blocks) + 1 if blocks else None


def _stored_translators(file: Any, origin: Origin, d_in: int) -> Translators | None:
    """The tuned lens stored beside the SAE; None if there is none."""
    tensors = {
        name.removeprefix(_TRANSLATORS): file.get_tensor(name)
        for name in file.keys()  # noqa: SIM118  (not iterable)
        if name.startswith(_TRANSLATORS)
    }
    if not tensors:
        return None
    n_layers = len({name.partition(".")[0] for name in tensors})
    config = TunedLensConfig(str(origin.model_name), d_in, n_layers)
    return Translators.validated(config, tensors)


def _make_lens(
    origin: Origin, d_in: int, translators: Translators | None
) -> LayerLens | None:
    if translators is None:
        if not origin.has_lens:
            return None
        translators = read_tuned_lens(str(origin.model_name), {})
    config = translators.config_at(origin.hook_names, "reference")
    lens = LayerLens.from_tensors(config, translators.tensors_at(config))
    shape = ModelShape(origin.n_layers or config.n_layers, d_in)
    lens.config.check_shape(shape, str(origin.model_name))
    return lens


def _read_tensors(file: Any, prefix: str) -> dict[str, Tensor]:
    """SAELens' tensors; in `W_enc` the weights of one latent are contiguous."""
    encoder, decoder, bias = (prefix + name for name in _TENSORS)
    return {
        "W_enc": file.get_tensor(encoder).T,
        "W_dec": file.get_tensor(decoder).T.contiguous(),
        "b_dec": file.get_tensor(bias),
    }


def _make_config(
    settings: dict[str, Any],
    d_in: int,
    d_sae: int,
    origin: Origin,
    lens_config: LensConfig | None,
) -> dict[str, Any]:
    hook_names = origin.hook_names
    metadata: dict[str, Any] = {
        # Without it, SAELens treats the config as one of its old versions.
        "sae_lens_version": sae_lens_version,
        "model_name": origin.model_name,
        "model_class_name": "HookedTransformer",
        "model_from_pretrained_kwargs": {},
        "dataset_path": _DATASET,
        "context_size": settings.get("max_length", _CONTEXT_SIZE),
        "prepend_bos": False,
        "exclude_special_tokens": settings.get("skip_special_tokens", True),
    }
    is_stock = len(hook_names) == 1 and lens_config is None
    if hook_names and not is_stock:
        metadata["hook_names"] = hook_names
    if len(hook_names) == 1:
        metadata["hook_name"] = hook_names[0]
    if lens_config is not None:
        metadata["tuned_lens"] = lens_config.to_dict()
    standardize = settings.get("standardize", True)
    return {
        "architecture": "topk" if is_stock else ARCHITECTURE,
        "d_in": d_in,
        "d_sae": d_sae,
        "k": settings["k"],
        "normalize_activations": "layer_norm" if standardize else "none",
        "apply_b_dec_to_input": True,
        "metadata": metadata,
    }


def _finite(
    tensors: dict[str, Tensor], dtype: torch.dtype, path: Path
) -> dict[str, Tensor]:
    """The tensors in a dtype, once they are finite floating-point numbers."""
    for name, tensor in tensors.items():
        # Unlike `isfinite` of all, this needs no memory; NaN propagates.
        extremes = torch.stack(tensor.aminmax())
        if not tensor.is_floating_point() or not extremes.isfinite().all():
            raise ValueError(
                f"{path} must hold finite floating-point numbers; {name} has the dtype "
                f"{tensor.dtype}, or NaN or infinite values."
            )
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}
