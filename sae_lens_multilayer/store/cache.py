"""Reads a cache: block by block, or as the store of a training run."""

import copy
import logging
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sae_lens.util import dtype_to_str, str_to_dtype
from torch import Tensor
from typing_extensions import override

from sae_lens_multilayer.config import MultiLayerConfig
from sae_lens_multilayer.files import read_json, read_tensors
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.models.model import ModelShape
from sae_lens_multilayer.ranks import ALONE, Ranks
from sae_lens_multilayer.record import (
    Record,
    as_lines,
    hash_of_json,
    hash_of_tensors,
    model_fingerprints,
)
from sae_lens_multilayer.store.shards import Shard, ShardTokens
from sae_lens_multilayer.store.store import MultiLayerActivationsStore

logger = logging.getLogger(__name__)

CACHE_KIND = "cache"
SHARDS_FILENAME = "shards.json"
"""Lists the shards; a cache without it is incomplete."""
EVALUATION_FOLDER = "evaluation"
EVALUATION_FILENAME = "tokens.safetensors"

_SETTINGS = (
    "model_name",
    "model_class_name",
    "model_from_pretrained_kwargs",
    "model_kwargs",
    "autocast_lm",
    "hook_head_index",
    "dataset_path",
    "use_chat_formatting",
    "context_size",
    "prepend_bos",
    "sequence_separator_token",
    "disable_concat_sequences",
    "seqpos_slice",
    "exclude_special_tokens",
)
"""Fields of a run's config that decide its vectors, up to rounding."""


def vector_settings(cfg: MultiLayerConfig[Any]) -> dict[str, Any]:
    """Settings of a run that decide its vectors, up to rounding."""
    values = cfg.to_dict()
    return {name: values[name] for name in _SETTINGS} | {
        "d_in": cfg.sae.d_in,
        "dtype": dtype_to_str(str_to_dtype(cfg.dtype)),
    }


