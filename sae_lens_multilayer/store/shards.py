"""One shard of a cache: the vectors of some prompts, in a file of safetensors.

`activations.safetensors` holds, for each hook under its name, `[token, d_in]`; and

- `tokens [prompt, pos]`: the prompts that the model ran on, whole;
- `prompt [token]` and `position [token]`: which of them each row of vectors is of;
- `checksums [block, hook]`: XXH3 of each hook's vectors, block by block.

Beside it lies where the store stood after it, from where harvesting goes on.
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

from sae_lens_multilayer.fingerprints import checksum
from sae_lens_multilayer.store.manifest import Manifest, ShardEntry

ACTIVATIONS_FILENAME = "activations.safetensors"


class ShardTokens(NamedTuple):
    """The text of a shard."""

    tokens: Int[Tensor, "prompt pos"]
    """The prompts that the model ran on, whole."""
    prompt: Int[Tensor, " token"]
    """Which prompt a row of vectors is of."""
    position: Int[Tensor, " token"]
    """And which position in it."""

    @property
    def token_ids(self) -> Int[Tensor, " token"]:
        """The token of each row of vectors."""
        return self.tokens[self.prompt.long(), self.position.long()]


class ShardInMemory:
    """A shard that is being filled; its memory is allocated once and used again."""

    def __init__(
        self, hook_names: Sequence[str], capacity: int, d_in: int, dtype: torch.dtype
    ) -> None:
        """Allocate the memory.

        Args:
            capacity: Tokens that it can hold.
        """
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
        rows: Int[Tensor, " token"],
        positions: Int[Tensor, " kept_pos"],
        vectors: Iterable[Float[Tensor, "token d_in"]],
    ) -> None:
        """Add the tokens of some prompts.

        Args:
            rows: Which have vectors, by their places in `prompts[:, positions]`.
            vectors: Of these, hook by hook.
        """
        end = self.n_tokens + len(rows)
        for into, of_hook in zip(self._vectors.values(), vectors, strict=True):
            into[self.n_tokens : end] = of_hook
        n_before = sum(map(len, self._prompts))
        self._prompts.append(prompts.cpu().int())
        self._prompt.append((n_before + rows // len(positions)).int())
        self._position.append(positions[rows % len(positions)].int())
        self.n_tokens = end

    def save(self, folder: Path, tokens_per_block: int) -> None:
        """Write it into a folder."""
        tensors = {name: rows[: self.n_tokens] for name, rows in self._vectors.items()}
        checksums = [
            [checksum(rows) for rows in of_hook.split(tokens_per_block)]
            for of_hook in tensors.values()
        ]
        tensors["checksums"] = torch.tensor(checksums).T.contiguous()
        tensors["tokens"] = torch.cat(self._prompts)
        tensors["prompt"] = torch.cat(self._prompt)
        tensors["position"] = torch.cat(self._position)
        save_file(tensors, folder / ACTIVATIONS_FILENAME)


@dataclass(frozen=True)
class Shard:
    """A shard on disk. Its file is mapped while something is read, and no longer."""

    folder: Path
    hook_names: Sequence[str]
    """Of the cache, in the order in which they were harvested."""
    tokens_per_block: int
    entry: ShardEntry
    """What the manifest says of it."""

    @classmethod
    def of_cache(cls, path: Path, manifest: Manifest, entry: ShardEntry) -> "Shard":
        """One shard of the cache at a path."""
        return cls(
            path / entry.name, manifest.hook_names, manifest.tokens_per_block, entry
        )

    @property
    def n_blocks(self) -> int:
        """Blocks of tokens; the last one may be short."""
        return -(-self.entry.n_tokens // self.tokens_per_block)

    def fault(self) -> str | None:
        """What is wrong with it, as far as its size and few bytes say; None: nothing.

        Its vectors and tokens are checked whenever they are read.
        """
        try:
            n_bytes = (self.folder / ACTIVATIONS_FILENAME).stat().st_size
            if n_bytes != self.entry.n_bytes:
                return f"{self.folder} has {n_bytes} bytes, not {self.entry.n_bytes}"
            with _opened(self.folder) as file:
                checksums = file.get_tensor("checksums")
        except FileNotFoundError:
            return f"{self.folder} is missing"
        except ValueError as error:
            return str(error)
        if checksum(checksums) != self.entry.checksum:
            return f"{self.folder} is not the shard that was saved"
        return None

    def vectors(
        self, block: int, hook_names: Sequence[str]
    ) -> Generator[Float[Tensor, "token d_in"]]:
        """The vectors of one block at some hooks, as views of the mapped file.

        Raises:
            ValueError: If the shard is missing, torn or was changed; names it.
        """
        start = block * self.tokens_per_block
        with _opened(self.folder) as file:
            expected = file.get_slice("checksums")[block].tolist()
            for name in hook_names:
                rows = file.get_slice(name)[start : start + self.tokens_per_block]
                if checksum(rows) != expected[self.hook_names.index(name)]:
                    raise ValueError(
                        f"{self.folder} was changed: the vectors of its tokens {start} "
                        f"to {start + len(rows) - 1} at {name!r} are not those that "
                        "were saved. Delete the cache and harvest it again."
                    )
                yield rows

    def tokens(self) -> ShardTokens:
        """Its prompts, and which of their tokens its vectors are of.

        Raises:
            ValueError: If the shard is missing, torn or was changed; names it.
        """
        with _opened(self.folder) as file:
            tensors = [file.get_tensor(name).clone() for name in ShardTokens._fields]
        if checksum(*tensors) != self.entry.tokens_checksum:
            raise ValueError(
                f"{self.folder} was changed: its tokens are not those that were saved. "
                "Delete the cache and harvest it again."
            )
        return ShardTokens(*tensors)


def describe(folder: Path) -> ShardEntry:
    """What a manifest is to say of a shard that was saved.

    Raises:
        ValueError: If it is missing or torn; names it.
    """
    with _opened(folder) as file:
        checksums = file.get_tensor("checksums")
        tokens = [file.get_tensor(name) for name in ShardTokens._fields]
        return ShardEntry(
            name=folder.name,
            n_tokens=len(tokens[1]),
            n_bytes=(folder / ACTIVATIONS_FILENAME).stat().st_size,
            checksum=checksum(checksums),
            tokens_checksum=checksum(*tokens),
        )


@contextmanager
def _opened(folder: Path) -> Generator[Any]:
    try:
        opened: Any = safe_open(folder / ACTIVATIONS_FILENAME, framework="pt")
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} is missing. Delete the cache and harvest it again."
        ) from error
    except SafetensorError as error:
        raise ValueError(
            f"{folder} is torn ({error}). Delete it and harvest again."
        ) from error
    with opened as file:
        yield file
