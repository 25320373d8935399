"""Results on disk: tensors in safetensors, everything else in the record."""

from abc import ABC, abstractmethod
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

import pandas as pd
from safetensors.torch import save_file
from torch import Tensor

from sae_lens_multilayer.files import complete_or_absent, read_tensors
from sae_lens_multilayer.record import Record

TENSORS_FILE = "tensors.safetensors"

T_RESULT = TypeVar("T_RESULT", bound="Result")


class Result(ABC):
    """What a dataclass of tensors and plain values needs to be a result."""

    @abstractmethod
    def to_dataframe(self) -> pd.DataFrame:
        """The result as a table."""

    def save(self, path: str | Path) -> None:
        """Write the result to a new folder, which is complete or not there."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        tensors = {
            name: value.detach().cpu().contiguous().clone()
            for name, value in values.items()
            if isinstance(value, Tensor)
        }
        settings = {k: v for k, v in values.items() if k not in tensors}
        with complete_or_absent(path) as folder:
            save_file(tensors, folder / TENSORS_FILE)
            Record(type(self).__name__, settings).write(folder)

    @classmethod
    def load(cls: type[T_RESULT], path: str | Path) -> T_RESULT:
        """Read a result that `save` wrote; see `Record.read` for the errors."""
        settings = Record.read(path, cls.__name__).settings
        return cls(**settings, **read_tensors(Path(path) / TENSORS_FILE))
