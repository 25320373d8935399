"""The format of the paper's own checkpoints: two files -> SAELens' config and tensors.

Only safetensors are read, and of a file that holds the transformer, too, only the
autoencoder's tensors are.
"""

import json
import logging
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sae_lens import __version__ as sae_lens_version
from sae_lens.util import str_to_dtype
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tuned_lens.nn.lenses import TunedLensConfig

from sae_lens_multilayer import hooks
from sae_lens_multilayer.lens.carrier import LENS_PREFIX
from sae_lens_multilayer.lens.config import LensConfig
from sae_lens_multilayer.lens.lens import LayerLens
from sae_lens_multilayer.lens.tuned_lens_files import Translators, read_tuned_lens
from sae_lens_multilayer.published.origin import (
    Origin,
    find_origin,
    warn_of_other_sizes,
)
from sae_lens_multilayer.sae.config import ARCHITECTURE

logger = logging.getLogger(__name__)

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
    place: str,
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
        place: The repository or folder, whose name may be of the published form.
        device: Where the tensors are read to.
        overrides: Entries of the config that replace what was found; None: none.
        hook_name: Give the SAE of this hook only.
        model_name: The language model; None: as the files or their place say.
        tuned_lens: The lens that it was trained with, as a folder or a name in
            tuned-lens' hub space; None: as the files or their place say.

    Raises:
        ValueError: If the files are not those of an MLSAE, torn, or disagree; or it
            needs a lens that cannot be had.
    """
    settings = _read_settings(config_path)
    translators = None if tuned_lens is None else read_tuned_lens(tuned_lens, {})
    with _open(weights_path, device) as file:
        names = list(file.keys())
        prefix = _prefix(names, weights_path)
        shapes = [tuple(file.get_slice(prefix + n).get_shape()) for n in _TENSORS]
        d_in, d_sae = _check_sizes(settings, shapes, config_path)
        warn_of_other_sizes(place, d_sae / d_in, settings["k"])
        n_layers = _n_layers_stored(names)
        if n_layers is None and translators is not None:
            n_layers = translators.config.num_hidden_layers
        origin = find_origin(settings, place, n_layers, model_name).at(hook_name)
        if origin.d_in not in (None, d_in):
            logger.warning(
                "The MLSAE at %s is for vectors of width %d, and those of %s have %d.",
                place,
                d_in,
                origin.model_name,
                origin.d_in,
            )
        translators = translators or _stored_translators(file, names, origin, d_in)
        lens = _lens(origin, d_in, translators)
        tensors = _read_tensors(file, prefix)
    cfg = _config(settings, d_in, d_sae, origin, lens and lens.config)
    dtype = str(tensors["W_enc"].dtype).removeprefix("torch.")
    cfg.update({"dtype": dtype, "device": device, **(overrides or {})})
    if cfg["architecture"] != ARCHITECTURE:
        tensors["W_enc"] = tensors["W_enc"].contiguous()
        tensors["b_enc"] = tensors["b_dec"].new_zeros(d_sae)
    if lens is not None:
        tensors.update(lens.to(device).state_dict(prefix=LENS_PREFIX))
    return cfg, _checked(tensors, str_to_dtype(cfg["dtype"]), weights_path)


def _read_tensors(file: Any, prefix: str) -> dict[str, Tensor]:
    """SAELens' tensors; in `W_enc` one latent's weights lie together in memory."""
    encoder, decoder, bias = (prefix + name for name in _TENSORS)
    return {
        "W_enc": file.get_tensor(encoder).T,
        "W_dec": file.get_tensor(decoder).T.contiguous(),
        "b_dec": file.get_tensor(bias),
    }


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
    origin = find_origin(settings, place, None, None).at(hook_name)
    d_in = settings.get("n_inputs", origin.d_in)
    if d_in is None:
        raise ValueError(f"{config_path} must state 'n_inputs'; it has {settings}.")
    d_sae = settings.get("n_latents") or settings["expansion_factor"] * d_in
    lens_config = origin.lens_config(d_in) if origin.has_lens else None
    cfg = _config(settings, d_in, d_sae, origin, lens_config)
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
    if not isinstance(settings.get("standardize", True), bool):
        raise ValueError(
            f"'standardize' in {path} must be true or false; it is "
            f"{settings['standardize']!r}."
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


def _stored_translators(
    file: Any, names: list[str], origin: Origin, d_in: int
) -> Translators | None:
    """The lens beside the SAE, as `read_tuned_lens` gives it; None if there is none."""
    own = [name for name in names if name.startswith(_TRANSLATORS)]
    if not own:
        return None
    tensors = {name.removeprefix(_TRANSLATORS): file.get_tensor(name) for name in own}
    n_layers = len({name.partition(".")[0] for name in tensors})
    config = TunedLensConfig(str(origin.model_name), d_in, n_layers)
    return Translators.validated(config, tensors)


def _lens(
    origin: Origin,
    d_in: int,
    translators: Translators | None,
) -> LayerLens | None:
    if translators is None:
        if not origin.has_lens:
            return None
        translators = read_tuned_lens(str(origin.model_name), {})
    config = translators.config_at(origin.hook_names, "reference")
    lens = LayerLens.from_tensors(config, translators.tensors_at(config))
    shape = hooks.ModelShape(origin.n_layers or config.n_layers, d_in, None)
    lens.config.check_shape(shape, str(origin.model_name))
    return lens


def _config(
    settings: dict[str, Any],
    d_in: int,
    d_sae: int,
    origin: Origin,
    lens_config: LensConfig | None,
) -> dict[str, Any]:
    hook_names = origin.hook_names
    metadata: dict[str, Any] = {
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


def _checked(
    tensors: dict[str, Tensor], dtype: torch.dtype, path: Path
) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        # Unlike `isfinite` of all, this takes no memory; NaN is passed on.
        extremes = torch.stack(tensor.aminmax())
        if not tensor.is_floating_point() or not extremes.isfinite().all():
            raise ValueError(
                f"{path} must hold finite floating-point numbers; {name} has the dtype "
                f"{tensor.dtype}, or NaN or infinite values."
            )
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}
