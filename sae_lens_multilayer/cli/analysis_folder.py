"""What a folder of analyses says of itself, so that a report can be made of it."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from sae_lens import SAE

from sae_lens_multilayer.cli.inputs import Inputs
from sae_lens_multilayer.files import read_json

SETTINGS_FILE = "analysis.json"

_ANY = ("device", "batch_size_prompts")
"""Options on which no result depends."""

_PARTS = ("model", "text", "analysis")
"""The options that are kept, each a dataclass."""

T = TypeVar("T")


def write_settings(folder: Path, inputs: Inputs, options: Any) -> None:
    """Write with which options, and of which SAE and tokens, analyses were made."""
    saved = {name: _settings(getattr(options, name)) for name in _PARTS}
    text = json.dumps({"options": saved, "of": _fingerprint(inputs)}, indent=1)
    (folder / SETTINGS_FILE).write_text(text)


def with_settings(folder: str | Path, options: T) -> T:
    """Options as they were when a folder was written.

    Raises:
        FileNotFoundError: If it is no such folder.
        ValueError: If an option is given that was another one, or the file is damaged.
    """
    file = Path(folder) / SETTINGS_FILE
    saved, given = _read(file, "options"), vars(options)
    try:
        parts = {name: _as_saved(given[name], saved[name], file) for name in _PARTS}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} must be as `analyze` wrote it; {error!r}.") from error
    return type(options)(**{**given, **parts})


def check_same(folder: str | Path, inputs: Inputs) -> None:
    """Raise ValueError unless a folder was written of this SAE and these tokens."""
    saved, found = _read(Path(folder) / SETTINGS_FILE, "of"), _fingerprint(inputs)
    if other := [name for name in found if saved.get(name) != found[name]]:
        raise ValueError(
            f"The analyses in {folder} must be of the same SAE and text; they are of "
            f"another {' and '.join(other)}. Run `analyze` again."
        )


def _read(file: Path, part: str) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(
            f"{file.parent} must be a folder that `analyze` wrote; {file.name} is not "
            "there."
        )
    found = read_json(file)
    if not isinstance(found, dict) or not isinstance(found.get(part), dict):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"{file} must be as `analyze` wrote it; it has no {part!r}.")
    return found[part]


def _as_saved(given: Any, saved: dict[str, Any], file: Path) -> Any:
    default, mine = _settings(type(given)()), _settings(given)
    for name, value in saved.items():
        if mine[name] not in (default[name], value):
            raise ValueError(
                f"--{name} was {value!r} for the analyses in {file.parent}; got "
                f"{mine[name]!r}. Leave it out, or analyse anew."
            )
    return replace(given, **saved)


def _settings(options: Any) -> dict[str, Any]:
    """Options on which a result depends, with paths that hold in any folder."""
    return {n: _whole(v) for n, v in vars(options).items() if n not in _ANY}


def _whole(value: Any) -> Any:
    if isinstance(value, list):
        return [_whole(one) for one in value]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, str) and Path(value).expanduser().exists():
        return str(Path(value).expanduser().resolve())
    return value


def _fingerprint(inputs: Inputs) -> dict[str, str]:
    return {"SAE": _hash_of_sae(inputs.sae), "text": inputs.prompts.fingerprint}


def _hash_of_sae(sae: SAE[Any]) -> str:
    settings = {
        name: value
        for name, value in sae.cfg.to_dict().items()
        if name not in ("device", "metadata")
    }
    found = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(sae.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()
