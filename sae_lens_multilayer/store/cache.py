"""A cache of activations on disk: opened, validated and read block by block."""

from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens.util import dtype_to_str, str_to_dtype
from torch import Tensor

from sae_lens_multilayer.config import MultiLayerConfig, fields_of
from sae_lens_multilayer.files import read_json, read_tensors
from sae_lens_multilayer.models.model import ModelShape
from sae_lens_multilayer.record import (
    Record,
    as_lines,
    hash_of_json,
    hash_of_tensors,
)
from sae_lens_multilayer.store.shards import Shard, ShardTokens

CACHE_KIND = "cache"
SHARDS_FILENAME = "shards.json"
"""Lists the shards; a cache without it is incomplete."""
EVALUATION_FOLDER = "evaluation"
EVALUATION_FILENAME = "tokens.safetensors"


def vector_settings(cfg: MultiLayerConfig[Any]) -> dict[str, Any]:
    """Settings of a run that decide its vectors, up to rounding."""
    values = cfg.to_dict()
    return {name: values[name] for name in fields_of("model", "vectors", "text")} | {
        "d_in": cfg.sae.d_in,
        "dtype": dtype_to_str(str_to_dtype(cfg.dtype)),
    }


class ActivationCache:
    """Vectors of all hooks of some tokens, on disk, in the order of the dataset.

    They are raw outputs of the model, before any lens. Opening a cache reads its record
    and the sizes of its shards; `verify` reads and checks everything.

    Attributes:
        path: Its folder.
        record: The settings, model and tokenizer that made it.
        shards: Its files.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a complete cache."""
        self.path = Path(path).expanduser()
        self.record = Record.read(self.path, CACHE_KIND)
        if not (self.path / SHARDS_FILENAME).is_file():
            raise ValueError(
                f"The cache at {self.path} must be complete; resume its harvest by "
                "running it again."
            )
        listed = read_json(self.path / SHARDS_FILENAME)
        self._evaluation_hash: str = listed["evaluation_hash"]
        self.shards = [
            Shard(self.path / name, **values)
            for name, values in listed["shards"].items()
        ]
        self._check_shards(Shard.check_size)
        # Shard i holds blocks ends[i-1] to ends[i] - 1.
        self._ends = list(
            accumulate(-(-s.n_tokens // self.tokens_per_block) for s in self.shards)
        )

    @property
    def n_blocks(self) -> int:
        """Number of blocks; one block of tokens is read at a time."""
        return self._ends[-1]

    @property
    def tokens_per_block(self) -> int:
        """Tokens in a block; the last one of a shard may be shorter."""
        return self.record.settings["tokens_per_block"]

    @property
    def n_tokens(self) -> int:
        """Tokens that have vectors."""
        return sum(shard.n_tokens for shard in self.shards)

    @property
    def hook_names(self) -> list[str]:
        """Hooks whose vectors it has."""
        return self.record.settings["hook_names"]

    @property
    def dtype(self) -> str:
        """Dtype of the vectors: "float32", "bfloat16" or "float16"."""
        return self.record.settings["dtype"]

    @property
    def model_shape(self) -> ModelShape:
        """Shape of the model; its longest context is not recorded."""
        settings = self.record.settings
        return ModelShape(settings["n_layers"], settings["d_model"])

    @cached_property
    def identity(self) -> int:
        """A positive number that differs between caches; fits 64 bits with sign."""
        hashes = hash_of_json([shard.hash for shard in self.shards])
        return 1 + int(hashes[:15], 16)

    def vectors(
        self, block: int, hook_names: Sequence[str] | None = None
    ) -> Generator[Float[Tensor, "token d_in"]]:
        """The vectors of one block, hook by hook.

        They are views of a mapped file: use or copy one before taking the next.

        Args:
            hook_names: Some of its hooks, in any order; None: all.
        """
        shard, rows = self._find(block)
        return shard.vectors(rows, hook_names or self.hook_names)

    def n_tokens_of(self, block: int) -> int:
        """Tokens in a block."""
        _, rows = self._find(block)
        return rows.stop - rows.start

    def _find(self, block: int) -> tuple[Shard, slice]:
        """The shard of a block, and its rows there."""
        index = bisect_right(self._ends, block)
        first = self._ends[index - 1] if index else 0
        shard, start = self.shards[index], (block - first) * self.tokens_per_block
        return shard, slice(start, min(start + self.tokens_per_block, shard.n_tokens))

    def read(
        self, hook_names: Sequence[str] | None = None
    ) -> Iterator[tuple[Float[Tensor, "token layer d_in"], ShardTokens]]:
        """All vectors and their tokens in the dataset's order, shard by shard."""
        names = hook_names or self.hook_names
        for shard in self.shards:
            vectors = torch.stack(list(shard.vectors(slice(None), names)), 1)
            yield vectors, shard.tokens()

    def evaluation_tokens(self) -> Int[Tensor, "prompt pos"]:
        """Prompts that follow those of the cache in the dataset."""
        path = self.path / EVALUATION_FOLDER / EVALUATION_FILENAME
        tensors = read_tensors(path)
        if hash_of_tensors(tensors) != self._evaluation_hash:
            raise ValueError(f"{path} was changed; harvest the cache again.")
        return tensors["tokens"].long()

    def check(
        self,
        settings: dict[str, Any],
        hook_names: Sequence[str],
        fingerprints: dict[str, Any] | None = None,
    ) -> None:
        """Check that it has the vectors that a run needs; it may have more hooks.

        Args:
            settings: `vector_settings` of the run, which may name no dataset.
            fingerprints: Those of the run's model, if it is loaded.
        """
        wanted = Record(CACHE_KIND, settings, fingerprints or {})
        ignore = [] if settings["dataset_path"] else ["dataset_path"]
        differences = self.record.differences(wanted, ignore)
        if missing := [name for name in hook_names if name not in self.hook_names]:
            differences.append(f"hooks {missing} are missing; it has {self.hook_names}")
        if differences:
            raise ValueError(
                f"The cache at {self.path} must hold what this run needs; they differ:"
                f"{as_lines(differences)}\nChange the run, or harvest another cache."
            )

    def verify(self) -> None:
        """Read the whole cache; raise ValueError if its hashes have changed."""
        self._check_shards(lambda shard: shard.verify(self.hook_names))
        self.evaluation_tokens()

    def _check_shards(self, check: Callable[[Shard], None]) -> None:
        faults: list[str] = []
        for shard in self.shards:
            try:
                check(shard)
            except ValueError as error:
                faults.append(str(error))
        if faults:
            raise ValueError(
                f"The cache at {self.path} is damaged:{as_lines(faults)}\nHarvest it "
                "again."
            )
