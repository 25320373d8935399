"""What a folder was made of: one format and one comparison for all our folders.

Checkpoints, caches, folders of analyses, points of a sweep and results each hold a
`record.json`. A folder is resumed or reused if its record has no differences.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from sae_lens_multilayer.files import read_json, write_whole

RECORD_FILENAME = "record.json"
SAMPLES_PER_PARAMETER = 1024
"""Entries of each parameter that `weights_hash` reads, evenly spaced."""

_PACKAGES = (
    "sae-lens-multilayer",
    "sae-lens",
    "transformer-lens",
    "transformers",
    "torch",
    "safetensors",
)

logger = logging.getLogger(__name__)


@cache
def package_versions() -> dict[str, str]:
    """Installed versions of this package and of those that results depend on."""
    found: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


@dataclass(frozen=True)
class Record:
    """What a folder was made of."""

    kind: str
    """Kind of the folder, such as "cache" or "Variances"."""
    settings: dict[str, Any]
    """Values that JSON can hold; tuples become lists."""
    fingerprints: dict[str, Any] = field(default_factory=dict[str, Any])
    """Hashes of the inputs, such as the model's weights."""
    versions: dict[str, str] = field(default_factory=package_versions)
    """Versions of packages; other versions are no difference."""

    def __post_init__(self) -> None:
        settings = json.loads(json.dumps(self.settings))
        object.__setattr__(self, "settings", settings)

    def write(self, folder: Path) -> None:
        """Write `record.json` into a folder; an earlier one is replaced."""
        write_whole(folder / RECORD_FILENAME, json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, folder: str | Path, kind: str | None = None) -> "Record":
        """Read the record of a folder; ValueError if it is not of this kind."""
        path = Path(folder) / RECORD_FILENAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} must be a folder of kind {kind or 'any'!r}; it has no "
                f"{RECORD_FILENAME}."
            )
        values = read_json(path)
        if kind not in (None, values["kind"]):
            raise ValueError(
                f"{folder} must be of kind {kind!r}; its {RECORD_FILENAME} has "
                f"{values['kind']!r}."
            )
        return cls(**values)

    @classmethod
    def read_same(cls, folder: str | Path, wanted: "Record", advice: str) -> "Record":
        """The record of a folder; ValueError if it differs from what is needed now.

        Args:
            advice: What to do then.
        """
        found = cls.read(folder, wanted.kind)
        if differences := found.differences(wanted):
            raise ValueError(
                f"{folder} was made with other settings or inputs:"
                f"{as_lines(differences)}\n{advice}"
            )
        return found

    def differences(self, wanted: "Record", ignore: Sequence[str] = ()) -> list[str]:
        """A line for each setting and fingerprint that differs from what is needed now.

        Entries that only one of the two records has are not compared.
        """
        found = self.settings | self.fingerprints
        return [
            f"`{name}`: {found[name]!r} in the folder, {value!r} here"
            for name, value in (wanted.settings | wanted.fingerprints).items()
            if name in found and name not in ignore and found[name] != value
        ]

    def warn_of_versions(self, folder: Path) -> None:
        """Log the packages that had another version when a folder was written."""
        now = package_versions()
        changed = [
            f"{name} {old} (now {now.get(name)})"
            for name, old in self.versions.items()
            if old != now.get(name)
        ]
        if changed:
            logger.warning(
                "%s was written with other package versions: %s.",
                folder,
                ", ".join(changed),
            )


def as_lines(differences: Sequence[str]) -> str:
    """Differences as indented lines of an error message."""
    return "".join(f"\n  {line}" for line in differences)


def hash_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hash (XXH3, 128 bits) of names, shapes, dtypes and values of tensors."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_of_json(value: Any) -> str:
    """Hash (XXH3, 128 bits) of a value as JSON with sorted keys."""
    text = json.dumps(value, sort_keys=True)
    return xxhash.xxh3_128(text.encode()).hexdigest()


def sae_hash(sae: Any) -> str:
    """Hash of an SAE's settings and hooks, and of all its tensors."""
    values = sae.cfg.to_dict().items()
    settings = {n: str(v) for n, v in values if n not in ("device", "metadata")}
    hook_names = getattr(sae.cfg.metadata, "hook_names", None)
    return hash_of_json([settings, hook_names, hash_of_tensors(sae.state_dict())])


def weights_hash(module: torch.nn.Module) -> str:
    """Hash of up to `SAMPLES_PER_PARAMETER` entries of each of a model's parameters."""
    samples: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        flat = parameter.detach().reshape(-1)
        n = min(len(flat), SAMPLES_PER_PARAMETER)
        indices = torch.arange(n) * (len(flat) - 1) // max(1, n - 1)
        samples[f"{name} {tuple(parameter.shape)}"] = flat[indices.to(flat.device)]
    return hash_of_tensors(samples)


def tokenizer_hash(tokenizer: Any) -> str | None:
    """Hash of all that decides a tokenizer's tokens; None if there is no tokenizer."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = tokenizer.get_vocab()
    else:
        rules = json.loads(backend.to_str())
        del rules["truncation"], rules["padding"]  # changed by calls of the tokenizer
    special = {key: str(token) for key, token in tokenizer.special_tokens_map.items()}
    return hash_of_json([rules, special])


def model_fingerprints(model: Any) -> dict[str, str | None]:
    """Hashes of a model's weights and of its tokenizer."""
    return {
        "weights_hash": weights_hash(model),
        "tokenizer_hash": tokenizer_hash(getattr(model, "tokenizer", None)),
    }
