"""One shard of a cache: the vectors of some prompts, in a safetensors file.

`activations.safetensors` holds, for each hook under its name, `[token, d_in]`; and

- `tokens [prompt, pos]`: the whole prompts that the model ran on;
- `prompt [token]` and `position [token]`: which of them each row of vectors belongs to.

The hash of all of them is in the file's metadata. The folder of a shard also holds the
source's state after it, from which an interrupted harvest is resumed.
"""

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sae_lens_multilayer.record import hash_of_tensors

ACTIVATIONS_FILENAME = "activations.safetensors"


class ShardTokens(NamedTuple):
    """The text of a shard."""

    tokens: Int[Tensor, "prompt pos"]
    """The whole prompts that the model ran on."""
    prompt: Int[Tensor, " token"]
    """Index of the prompt of each row of vectors."""
    position: Int[Tensor, " token"]
    """Its position in that prompt."""

    @property
    def token_ids(self) -> Int[Tensor, " token"]:
        """Token id of each row of vectors."""
        return self.tokens[self.prompt.long(), self.position.long()]


class ShardInMemory:
    """A shard that is being filled; its memory is allocated once and reused."""

    def __init__(
        self, hook_names: Sequence[str], capacity: int, d_in: int, dtype: torch.dtype
    ) -> None:
        """Allocate memory for `capacity` tokens."""
        self._vectors: dict[str, Float[Tensor, "token d_in"]] = {
            name: torch.empty(capacity, d_in, dtype=dtype) for name in hook_names
        }
        self._capacity = capacity
        self.clear()

    def clear(self) -> None:
        """Make it empty."""
        self.n_tokens = 0
        self._prompts: list[Int[Tensor, "prompt pos"]] = []
        self._prompt: list[Int[Tensor, " token"]] = []
        self._position: list[Int[Tensor, " token"]] = []

    @property
    def n_free(self) -> int:
        """Tokens that can be added."""
        return self._capacity - self.n_tokens

    def add(
        self,
        prompts: Int[Tensor, "prompt pos"],
        token_indices: Int[Tensor, " token"],
        vectors: Iterable[Float[Tensor, "token d_in"]],
    ) -> None:
        """Add tokens, given as indices into flattened prompts, hook by hook."""
        end = self.n_tokens + len(token_indices)
        for memory, of_hook in zip(self._vectors.values(), vectors, strict=True):
            memory[self.n_tokens : end] = of_hook
        n_before, n_pos = sum(map(len, self._prompts)), prompts.shape[1]
        self._prompts.append(prompts.int())
        self._prompt.append((n_before + token_indices // n_pos).int())
        self._position.append((token_indices % n_pos).int())
        self.n_tokens = end

    def save(self, folder: Path) -> None:
        """Write it into a folder."""
        tensors = {name: rows[: self.n_tokens] for name, rows in self._vectors.items()}
        tensors["tokens"] = torch.cat(self._prompts)
        tensors["prompt"] = torch.cat(self._prompt)
        tensors["position"] = torch.cat(self._position)
        metadata = {"hash": hash_of_tensors(tensors)}
        save_file(tensors, folder / ACTIVATIONS_FILENAME, metadata)


@dataclass(frozen=True)
class Shard:
    """A shard on disk. Its file is mapped only while something is read from it."""

    folder: Path
    n_tokens: int
    n_bytes: int
    """Size of its file."""
    hash: str
    """Hash of its tensors when it was saved."""

    @classmethod
    def open(cls, folder: Path) -> "Shard":
        """Open a shard that was saved."""
        n_bytes = (folder / ACTIVATIONS_FILENAME).stat().st_size
        with _opened(folder) as file:
            n_tokens = file.get_slice("prompt").get_shape()[0]
            return cls(folder, n_tokens, n_bytes, file.metadata()["hash"])

    @property
    def numbers(self) -> dict[str, Any]:
        """Its fields beside its folder."""
        return {"n_tokens": self.n_tokens, "n_bytes": self.n_bytes, "hash": self.hash}

    def check_size(self) -> None:
        """Raise ValueError if its file is missing or has another size."""
        path = self.folder / ACTIVATIONS_FILENAME
        if not path.is_file():
            raise ValueError(f"{self.folder} is missing.")
        if (n_bytes := path.stat().st_size) != self.n_bytes:
            raise ValueError(f"{self.folder} has {n_bytes} bytes, not {self.n_bytes}.")

    def vectors(
        self, rows: slice, hook_names: Sequence[str]
    ) -> Generator[Float[Tensor, "token d_in"]]:
        """Some of its vectors, hook by hook, as views of the mapped file."""
        with _opened(self.folder) as file:
            for name in hook_names:
                yield file.get_slice(name)[rows]

    def tokens(self) -> ShardTokens:
        """Its prompts, and the token that each row of vectors belongs to."""
        with _opened(self.folder) as file:
            return ShardTokens(
                *(file.get_tensor(name).clone() for name in ShardTokens._fields)
            )

    def verify(self, hook_names: Sequence[str]) -> None:
        """Raise ValueError if its content, of all hooks, was changed."""
        with _opened(self.folder) as file:
            names = [*hook_names, *ShardTokens._fields]
            found = hash_of_tensors({name: file.get_tensor(name) for name in names})
        if found != self.hash:
            raise ValueError(f"{self.folder} was changed since it was saved.")


@contextmanager
def _opened(folder: Path) -> Generator[Any]:
    try:
        with safe_open(folder / ACTIVATIONS_FILENAME, framework="pt") as file:
            yield file
    except (FileNotFoundError, SafetensorError) as error:
        raise ValueError(f"{folder} is missing or damaged: {error}.") from error
