"""Results on disk: tensors in safetensors, everything else in the record."""

from abc import ABC, abstractmethod
from copy import copy
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from safetensors.torch import save_file
from torch import Tensor

from sae_lens_multilayer.files import complete_or_absent, read_tensors
from sae_lens_multilayer.pictures.description import Picture
from sae_lens_multilayer.record import Record

TENSORS_FILE = "tensors.safetensors"

T_RESULT = TypeVar("T_RESULT", bound="Result")


class Result(ABC):
    """A dataclass of tensors and plain values, with its table and its pictures."""

    @abstractmethod
    def to_dataframe(self) -> pd.DataFrame:
        """The result as a table."""

    def pictures(self, **context: Any) -> dict[str, Picture]:
        """Pictures of the result, by the end of their file names ("" for a single one).

        Args:
            context: Such as `text_of`, which returns the text of a token id; a result
                ignores what it does not use.
        """
        return {}

    def numbers(self) -> dict[str, float]:
        """Numbers that a sweep reports for each of its points."""
        return {}

    def save(self, path: str | Path, tokenizer: Any = None) -> None:
        """Write the result to a new folder, which is complete or absent.

        Args:
            path: The new folder; FileExistsError if it exists.
            tokenizer: Used by results that store the text of tokens.
        """
        values = vars(self.on_cpu())
        tensors = {n: v for n, v in values.items() if isinstance(v, Tensor)}
        settings = {n: v for n, v in values.items() if n not in tensors}
        with complete_or_absent(path) as folder:
            save_file(tensors, folder / TENSORS_FILE)
            Record(type(self).__name__, settings).write(folder)

    def on_cpu(self: T_RESULT) -> T_RESULT:
        """A copy with its own contiguous tensors on the CPU."""
        result = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                own = value.detach().to("cpu", copy=True).contiguous()
                setattr(result, name, own)
        return result

    @classmethod
    def load(cls: type[T_RESULT], path: str | Path) -> T_RESULT:
        """Read a result that `save` wrote; ValueError if it is of another class."""
        settings = Record.read(path, cls.__name__).settings
        values = settings | read_tensors(Path(path) / TENSORS_FILE)
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(
                f"{path} was saved by another version of this package: {error}. "
                "Compute it again."
            ) from error

    @classmethod
    def kinds(cls) -> "dict[str, type[Result]]":
        """All classes of results by their name."""
        found: dict[str, type[Result]] = {}
        for kind in cls.__subclasses__():
            found |= {kind.__name__: kind} | kind.kinds()
        return found
