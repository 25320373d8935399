"""Loads and validates an SAE that commands receive, possibly damaged or hostile."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.registry import SAE_CLASS_REGISTRY
from safetensors import SafetensorError

from sae_lens_multilayer.files import read_json
from sae_lens_multilayer.published.loader import (
    has_published_files,
    own_or_mlsae_disk_loader,
)
from sae_lens_multilayer.text.prompts import Text

_METADATA_TYPES: dict[str, Any] = {
    **get_type_hints(Text),
    "model_name": str,
    "model_class_name": str,
    "model_from_pretrained_kwargs": dict[str, Any],
    "hook_name": str,
    "hook_names": list[str],
    "hook_head_index": int,
}
"""Types of the settings that commands read from an SAE's metadata, unless null."""


_DAMAGED = SafetensorError, ArithmeticError, LookupError, RuntimeError, TypeError
"""SAELens raises these for files that are torn or contradict each other."""


def load_sae(path: str, sae_id: str | None, device: str) -> SAE[Any]:
    """Load an SAE from a folder, SAELens' own or of published files, or a release.

    Args:
        path: The folder; with `sae_id`, the name of a release.
    """
    if sae_id is not None:
        return SAE.from_pretrained(path, sae_id, device=device)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{path} must be the folder of a saved SAE, or a release with --sae_id."
        )
    if not has_published_files(folder):
        check_config(folder / SAE_CFG_FILENAME)
    try:
        return SAE.load_from_disk(
            folder, device=device, converter=own_or_mlsae_disk_loader
        )
    except _DAMAGED as e:
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        raise ValueError(f"{folder} must hold a complete SAE; {reason}") from e


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
