"""Reads a cache: block by block, or as the store of a training run."""

import copy
import logging
from bisect import bisect_right
from collections.abc import Generator, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from sae_lens_multilayer.config import MultiLayerConfig
from sae_lens_multilayer.files import read_tensors
from sae_lens_multilayer.fingerprints import checksum
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.models.shape import ModelShape
from sae_lens_multilayer.ranks import ALONE, Ranks
from sae_lens_multilayer.store.manifest import Manifest, explain
from sae_lens_multilayer.store.shards import Shard, ShardTokens
from sae_lens_multilayer.store.store import MultiLayerActivationsStore

logger = logging.getLogger(__name__)

EVALUATION_FOLDER = "evaluation"
EVALUATION_FILENAME = "tokens.safetensors"


class ActivationCache:
    """Vectors of all hooks of some tokens, on disk, in the order of the dataset.

    They are as the model gave them: in raw space, before any lens. Opening a cache
    reads its manifest and a few bytes of each shard; what is read later is checked
    against its checksums then.

    Attributes:
        path: Its folder.
        manifest: What is in it, and where it is from.
        shards: Its files.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a cache.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is not complete, or shards are missing, torn or were
                exchanged; names each.
        """
        self.path = Path(path).expanduser()
        self.manifest = manifest = Manifest.read(self.path)
        if manifest.shards is None:
            raise ValueError(
                f"The cache at {self.path} must be complete; its harvest was "
                "interrupted. Run the same harvest again: it goes on there."
            )
        self.shards = [
            Shard.of_cache(self.path, manifest, entry) for entry in manifest.shards
        ]
        faults = [fault for shard in self.shards if (fault := shard.fault())]
        if faults:
            raise ValueError(
                f"The cache at {self.path} must be as it was harvested: "
                f"{explain(faults)}\nDelete the folder and harvest it again."
            )
        # Of the first block of each shard but the first, and of all blocks.
        self._ends = list(accumulate(shard.n_blocks for shard in self.shards))

    @property
    def n_blocks(self) -> int:
        """Blocks of tokens, which are what is read at a time."""
        return self._ends[-1]

    @property
    def n_tokens(self) -> int:
        """Tokens that have vectors."""
        return self.manifest.n_tokens

    @property
    def hook_names(self) -> list[str]:
        """The hooks that it has vectors of."""
        return self.manifest.hook_names

    @property
    def model_shape(self) -> ModelShape:
        """Of the model that it was harvested from; its longest context is not kept."""
        return ModelShape(self.manifest.n_layers, self.manifest.d_model)

    @cached_property
    def identity(self) -> int:
        """A positive number by which this cache is known from every other."""
        entries = [
            [shard.entry.checksum, shard.entry.tokens_checksum] for shard in self.shards
        ]
        return max(1, abs(checksum(torch.tensor(entries))))

    def vectors(
        self, block: int, hook_names: Sequence[str] | None = None
    ) -> Generator[Float[Tensor, "token d_in"]]:
        """The vectors of one block, hook by hook.

        They are views of a mapped file: use or copy one before the next is taken.

        Args:
            hook_names: Some of its hooks, in any order; only theirs are read. None:
                all.

        Raises:
            ValueError: If a shard is missing, torn or was changed; names it.
        """
        shard, of_shard = self._find(block)
        return shard.vectors(
            of_shard, self.hook_names if hook_names is None else hook_names
        )

    def n_tokens_of(self, block: int) -> int:
        """Tokens in a block."""
        shard, of_shard = self._find(block)
        start = of_shard * shard.tokens_per_block
        return min(shard.tokens_per_block, shard.entry.n_tokens - start)

    def _find(self, block: int) -> tuple[Shard, int]:
        index = bisect_right(self._ends, block)
        first = self._ends[index - 1] if index else 0
        return self.shards[index], block - first

    def read(
        self, hook_names: Sequence[str] | None = None
    ) -> Iterator[tuple[Float[Tensor, "token layer d_in"], ShardTokens]]:
        """All vectors in the order of the dataset, shard by shard, with their tokens.

        Args:
            hook_names: As for `vectors`.
        """
        for shard in self.shards:
            names = self.hook_names if hook_names is None else hook_names
            blocks = [
                torch.stack(list(shard.vectors(block, names)), 1)
                for block in range(shard.n_blocks)
            ]
            yield torch.cat(blocks), shard.tokens()

    def evaluation_tokens(self) -> Int[Tensor, "prompt pos"]:
        """Prompts that follow those of the cache in the dataset.

        Raises:
            ValueError: If their file is torn or was changed.
        """
        path = self.path / EVALUATION_FOLDER / EVALUATION_FILENAME
        tokens = read_tensors(path)["tokens"]
        if checksum(tokens) != self.manifest.evaluation_checksum:
            raise ValueError(
                f"{path} was changed. Delete the cache and harvest it again."
            )
        return tokens.long()

    def check(self, cfg: MultiLayerConfig[Any], model: Any | None = None) -> None:
        """Check that it has the vectors that a run needs.

        Args:
            model: The run's, if it has loaded one.

        Raises:
            ValueError: If not; names every difference.
        """
        differences = self.manifest.differences_from_run(cfg, model)
        if differences:
            raise ValueError(
                f"The cache at {self.path} must be of what this run needs; they differ:"
                f"{explain(differences)}\nChange the run, or harvest another cache."
            )

    def verify(self) -> None:
        """Read all of it, and compare it with what was harvested.

        Raises:
            ValueError: If something was changed; names each shard.
        """
        faults: list[str] = []
        for shard in self.shards:
            try:
                shard.tokens()
                for block in range(shard.n_blocks):
                    for _ in shard.vectors(block, self.hook_names):
                        pass
            except ValueError as error:
                faults.append(str(error))
        if faults:
            raise ValueError(f"The cache at {self.path} has faults:{explain(faults)}")
        self.evaluation_tokens()


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
        plain.exclude_special_tokens = cache.manifest.excluded_token_ids or False
        store = super(MultiLayerActivationsStore, cls).from_config(model, plain)  # type: ignore[arg-type]
        assert isinstance(store, cls)
        names = cfg.resolve_hook_names(cache.manifest.n_layers)
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
        return self.cache.manifest.tokens_per_block

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
