"""Harvests a cache: runs the model once and keeps its vectors on disk."""

import copy
import errno
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from sae_lens.config import HfDataset
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_multilayer.config import MultiLayerConfig
from sae_lens_multilayer.files import (
    LOCK_FILENAME,
    check_free,
    complete_or_absent,
    locked,
    read_tensors,
    remove_leftovers,
    write_whole,
)
from sae_lens_multilayer.models import loading
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.ranks import check_one_process
from sae_lens_multilayer.record import (
    RECORD_FILENAME,
    Record,
    as_lines,
    hash_of_tensors,
    model_fingerprints,
)
from sae_lens_multilayer.store.cache import (
    CACHE_KIND,
    EVALUATION_FILENAME,
    EVALUATION_FOLDER,
    SHARDS_FILENAME,
    ActivationCache,
    vector_settings,
)
from sae_lens_multilayer.store.shards import Shard, ShardInMemory
from sae_lens_multilayer.store.store import MultiLayerActivationsStore

logger = logging.getLogger(__name__)

SHARD_BYTES = 2**28
"""Approximate size of a shard; harvesting holds one in memory."""
BLOCK_BYTES = 2**17
"""Approximate bytes of one hook that are read at a time."""


class MultiLayerCacheActivationsRunner:
    """Runs the model over a dataset once and keeps the vectors of all hooks on disk.

    As SAELens' `CacheActivationsRunner`, for many hooks. It takes the config of a
    training run; `training_tokens` of its dataset are cached in whole prompts, in
    their order, in the config's `dtype`, under its `cached_activations_path`. Vectors
    are raw: a lens is the SAE's, and one cache serves runs with any lens or none.

    An interrupted or killed harvest is resumed when it is run again, and ends with the
    bytes it would have had (on the same machine).
    """

    def __init__(
        self,
        cfg: MultiLayerConfig[Any],
        override_dataset: HfDataset | None = None,
        override_model: Any | None = None,
        shard_bytes: int = SHARD_BYTES,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        """Load the model and the dataset, and compare with a cache at the path.

        Args:
            cfg: Config of a training run.
            override_dataset: Used instead of `cfg.dataset_path`.
            override_model: Used instead of loading `cfg.model_name`.
            shard_bytes: Approximate size of a shard, at least one model batch.
            block_bytes: Approximate size of what is read of a hook at a time, at least
                one vector.

        Raises:
            FileExistsError: If something else is at the path.
            ValueError: If another cache is there, the settings do not fit the model
                or each other, or torchrun has started several processes.
        """
        check_one_process("A harvest")
        if cfg.cached_activations_path is None:
            raise ValueError(
                "`cached_activations_path` must name the folder of the cache; got None."
            )
        self.cfg = cfg
        self.path = Path(cfg.cached_activations_path)
        if not self._is_begun:
            check_free(self.path)
        self.model = (
            override_model if override_model is not None else loading.load_model(cfg)
        )
        self._dataset, self._has_run = override_dataset, False
        self.activations_store = self._make_store(override_dataset)
        self.record = Record(
            CACHE_KIND,
            vector_settings(cfg) | self._layout(shard_bytes, block_bytes),
            model_fingerprints(self.model),
        )
        self._check_found()

    def _make_store(self, dataset: HfDataset | None) -> MultiLayerActivationsStore:
        cfg = copy.copy(self.cfg)
        cfg.use_cached_activations = False
        cfg.act_store_device = "cpu"  # from where it goes to the disk
        # The store's own buffer, for mixing, stays empty.
        cfg.n_batches_in_buffer, cfg.train_batch_size_tokens = 1, 1
        return MultiLayerActivationsStore.from_config(self.model, cfg, dataset)

    def _layout(self, shard_bytes: int, block_bytes: int) -> dict[str, Any]:
        """What else decides the bytes of the cache."""
        store, shape = self.activations_store, as_model(self.model).shape
        excluded = store.exclude_special_tokens
        split = getattr(store.dataset, "split", None)
        row_bytes = store.d_in * store.dtype.itemsize
        n_in_shard = shard_bytes // (len(store.hook_names) * row_bytes)
        return {
            "hook_names": store.hook_names,
            "n_layers": shape.n_layers,
            "d_model": shape.d_model,
            "dataset_split": None if split is None else str(split),
            "excluded_token_ids": [] if excluded is None else excluded.tolist(),
            "training_tokens": self.cfg.training_tokens,
            # The vectors depend on it in their rounding.
            "store_batch_size_prompts": self.cfg.store_batch_size_prompts,
            "tokens_per_shard": max(n_in_shard, store.tokens_per_model_batch),
            "tokens_per_block": max(1, block_bytes // row_bytes),
        }

    @property
    def _is_begun(self) -> bool:
        return (self.path / RECORD_FILENAME).exists()

    @property
    def _is_complete(self) -> bool:
        return (self.path / SHARDS_FILENAME).exists()

    def _check_found(self) -> None:
        """Compare the cache at the path, if there is one, with the one wanted."""
        if not self._is_begun:
            return
        found = Record.read(self.path, CACHE_KIND)
        if differences := found.differences(self.record):
            raise ValueError(
                f"{self.path} holds another cache, which is not overwritten:"
                f"{as_lines(differences)}\nGive another `cached_activations_path`."
            )
        if not self._is_complete:
            found.warn_of_versions(self.path)

    @property
    def _bytes_per_token(self) -> int:
        """Bytes of a token's vectors at all hooks."""
        store = self.activations_store
        return len(store.hook_names) * store.d_in * store.dtype.itemsize

    @property
    def n_bytes(self) -> int:
        """Upper bound on the cache's bytes on disk, to a few thousandths."""
        store = self.activations_store
        # Prompts, and the prompt and position of each vector, are int32.
        per_token = (
            self._bytes_per_token
            + 8
            + 4 * self.cfg.context_size / store.training_context_size
        )
        n_tokens = self.cfg.training_tokens + store.tokens_per_model_batch
        return int(n_tokens * per_token)

    def __str__(self) -> str:
        """What it harvests, and how much disk that takes."""
        settings = self.record.settings
        return (
            f"{settings['training_tokens']:,} tokens x {len(settings['hook_names'])} "
            f"hooks x {settings['d_in']}, {settings['dtype']}: "
            f"{self._bytes_per_token:,} bytes per token, at most "
            f"{self.n_bytes / 2**30:.2f} GiB in shards of "
            f"{settings['tokens_per_shard']:,} tokens at {self.path}"
        )

    def run(self) -> ActivationCache:
        """Harvest the cache, or the rest of it, and open it.

        Raises:
            OSError: If the disk has no room for it, before anything is written, or if
                it is full later, in which case complete shards stay; or if another
                process is harvesting it.
            ValueError: If the dataset gives no token.
        """
        if self._is_complete:
            logger.info("The cache at %s is complete.", self.path)
            return ActivationCache(self.path)
        self._check_room()
        if not self._is_begun:
            with complete_or_absent(self.path) as partial:
                self.record.write(partial)
        with locked(self.path):
            # Another process may have finished it meanwhile.
            if not self._is_complete:
                remove_leftovers(self.path)
                self._harvest()
                self._finish()
        return ActivationCache(self.path)

    def _check_room(self) -> None:
        parent = self.path.resolve()
        while not parent.exists():
            parent = parent.parent
        needed = self.n_bytes - sum(shard.n_bytes for shard in self._shards())
        free = shutil.disk_usage(parent).free
        logger.info(
            "Caching %s. Still to be written: %.2f GiB; free: %.2f GiB.",
            self,
            needed / 2**30,
            free / 2**30,
        )
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"The cache needs {needed:,} bytes of disk, and {free:,} are free; "
                "nothing was written. Make room, cache fewer tokens or layers, or use "
                "`dtype='bfloat16'`",
                str(self.path),
            )

    def _shards(self) -> list[Shard]:
        """The shards on disk, in order."""
        folders = sorted(self.path.glob("shard-*"))
        for expected, folder in enumerate(folders):
            if folder != self._shard_folder(expected):
                raise ValueError(
                    f"{self._shard_folder(expected)} is missing, and {folder.name} is "
                    "there. Put it back, or delete the cache."
                )
        return [Shard.open(folder) for folder in folders]

    def _shard_folder(self, index: int) -> Path:
        return self.path / f"shard-{index:06d}"

    def _harvest(self) -> None:
        """Add the shards that are missing."""
        if self._has_run:
            # A run that failed has left the store somewhere in the dataset.
            self.activations_store = self._make_store(self._dataset)
        self._has_run = True
        n_shards, n_tokens = self._resume()
        store, wanted = self.activations_store, self.cfg.training_tokens
        shard = ShardInMemory(
            store.hook_names,
            self.record.settings["tokens_per_shard"],
            store.d_in,
            store.dtype,
        )
        with tqdm(
            total=wanted, initial=n_tokens, desc="Caching activations", unit="tok"
        ) as progress:
            while n_tokens < wanted and not store.epoch_has_ended:
                self._fill(shard, wanted - n_tokens, progress)
                if shard.n_tokens:
                    self._save(shard, self._shard_folder(n_shards))
                    n_shards, n_tokens = n_shards + 1, n_tokens + shard.n_tokens
                shard.clear()
        if n_tokens < wanted:
            logger.warning(
                "The dataset has ended: the cache holds %d of the %d tokens asked for.",
                n_tokens,
                wanted,
            )

    def _resume(self) -> tuple[int, int]:
        """Continue after the shards on disk; their number, and their tokens."""
        shards = self._shards()
        n_tokens = sum(shard.n_tokens for shard in shards)
        if shards:
            logger.info("Resuming after %d shards, %d tokens.", len(shards), n_tokens)
            self._check_same_text(shards[0])
            self.activations_store.load_from_checkpoint(shards[-1].folder)
        return len(shards), n_tokens

    def _check_same_text(self, first: Shard) -> None:
        """Compare the first prompts of the dataset with the first shard."""
        found, prompts = first.tokens().tokens, self.activations_store.take_next()
        if prompts is None or not torch.equal(
            prompts.cpu().int(), found[: len(prompts)]
        ):
            raise ValueError(
                f"The dataset must be that of the cache at {self.path}, whose harvest "
                "was interrupted; it begins with other tokens. Give the same dataset, "
                "or another `cached_activations_path`."
            )

    def _fill(self, shard: ShardInMemory, n_missing: int, progress: Any) -> None:
        """Run the model until the shard is full, enough, or the dataset has ended."""
        store = self.activations_store
        positions = torch.arange(store.context_size)[slice(*store.seqpos_slice)]
        while (
            shard.n_free >= store.tokens_per_model_batch
            and shard.n_tokens < n_missing
            and not store.epoch_has_ended
        ):
            prompts = store.take_next()
            if prompts is None:
                return
            rows = store.kept_tokens(prompts)
            shard.add(prompts, rows, positions, store.vectors_of(prompts, rows))
            progress.update(len(rows))

    def _save(self, shard: ShardInMemory, folder: Path) -> None:
        try:
            with complete_or_absent(folder) as partial:
                shard.save(partial)
                self.activations_store.save_to_checkpoint(partial)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"{folder} could not be written: {error}. The shards before it are "
                "complete; run the harvest again to resume it. Is the disk full?"
            ) from error

    def _finish(self) -> None:
        """Save prompts for evaluation; list the shards, which completes the cache."""
        shards = self._shards()
        if not shards:
            # Else other settings would be refused as those of another cache.
            for name in (RECORD_FILENAME, LOCK_FILENAME):
                (self.path / name).unlink()
            raise ValueError(
                "The dataset must give at least one token that has vectors; it gives "
                f"none in whole contexts of {self.cfg.context_size} tokens."
            )
        folder = self.path / EVALUATION_FOLDER
        if not folder.exists():
            with complete_or_absent(folder) as partial:
                tensors = {"tokens": self._evaluation_tokens()}
                save_file(tensors, partial / EVALUATION_FILENAME)
        content = {
            "evaluation_hash": hash_of_tensors(
                read_tensors(folder / EVALUATION_FILENAME)
            ),
            "shards": {
                shard.folder.name: {
                    "n_tokens": shard.n_tokens,
                    "n_bytes": shard.n_bytes,
                    "hash": shard.hash,
                }
                for shard in shards
            },
        }
        write_whole(self.path / SHARDS_FILENAME, json.dumps(content, indent=1))

    def _evaluation_tokens(self) -> Tensor:
        store, cfg = self.activations_store, self.cfg
        if store.epoch_has_ended:
            logger.warning(
                "Evaluations in training will be on text that is trained on: the "
                "dataset has none after that of the cache."
            )
        tokens = store.evaluation_prompts(
            max(1, cfg.n_eval_batches),
            cfg.eval_batch_size_prompts or cfg.store_batch_size_prompts,
        )
        return tokens.cpu().int()
