"""The record of a folder of analyses, from which a report can be made."""

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from sae_lens import SAE

from sae_lens_multilayer.cli.inputs import Inputs
from sae_lens_multilayer.record import (
    Record,
    as_lines,
    hash_of_json,
    hash_of_tensors,
)

ANALYSES_KIND = "analyses"

_NO_EFFECT = ("device", "batch_size_prompts")
"""Options on which no result depends."""

_PARTS = ("model", "text", "analysis")
"""The options that are recorded, each a dataclass."""

T = TypeVar("T")


def write_record(folder: Path, inputs: Inputs, options: Any) -> None:
    """Record the options, the SAE and the tokens of analyses in their folder."""
    settings = {name: _settings(getattr(options, name)) for name in _PARTS}
    Record(ANALYSES_KIND, settings, _fingerprints(inputs)).write(folder)


def with_settings(folder: str | Path, options: T) -> T:
    """Options with the values that a folder's analyses were run with.

    Raises:
        FileNotFoundError: If it is not a folder of analyses.
        ValueError: If an option is given another value, or the record is damaged.
    """
    saved, given = Record.read(folder, ANALYSES_KIND).settings, vars(options)
    try:
        parts = {name: _as_saved(given[name], saved[name], folder) for name in _PARTS}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"The record of {folder} is damaged: {error!r}.") from error
    return type(options)(**{**given, **parts})


def check_same(folder: str | Path, inputs: Inputs) -> None:
    """Raise ValueError unless a folder was written for this SAE and these tokens."""
    found = Record.read(folder, ANALYSES_KIND)
    found.warn_of_versions(Path(folder))
    wanted = Record(ANALYSES_KIND, {}, _fingerprints(inputs))
    if differences := found.differences(wanted):
        raise ValueError(
            f"The analyses in {folder} must be of the same SAE and text; they differ:"
            f"{as_lines(differences)}\nRun `analyze` again."
        )


def _as_saved(given: Any, saved: dict[str, Any], folder: str | Path) -> Any:
    default, mine = _settings(type(given)()), _settings(given)
    for name, value in saved.items():
        if mine[name] not in (default[name], value):
            raise ValueError(
                f"--{name} was {value!r} for the analyses in {folder}; got "
                f"{mine[name]!r}. Leave it out, or run `analyze` again."
            )
    return replace(given, **saved)


def _settings(options: Any) -> dict[str, Any]:
    """Options on which a result depends, with absolute paths."""
    return {n: _absolute(v) for n, v in vars(options).items() if n not in _NO_EFFECT}


def _absolute(value: Any) -> Any:
    if isinstance(value, list):
        return [_absolute(one) for one in value]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, str) and Path(value).expanduser().exists():
        return str(Path(value).expanduser().resolve())
    return value


def _fingerprints(inputs: Inputs) -> dict[str, str]:
    return {"SAE": _hash_of_sae(inputs.sae), "text": inputs.prompts.fingerprint}


def _hash_of_sae(sae: SAE[Any]) -> str:
    settings = {
        name: str(value)
        for name, value in sae.cfg.to_dict().items()
        if name not in ("device", "metadata")
    }
    return hash_of_json([settings, hash_of_tensors(sae.state_dict())])
