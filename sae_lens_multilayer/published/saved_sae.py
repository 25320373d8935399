"""Loads a saved SAE, possibly damaged or hostile, and the model of its metadata."""

import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata
from safetensors import SafetensorError

from sae_lens_multilayer.files import read_json
from sae_lens_multilayer.models import loading
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.models.model import check_widths
from sae_lens_multilayer.published.loader import (
    has_published_files,
    mlsae_disk_loader,
    own_or_mlsae_disk_loader,
)
from sae_lens_multilayer.sae.views import hook_names_of
from sae_lens_multilayer.text.prompts import Prompts, Text

logger = logging.getLogger(__name__)

_METADATA_TYPES: dict[str, Any] = {
    **get_type_hints(Text),
    "model_name": str,
    "model_class_name": str,
    "model_from_pretrained_kwargs": dict[str, Any],
    "hook_name": str,
    "hook_names": list[str],
    "hook_head_index": int,
}
"""Types of the settings that are read from an SAE's metadata, unless null."""

_SAFE_KWARGS = {
    *("revision", "subfolder", "variant", "dtype", "torch_dtype", "n_ctx"),
    *("first_n_layers", "fold_ln", "center_writing_weights", "center_unembed"),
    *("fold_value_biases", "refactor_factored_attn_matrices", "default_prepend_bos"),
    *("default_padding_side", "low_cpu_mem_usage"),
}
"""Arguments for loading a model that an SAE's metadata may set: none can run code."""

_DAMAGED = SafetensorError, ArithmeticError, LookupError, RuntimeError, TypeError
"""SAELens raises these for files that are torn or contradict each other."""


def load_sae(
    path: str, sae_id: str | None, device: str, model_name: str | None = None
) -> SAE[Any]:
    """Load an SAE from a folder, SAELens' own or of published files, or a release.

    Args:
        path: The folder; with `sae_id`, the name of a release.
        model_name: The model of published files, if the folder does not name it.
    """
    if sae_id is not None:
        return SAE.from_pretrained(path, sae_id, device=device)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{path} must be the folder of a saved SAE, or a release with --sae_id."
        )
    converter: Any = own_or_mlsae_disk_loader
    if has_published_files(folder):
        converter = partial(mlsae_disk_loader, model_name=model_name)
    else:
        if not (folder / SAE_CFG_FILENAME).is_file():
            raise FileNotFoundError(
                f"{path} must be the folder of a saved SAE; it has no "
                f"{SAE_CFG_FILENAME}. Give the folder that a run wrote."
            )
        check_config(folder / SAE_CFG_FILENAME)
    try:
        return SAE.load_from_disk(folder, device=device, converter=converter)
    except _DAMAGED as e:
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        raise ValueError(f"{folder} must hold a complete SAE; {reason}") from e


def load_model(
    metadata: SAEMetadata,
    hook_names: Sequence[str] | None,
    device: str,
    *,
    model_name: str | None = None,
    model_class_name: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load the model of an SAE's metadata, or another one.

    Args:
        hook_names: Hooks to install on a Hugging Face model; None: all.
        model_name, model_class_name: Instead of those in the metadata.
        model_kwargs: Arguments for loading the model, besides those in the metadata
            that cannot run code.
        trust_remote_code: Use all arguments in the metadata, and run code in the
            model's repository.

    Raises:
        ValueError: If no name is given, or the class has no such model.
    """
    name = model_name or metadata.model_name
    if name is None:
        raise ValueError("The SAE's metadata has no `model_name`: give `model_name`.")
    saved_class = metadata.model_class_name or "HookedTransformer"
    class_name = model_class_name or loading.usable_class(saved_class, name, hook_names)
    # A model of another class or name has other arguments.
    is_same = (class_name, name) == (saved_class, metadata.model_name)
    saved = metadata.model_from_pretrained_kwargs if is_same else None
    kwargs = {**_allowed(saved or {}, trust_remote_code), **(model_kwargs or {})}
    logger.info("Loading the model %s (%s)", name, class_name)
    return loading.load_by_name(class_name, name, kwargs, device, hook_names)


def _allowed(kwargs: dict[str, Any], trust_remote_code: bool) -> dict[str, Any]:
    if trust_remote_code:
        return {**kwargs, "trust_remote_code": True}
    if left_out := sorted(kwargs.keys() - _SAFE_KWARGS):
        logger.warning(
            "Arguments for loading the model that may run code are not used: %s. "
            "--trust_remote_code uses them.",
            {name: kwargs[name] for name in left_out},
        )
    return {n: value for n, value in kwargs.items() if n in _SAFE_KWARGS}


@torch.no_grad()
def check_model(sae: SAE[Any], model: Any, prompts: Prompts) -> None:
    """Raise ValueError unless the model has the SAE's hooks, of the SAE's width."""
    names = hook_names_of(sae)
    heads = [sae.cfg.metadata.hook_head_index] * len(names)
    vectors = as_model(model).vectors(prompts.ids[:1, :1], names, heads)
    widths = {name: x.shape[-1] for name, x in zip(names, vectors, strict=True)}
    check_widths(widths, sae.cfg.d_in)


def check_config(file: Path) -> None:
    """Raise ValueError if a value in an SAE's `cfg.json` has a wrong type."""
    values = read_json(file)
    _check_types(file, values, {"architecture": str, "metadata": dict[str, Any]})
    architecture = values.get("architecture", "standard")
    if architecture not in SAE_CLASS_REGISTRY:
        known = sorted(SAE_CLASS_REGISTRY)
        raise ValueError(
            f"{file}: `architecture` must be one of {known}; got {architecture!r}."
        )
    types = get_type_hints(SAE_CLASS_REGISTRY[architecture][1])
    _check_types(file, values, {n: t for n, t in types.items() if n != "metadata"})
    sizes = {name: values[name] for name in ("d_in", "d_sae", "k") if name in values}
    sizes |= {n: v for n, v in metadata_of(values).items() if n == "context_size"}
    _check_types(file, metadata_of(values), _METADATA_TYPES)
    if wrong := {name: size for name, size in sizes.items() if size < 1}:
        raise ValueError(f"{file}: sizes must be at least 1; got {wrong}.")


def metadata_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in the metadata that are not null."""
    return {n: v for n, v in values.get("metadata", {}).items() if v is not None}


def _check_types(
    file: Path, values: Mapping[str, Any], types: Mapping[str, Any]
) -> None:
    for name in values.keys() & types.keys():
        try:
            json_value = json.dumps(values[name])
            TypeAdapter(types[name]).validate_json(json_value, strict=True)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise ValueError(
                f"{file}: `{name}`: {reason}; got {values[name]!r:.80}."
            ) from error
