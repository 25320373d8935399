"""Harvests a cache: the model runs once, and what it gives stays on the disk."""

import copy
import errno
import logging
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
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
    check_free,
    complete_or_absent,
    locked,
    read_tensors,
    write_whole,
)
from sae_lens_multilayer.fingerprints import checksum
from sae_lens_multilayer.models import loading
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.ranks import check_one_process
from sae_lens_multilayer.store.cache import (
    EVALUATION_FILENAME,
    EVALUATION_FOLDER,
    ActivationCache,
)
from sae_lens_multilayer.store.manifest import (
    MANIFEST_FILENAME,
    SHARD_FOLDERS,
    Manifest,
    ShardEntry,
    check_no_lost_manifest,
    explain,
    hashes_of,
    settings_of,
    versions,
)
from sae_lens_multilayer.store.shards import Shard, ShardInMemory, describe
from sae_lens_multilayer.store.store import MultiLayerActivationsStore
from sae_lens_multilayer.training.run_folder import remove_leftovers

logger = logging.getLogger(__name__)

SHARD_BYTES = 2**28
"""About how large a shard is; harvesting holds one in memory."""
BLOCK_BYTES = 2**17
"""About how much of one hook is read at a time."""


class MultiLayerCacheActivationsRunner:
    """Runs the model over a dataset once and keeps the vectors of all hooks on disk.

    As SAELens' `CacheActivationsRunner`, for many hooks. It takes the config of a
    training run; `training_tokens` of its dataset are cached in whole prompts, in
    their order, in the config's `dtype`, under its `cached_activations_path`. Vectors
    are raw: a lens is the SAE's, and one cache serves runs with any lens or none.

    A harvest that was interrupted, killed at any moment too, goes on when it is run
    again, and ends with the bytes it would have had (on the same machine).
    """

    def __init__(
        self,
        cfg: MultiLayerConfig[Any],
        override_dataset: HfDataset | None = None,
        override_model: Any | None = None,
        shard_bytes: int = SHARD_BYTES,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        """Load what is needed, and compare it with what is at the path already.

        Args:
            cfg: Of a training run.
            override_dataset: Used instead of `cfg.dataset_path`.
            override_model: Used instead of loading `cfg.model_name`.
            shard_bytes: About how large a shard is, at least one model batch.
            block_bytes: About how much of a hook is read at a time, at least a vector.

        Raises:
            FileExistsError: If something else is at the path.
            FileNotFoundError: If a cache is there that has lost its manifest.
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
        if not (self.path / MANIFEST_FILENAME).exists():
            check_no_lost_manifest(self.path)
            check_free(self.path)
        self.model = (
            override_model if override_model is not None else loading.load_model(cfg)
        )
        self._dataset, self._has_begun = override_dataset, False
        self.activations_store = self._make_store(override_dataset)
        self.manifest = self._plan(shard_bytes, block_bytes)
        self._check_found()

    def _make_store(self, dataset: HfDataset | None) -> MultiLayerActivationsStore:
        cfg = copy.copy(self.cfg)
        cfg.use_cached_activations = False
        cfg.act_store_device = "cpu"  # from where it goes to the disk
        # The store's own buffer, for mixing, stays empty.
        cfg.n_batches_in_buffer, cfg.train_batch_size_tokens = 1, 1
        return MultiLayerActivationsStore.from_config(self.model, cfg, dataset)

    def _plan(self, shard_bytes: int, block_bytes: int) -> Manifest:
        store = self.activations_store
        shape = as_model(self.model).shape
        excluded = store.exclude_special_tokens
        split = getattr(store.dataset, "split", None)
        itemsize = store.dtype.itemsize
        bytes_per_token = len(store.hook_names) * store.d_in * itemsize
        return Manifest(
            settings=settings_of(self.cfg),
            hook_names=store.hook_names,
            n_layers=shape.n_layers,
            d_model=shape.d_model,
            excluded_token_ids=[] if excluded is None else excluded.tolist(),
            training_tokens=self.cfg.training_tokens,
            store_batch_size_prompts=self.cfg.store_batch_size_prompts,
            tokens_per_shard=max(
                shard_bytes // bytes_per_token, store.tokens_per_model_batch
            ),
            tokens_per_block=max(1, block_bytes // (store.d_in * itemsize)),
            versions=versions(),
            dataset_split=None if split is None else str(split),
            **hashes_of(self.model),  # type: ignore[arg-type]
        )

    def _check_found(self) -> None:
        """Compare the cache that is at the path, if there is one, with the plan."""
        if not (self.path / MANIFEST_FILENAME).exists():
            return
        found = Manifest.read(self.path)
        differences = found.differences_from_plan(self.manifest)
        if differences:
            raise ValueError(
                f"{self.path} holds another cache, which is not overwritten:"
                f"{explain(differences)}\nGive another `cached_activations_path`."
            )
        if found.shards is None and found.versions != self.manifest.versions:
            logger.warning(
                "The harvest goes on with other versions than it began with; vectors "
                "may be rounded otherwise: %s, now %s.",
                found.versions,
                self.manifest.versions,
            )

    @property
    def n_bytes(self) -> int:
        """Bytes of disk that the cache takes at most, to a few thousandths."""
        per_prompt = self.activations_store.training_context_size
        # A token of the prompt, and which one a vector is of, are int32.
        per_token = (
            self.manifest.bytes_per_token + 8 + 4 * self.cfg.context_size / per_prompt
        )
        n_tokens = (
            self.cfg.training_tokens + self.activations_store.tokens_per_model_batch
        )
        return int(n_tokens * per_token)

    def __str__(self) -> str:
        """What it will harvest, and how much disk that takes."""
        m = self.manifest
        return (
            f"{m.training_tokens:,} tokens x {len(m.hook_names)} hooks x {m.d_in}, "
            f"{m.dtype}: {m.bytes_per_token:,} bytes per token, at most "
            f"{self.n_bytes / 2**30:.2f} GiB in shards of {m.tokens_per_shard:,} "
            f"tokens at {self.path}"
        )

    def run(self) -> ActivationCache:
        """Harvest the cache, or what is missing of it, and open it.

        Raises:
            OSError: If the disk has no room for it, before anything is written, or if
                it is full later, in which case what is whole stays; or if another
                process is harvesting it.
            ValueError: If the dataset gives no token.
        """
        if self._is_complete():
            cache = ActivationCache(self.path)
            logger.info("The cache at %s is complete.", self.path)
            return cache
        self._check_room()
        if not (self.path / MANIFEST_FILENAME).exists():
            with complete_or_absent(self.path) as partial:
                (partial / MANIFEST_FILENAME).write_text(self.manifest.to_json())
        with _alone(self.path):
            # Another process may have finished it meanwhile.
            if not self._is_complete():
                remove_leftovers(self.path)
                self._harvest()
                self._finish()
        return ActivationCache(self.path)

    def _is_complete(self) -> bool:
        there = (self.path / MANIFEST_FILENAME).exists()
        return there and Manifest.read(self.path).shards is not None

    def _check_room(self) -> None:
        parent = self.path.resolve()
        while not parent.exists():
            parent = parent.parent
        needed = self.n_bytes - sum(entry.n_bytes for entry in self._shards())
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

    def _shards(self) -> list[ShardEntry]:
        """Those that are there, in their order."""
        folders = sorted(self.path.glob(SHARD_FOLDERS))
        for number, folder in enumerate(folders):
            if folder.name != _shard_name(number):
                raise ValueError(
                    f"{self.path / _shard_name(number)} is missing, and {folder.name} "
                    "is there. Put it back, or delete the cache."
                )
        return [describe(folder) for folder in folders]

    def _harvest(self) -> None:
        """Add the shards that are missing."""
        if self._has_begun:
            # A run that failed has left it somewhere in the dataset.
            self.activations_store = self._make_store(self._dataset)
        self._has_begun = True
        store, entries = self.activations_store, self._shards()
        n_tokens = sum(entry.n_tokens for entry in entries)
        if entries:
            logger.info("Going on after %d shards, %d tokens.", len(entries), n_tokens)
            self._check_same_text(entries[0])
            store.load_from_checkpoint(self.path / entries[-1].name)
        n_shards, wanted = len(entries), self.manifest.training_tokens
        shard = ShardInMemory(
            store.hook_names, self.manifest.tokens_per_shard, store.d_in, store.dtype
        )
        with tqdm(
            total=wanted, initial=n_tokens, desc="Caching activations", unit="tok"
        ) as progress:
            while n_tokens < wanted and not store.epoch_has_ended:
                self._fill(shard, wanted - n_tokens, progress)
                if shard.n_tokens:
                    self._save(shard, self.path / _shard_name(n_shards))
                    n_shards, n_tokens = n_shards + 1, n_tokens + shard.n_tokens
                shard.clear()
        if n_tokens < wanted:
            logger.warning(
                "The dataset has ended: the cache holds %d of the %d tokens asked for.",
                n_tokens,
                wanted,
            )

    def _check_same_text(self, entry: ShardEntry) -> None:
        """Compare where the dataset begins with the first shard."""
        found = Shard.of_cache(self.path, self.manifest, entry).tokens().tokens
        prompts = self.activations_store.take_next()
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
                shard.save(partial, self.manifest.tokens_per_block)
                self.activations_store.save_to_checkpoint(partial)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"{folder} could not be written: {error}. The shards before it are "
                "whole; run the harvest again to go on after them. Is the disk full?"
            ) from error

    def _finish(self) -> None:
        """Keep prompts for evaluation, and write the manifest that makes it a cache."""
        entries = self._shards()
        if not entries:
            # Or other settings would be refused as those of another cache.
            (self.path / MANIFEST_FILENAME).unlink()
            raise ValueError(
                "The dataset must give at least one token that has vectors; it gives "
                f"none in whole contexts of {self.cfg.context_size} tokens."
            )
        folder = self.path / EVALUATION_FOLDER
        if not folder.exists():
            with complete_or_absent(folder) as partial:
                tensors = {"tokens": self._evaluation_tokens()}
                save_file(tensors, partial / EVALUATION_FILENAME)
        tokens = read_tensors(folder / EVALUATION_FILENAME)["tokens"]
        done = replace(
            Manifest.read(self.path),
            n_tokens=sum(entry.n_tokens for entry in entries),
            evaluation_checksum=checksum(tokens),
            shards=entries,
        )
        write_whole(self.path / MANIFEST_FILENAME, done.to_json())

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


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}"


@contextmanager
def _alone(folder: Path) -> Generator[None]:
    """Keep other processes from harvesting the same cache; ends with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with locked(descriptor, "Another process is harvesting this cache", folder):
            yield
    finally:
        os.close(descriptor)
