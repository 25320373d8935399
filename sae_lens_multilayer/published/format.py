"""Reads the two files of a published checkpoint as SAELens' config and tensors."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens import __version__ as sae_lens_version
from sae_lens.util import str_to_dtype
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tuned_lens.nn.lenses import TunedLensConfig

from sae_lens_multilayer import hooks
from sae_lens_multilayer.files import read_json
from sae_lens_multilayer.lens.carrier import LENS_PREFIX
from sae_lens_multilayer.lens.config import LensConfig
from sae_lens_multilayer.lens.lens import LayerLens
from sae_lens_multilayer.lens.tuned_lens_files import read_tuned_lens
from sae_lens_multilayer.models.loading import shape_by_name
from sae_lens_multilayer.models.model import ModelShape
from sae_lens_multilayer.published.releases import PublishedName, published_model
from sae_lens_multilayer.sae.config import ARCHITECTURE
from sae_lens_multilayer.topk.tile import wide_dtype

_TENSORS = ("encoder.weight", "decoder.weight", "pre_encoder_bias")
_BESIDE_TRANSFORMER = "autoencoder."
_TRANSLATORS = "lens.layer_translators."
# The first number in such a name is that of the block.
_BLOCK = re.compile(r"transformer\.model\.\D+\.(\d+)\.")
# Of the paper's training runs; a `-tfm` config has its own context size.
_DATASET, _CONTEXT_SIZE = "monology/pile-uncopyrighted", 2048

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """The model and hooks that a checkpoint was trained on; None where unknown."""

    model_name: str | None
    hook_names: list[str]
    """Empty if the model is unknown."""
    n_layers: int | None
    d_in: int | None
    """The model's width."""
    has_lens: bool
    """Whether the inputs were transformed by the model's tuned lens."""


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
        location: The repository or folder, which may have a published name.
        overrides: Entries that replace those of the config.
        model_name, tuned_lens: As in `mlsae_disk_loader`.
    """
    settings = _read_settings(config_path)
    lens_source = None if tuned_lens is None else read_tuned_lens(tuned_lens)
    with _open(weights_path, device) as file:
        names = set(file.keys())
        prefix = "" if names.issuperset(_TENSORS) else _BESIDE_TRANSFORMER
        d_in, d_sae = _sizes(file, prefix, settings, weights_path)
        # Of the transformer beside the SAE.
        blocks = [int(block[1]) for block in map(_BLOCK.match, names) if block]
        n_layers = max(blocks) + 1 if blocks else None
        if n_layers is None and lens_source is not None:
            n_layers = lens_source[0].num_hidden_layers
        origin = find_origin(settings, location, n_layers, model_name, hook_name)
        _warn_of_differences(location, origin, d_in, d_sae, settings["k"])
        lens_source = lens_source or _stored_translators(file, origin, d_in)
        lens = _make_lens(origin, d_in, lens_source)
        encoder, decoder, bias = (file.get_tensor(prefix + n) for n in _TENSORS)
    # SAELens' shapes; in `W_enc` the weights of one latent are contiguous.
    tensors = {"W_enc": encoder.T, "W_dec": decoder.T.contiguous(), "b_dec": bias}
    cfg = _make_config(settings, d_in, d_sae, origin, lens and lens.config)
    stored_dtype = str(tensors["W_enc"].dtype).removeprefix("torch.")
    cfg.update({"dtype": stored_dtype, "device": device, **(overrides or {})})
    if cfg["architecture"] != ARCHITECTURE:
        tensors["W_enc"] = tensors["W_enc"].contiguous()
        tensors["b_enc"] = tensors["b_dec"].new_zeros(d_sae)
    dtype = str_to_dtype(cfg["dtype"])
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    if lens is not None:
        tensors.update(
            lens.to(device, wide_dtype(dtype)).state_dict(prefix=LENS_PREFIX)
        )
    return cfg, tensors


def load_config(
    config_path: Path,
    location: str,
    device: str | None,
    overrides: dict[str, Any] | None,
    hook_name: str | None = None,
) -> dict[str, Any]:
    """The config alone. A `-tfm` config has no sizes, which are then the model's."""
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
    settings = read_json(path)
    if "k" not in settings or not {"n_latents", "expansion_factor"} & settings.keys():
        raise ValueError(
            f"{path} must be the config of an MLSAE, with 'k' and with 'n_latents' or "
            f"'expansion_factor'; it has {list(settings)}."
        )
    return settings


def _open(path: Path, device: str) -> Any:
    try:
        return safe_open(path, framework="pt", device=device)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} must be a complete safetensors file ({error}). Download it again: "
            "`SAE.from_pretrained(..., force_download=True)`."
        ) from error