class ActivationCache:
    """Vectors of all hooks of some tokens, on disk, in the order of the dataset.

    They are raw outputs of the model, before any lens. Opening a cache reads its record
    and the sizes of its shards; `verify` reads and checks everything.

    Attributes:
        path: Its folder.
        record: The settings, model and tokenizer that it was harvested with.
        shards: Its files.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a cache.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is incomplete, or shards are missing or of another size;
                names each.
        """
        self.path = Path(path).expanduser()
        self.record = Record.read(self.path, CACHE_KIND)
        if not (self.path / SHARDS_FILENAME).is_file():
            raise ValueError(
                f"The cache at {self.path} must be complete; its harvest was "
                "interrupted. Run the same harvest again to resume it."
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
        """Number of blocks of tokens; a block is read at a time."""
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
        """Hooks that it has vectors of."""
        return self.record.settings["hook_names"]

    @property
    def dtype(self) -> str:
        """Dtype of the vectors: "float32", "bfloat16" or "float16"."""
        return self.record.settings["dtype"]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token's vectors at all hooks."""
        itemsize = str_to_dtype(self.dtype).itemsize
        return len(self.hook_names) * self.record.settings["d_in"] * itemsize

    @property
    def model_shape(self) -> ModelShape:
        """Shape of the model; its longest context is not recorded."""
        settings = self.record.settings
        return ModelShape(settings["n_layers"], settings["d_model"])

    @cached_property
    def identity(self) -> int:
        """A positive number that differs from that of every other cache."""
        # It is stored as a signed integer of 64 bits.
        hashes = hash_of_json([shard.hash for shard in self.shards])
        return 1 + int(hashes[:15], 16)

    def vectors(
        self, block: int, hook_names: Sequence[str] | None = None
    ) -> Generator[Float[Tensor, "token d_in"]]:
        """The vectors of one block, hook by hook.

        They are views of a mapped file: use or copy one before taking the next.

        Args:
            hook_names: Some of its hooks, in any order; only these are read. None: all.

        Raises:
            ValueError: If a shard is missing or torn; names it.
        """
        shard, rows = self._find(block)
        return shard.vectors(
            rows, self.hook_names if hook_names is None else hook_names
        )

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
        """All vectors in the order of the dataset, shard by shard, with their tokens.

        Args:
            hook_names: As for `vectors`.
        """
        names = self.hook_names if hook_names is None else hook_names
        for shard in self.shards:
            yield (
                torch.stack(list(shard.vectors(slice(None), names)), 1),
                shard.tokens(),
            )

    def evaluation_tokens(self) -> Int[Tensor, "prompt pos"]:
        """Prompts that follow those of the cache in the dataset.

        Raises:
            ValueError: If their file is torn or was changed.
        """
        path = self.path / EVALUATION_FOLDER / EVALUATION_FILENAME
        tensors = read_tensors(path)
        if hash_of_tensors(tensors) != self._evaluation_hash:
            raise ValueError(
                f"{path} was changed. Delete the cache and harvest it again."
            )
        return tensors["tokens"].long()

    def check(self, cfg: MultiLayerConfig[Any], model: Any | None = None) -> None:
        """Check that it has the vectors that a run needs.

        Hooks that the run does not use may be in the cache, and a run that names no
        dataset takes the cache's.

        Args:
            model: The model of the run, if it has loaded one.

        Raises:
            ValueError: If not; names every difference.
        """
        wanted = Record(
            CACHE_KIND,
            vector_settings(cfg),
            {} if model is None else model_fingerprints(model),
        )
        ignore = [] if cfg.dataset_path else ["dataset_path"]
        differences = self.record.differences(wanted, ignore)
        needed = cfg.resolve_hook_names(self.model_shape.n_layers)
        if missing := [name for name in needed if name not in self.hook_names]:
            differences.append(
                f"the hooks {missing} are missing; it has {self.hook_names}"
            )
        if differences:
            raise ValueError(
                f"The cache at {self.path} must hold what this run needs; they differ:"
                f"{as_lines(differences)}\nChange the run, or harvest another cache."
            )

    def verify(self) -> None:
        """Read the whole cache and compare it with its hashes.

        Raises:
            ValueError: If something was changed; names each shard.
        """
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
                f"The cache at {self.path} is damaged:{as_lines(faults)}\nDelete the "
                "folder and harvest it again."
            )


