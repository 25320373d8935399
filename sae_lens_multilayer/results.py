"""Results on disk: tensors in safetensors, the rest in JSON."""

import json
from abc import ABC, abstractmethod
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_lens_multilayer.files import complete_or_absent

SETTINGS_FILE = "result.json"
TENSORS_FILE = "tensors.safetensors"

T_RESULT = TypeVar("T_RESULT", bound="Result")


class Result(ABC):
    """What a dataclass of tensors and plain values needs to be a result."""

    @abstractmethod
    def to_dataframe(self) -> pd.DataFrame:
        """The result as a table."""

    def save(self, path: str | Path) -> None:
        """Write the result to a new folder, which is complete or not there.

        Raises:
            FileExistsError: If something is at `path` already.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        tensors = {
            name: value.detach().cpu().contiguous().clone()
            for name, value in values.items()
            if isinstance(value, Tensor)
        }
        settings = {
            name: value for name, value in values.items() if name not in tensors
        }
        with complete_or_absent(path) as folder:
            save_file(tensors, folder / TENSORS_FILE)
            write_settings(folder, type(self).__name__, settings)

    @classmethod
    def load(cls: type[T_RESULT], path: str | Path) -> T_RESULT:
        """Read a result that `save` wrote.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is of another kind, or damaged.
        """
        settings = read_settings(path, cls.__name__)
        file = Path(path) / TENSORS_FILE
        check_is_file(file)
        try:
            return cls(**settings, **load_file(file))
        except (SafetensorError, TypeError) as error:
            raise ValueError(
                f"{path} must hold a {cls.__name__} as its `save` wrote it; {error}."
            ) from error


def write_settings(folder: Path, kind: str, settings: dict[str, Any]) -> None:
    """Write what is not a tensor, and what kind of result it belongs to."""
    text = json.dumps({"kind": kind, "settings": settings}, indent=1)
    (folder / SETTINGS_FILE).write_text(text)


def read_settings(path: str | Path, kind: str) -> dict[str, Any]:
    """Read what `write_settings` wrote.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it belongs to another kind of result, or is damaged.
    """
    found, settings = _read(path)
    if found != kind:
        raise ValueError(f"{path} must hold a {kind}; it holds a {found}.")
    return settings


def kind_of(path: str | Path) -> str:
    """The name of the class whose result is in a folder.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged.
    """
    return _read(path)[0]


def _read(path: str | Path) -> tuple[str, dict[str, Any]]:
    file = Path(path) / SETTINGS_FILE
    check_is_file(file)
    try:
        content = json.loads(file.read_text())
        return str(content["kind"]), dict(content["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} must be as `save` wrote it; {error!r}.") from error


def check_is_file(file: Path) -> None:
    """Raise FileNotFoundError unless a file of a saved result is there."""
    if not file.is_file():
        raise FileNotFoundError(
            f"{file.parent} must be the folder of a saved result; {file.name} is not "
            "there."
        )