def _sizes(
    file: Any, prefix: str, settings: dict[str, Any], path: Path
) -> tuple[int, int]:
    """d_in and d_sae of the tensors, validated against the config."""
    try:
        shapes = [tuple(file.get_slice(prefix + n).get_shape()) for n in _TENSORS]
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not an MLSAE: it must hold {list(_TENSORS)}, with or without "
            f"the prefix {_BESIDE_TRANSFORMER!r} ({error})."
        ) from error
    d_sae, d_in = shapes[0]
    found = {"n_inputs": d_in, "n_latents": d_sae, "expansion_factor": d_sae / d_in}
    if (
        shapes[1:] != [(d_in, d_sae), (d_in,)]
        or any(settings.get(name, size) != size for name, size in found.items())
        or not 0 < settings["k"] <= d_sae
    ):
        raise ValueError(
            f"{path} and its config contradict each other: the config has {settings}, "
            f"and {list(_TENSORS)} have the shapes {shapes}."
        )
    return d_in, d_sae


_NAME_IT = (
    "Give the folder the repository's name, or name the model or its folder: "
    "converter=partial(mlsae_disk_loader, model_name=...), --model-name of commands"
)


def _shape_of_model(model_name: str, source: str, location: str) -> ModelShape:
    try:
        shape = shape_by_name("HookedTransformer", model_name)
    except ValueError as error:
        raise ValueError(
            f"The language model of the MLSAE at {location} is {model_name!r} "
            f"{source}. {_NAME_IT}. {error}"
        ) from error
    if shape is None:
        raise FileNotFoundError(
            f"The config of {model_name!r} is not cached, and the Hugging Face hub "
            "cannot be reached."
        )
    return shape


def find_origin(
    settings: dict[str, Any],
    location: str,
    n_layers: int | None,
    model_name: str | None,
    hook_name: str | None,
) -> Origin:
    """The model and hooks, from the config, the location and the stored tensors."""
    name = PublishedName.find_in(location)
    has_lens = bool(settings.get("tuned_lens")) or (name is not None and name.has_lens)
    candidates = [settings.get("model_name"), name.model if name else None]
    is_given = bool(model_name)
    candidates = [c for c in ([model_name] if is_given else candidates) if c]
    published = next(filter(None, map(published_model, candidates)), None)
    d_in = None
    if published is not None:
        model_name, d_in = published.name, published.d_in
        n_layers = n_layers or published.n_layers
    elif candidates:
        model_name = candidates[0]
        if n_layers is None:
            source = "as given" if is_given else "by its config or name"
            shape = _shape_of_model(candidates[0], source, location)
            n_layers, d_in = shape.n_layers, shape.d_model
    if n_layers is None:
        problem = (
            f"The language model of the MLSAE at {location} is unknown, so it has no "
            f"hooks, no views and no lens. {_NAME_IT}."
        )
        if has_lens:
            raise ValueError(problem)
        logger.warning("%s", problem)
        return Origin(None, [], None, None, has_lens)
    layers = settings.get("layers")
    if layers is None and name is not None and name.layer is not None:
        layers = [name.layer]
    hook_names = hooks.resolve_hook_names(
        hooks.DEFAULT_HOOK_NAME, None, layers, n_layers, str(model_name)
    )
    if hook_name is not None:
        hook_names = [hook_names[hooks.find_hook(hook_names, hook_name)]]
    return Origin(model_name, hook_names, n_layers, d_in, has_lens)


def _warn_of_differences(
    location: str, origin: Origin, d_in: int, d_sae: int, k: int
) -> None:
    """Warn if the sizes are not those of the model or of the published name."""
    found, expected = {"d_in": d_in}, {"d_in": origin.d_in or d_in}
    name = PublishedName.find_in(location)
    if name is not None:
        found |= {"d_sae": d_sae, "k": k}
        expected |= {"d_sae": name.expansion_factor * d_in, "k": name.k}
    if found != expected:
        logger.warning(
            "The MLSAE at %s has %s, but its name or its model %s has %s.",
            location,
            found,
            origin.model_name,
            expected,
        )


def _stored_translators(
    file: Any, origin: Origin, d_in: int
) -> tuple[TunedLensConfig, dict[str, Tensor]] | None:
    """The tuned lens stored beside the SAE; None if there is none."""
    tensors = {
        name.removeprefix(_TRANSLATORS): file.get_tensor(name)
        for name in file.keys()  # noqa: SIM118  (not iterable)
        if name.startswith(_TRANSLATORS)
    }
    n_layers = len({name.partition(".")[0] for name in tensors})
    config = TunedLensConfig(str(origin.model_name), d_in, n_layers)
    return (config, tensors) if tensors else None


def _make_lens(
    origin: Origin,
    d_in: int,
    lens_source: tuple[TunedLensConfig, dict[str, Tensor]] | None,
) -> LayerLens | None:
    if lens_source is None:
        if not origin.has_lens:
            return None
        lens_source = read_tuned_lens(str(origin.model_name))
    lens = LayerLens.from_translators(*lens_source, origin.hook_names, "reference")
    shape = ModelShape(origin.n_layers or lens.config.n_layers, d_in)
    lens.config.check_shape(shape, str(origin.model_name))
    return lens


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
        metadata["lens"] = lens_config.to_dict()
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