class CachedActivationsStore(MultiLayerActivationsStore):
    """Serves the vectors of a cache as the store of a model serves the model's.

    An epoch is once through the cache. Its blocks come in an order that the seed and
    the number of the epoch decide, and are mixed further in the buffer; where
    `activations_mixing_fraction` is 0, all comes in the order of the dataset. What the
    model's store calls a prompt is the number of a block here.
    """

    cache: ActivationCache
    _ranks: Ranks
    _seed: int | None
    _order: tuple[int, Int[Tensor, " block"]] | None = None  # of which epoch

    @classmethod
    def from_cache(
        cls,
        cache: ActivationCache,
        cfg: MultiLayerConfig[Any],
        model: Any | None = None,
        ranks: Ranks = ALONE,
    ) -> "CachedActivationsStore":
        """Make the store of a training run, or of one rank of it.

        Args:
            cache: One that `check` has found to be of this run.
            cfg: The run's configuration.
            model: Kept for evaluations; nothing is harvested from it.
            ranks: The processes of the run, among which the blocks are divided.

        Raises:
            ValueError: If the cache holds less than one training batch, or fewer blocks
                than there are ranks.
        """
        if cache.n_blocks < ranks.count:
            raise ValueError(
                f"The cache must have a block of tokens for each of {ranks.count} "
                f"processes; {cache.path} has {cache.n_blocks}. Train in fewer, or "
                "harvest more tokens."
            )
        if cache.n_tokens < cfg.train_batch_size_tokens:
            raise ValueError(
                "The cache must hold at least one training batch of "
                f"{cfg.train_batch_size_tokens} tokens; {cache.path} has "
                f"{cache.n_tokens}. Use a smaller `train_batch_size_tokens` or harvest "
                "more tokens."
            )
        plain = copy.copy(cfg)
        plain.use_cached_activations = True
        plain.cached_activations_path = str(cache.path)
        # SAELens then looks for neither a dataset nor a tokenizer.
        plain.dataset_path = None  # type: ignore[assignment]
        plain.exclude_special_tokens = (
            cache.record.settings["excluded_token_ids"] or False
        )
        store = super(MultiLayerActivationsStore, cls).from_config(model, plain)  # type: ignore[arg-type]
        assert isinstance(store, cls)
        names = cfg.resolve_hook_names(cache.model_shape.n_layers)
        store._ranks = ranks
        store.cache, store.hook_name, store.hook_names = cache, names[0], names
        store._generator = torch.Generator().manual_seed(cfg.seed)
        store._harvests = []
        shuffles = cfg.activations_mixing_fraction > 0
        store._seed = cfg.seed if shuffles else None
        store._n_rows_this_epoch = 0
        return store

    @override
    def take_next(self) -> Int[Tensor, "one block"]:
        """The number of the block that is read next."""
        n_own = len(range(self._ranks.index, self.cache.n_blocks, self._ranks.count))
        epoch, index = divmod(self.n_dataset_processed, n_own)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self._order_of(epoch)
        self.n_dataset_processed += 1
        self._n_model_batches += 1
        self._n_rows_this_epoch = (index + 1) % n_own
        self._epoch_has_ended = self._n_rows_this_epoch == 0
        return self._order[1][index].view(1, 1)

    def _order_of(self, epoch: int) -> Int[Tensor, " block"]:
        order = np.arange(self.cache.n_blocks)
        if self._seed is not None:
            order = np.random.default_rng([self._seed, epoch]).permutation(order)
        # The order is the same on all ranks, so each block is one rank's.
        return torch.from_numpy(order[self._ranks.index :: self._ranks.count])

    @override
    def kept_tokens(self, prompts: Tensor) -> Int[Tensor, " token"]:
        """The rows of a block: all of them."""
        n_tokens = self.cache.n_tokens_of(int(prompts))
        return torch.arange(n_tokens, device=self.device)

    @override
    def vectors_of(
        self, prompts: Int[Tensor, "one block"], rows: Int[Tensor, " token"]
    ) -> Generator[Float[Tensor, "token d_in"]]:
        """Some rows of a block, hook by hook."""
        for vectors in self.cache.vectors(int(prompts), self.hook_names):
            # Not by brackets, which share out even these few rows between threads.
            yield vectors.to(self.device).index_select(0, rows)

    @override
    def go_to(self, n_rows_this_epoch: int, unread: Tensor) -> None:
        """Go on with the block after so many."""
        self._n_rows_this_epoch = n_rows_this_epoch

    @property
    @override
    def unread(self) -> Int[Tensor, " pos"]:
        """Nothing: a block is taken whole."""
        return torch.empty(0, dtype=torch.long)

    @property
    @override
    def source(self) -> int:
        """Which cache the vectors come from."""
        return self.cache.identity

    @property
    @override
    def tokens_per_model_batch(self) -> int:
        """Tokens of which vectors are read at a time."""
        return self.cache.tokens_per_block

    @override
    def evaluation_prompts(
        self, n_batches: int, batch_size_prompts: int
    ) -> Int[Tensor, "prompt pos"]:
        """The prompts of every evaluation: the cache has no vectors of them."""
        n_prompts = n_batches * batch_size_prompts
        tokens = self.cache.evaluation_tokens()[:n_prompts]
        if len(tokens) < n_prompts:
            logger.warning(
                "An evaluation takes the %d prompts that the cache has for it, not %d.",
                len(tokens),
                n_prompts,
            )
        return tokens.to(as_model(self.model).device)
