"""Harvests a cache: runs the model once and saves its vectors on disk."""

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
from sae_lens_multilayer.store.source import ModelSource

logger = logging.getLogger(__name__)

SHARD_BYTES = 2**28
"""Approximate size of a shard; harvesting holds one in memory."""
BLOCK_BYTES = 2**17
"""Approximate bytes of one hook that are read at a time."""
STATE_FILENAME = "source_state.safetensors"


class MultiLayerCacheActivationsRunner:
    """Runs the model over a dataset once and saves the vectors of all hooks on disk.

    As SAELens' `CacheActivationsRunner`, for many hooks, with the config of a training
    run: its first `training_tokens` are cached in whole prompts, in order, in its
    `dtype`. Vectors are raw, so one cache serves runs with any lens or none. A killed
    harvest is resumed when it is run again, and ends with the same bytes.
    """

    def __init__(
        self,
        cfg: MultiLayerConfig[Any],
        override_dataset: HfDataset | None = None,
        override_model: Any | None = None,
        shard_bytes: int = SHARD_BYTES,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        """Load the model and the dataset, and check a cache at the path.

        Args:
            override_dataset: Used instead of `cfg.dataset_path`.
            override_model: Used instead of loading `cfg.model_name`.
            shard_bytes: Approximate size of a shard, at least one model batch.
            block_bytes: Approximate bytes of a hook that are read at a time, at least
                one vector.
        """
        check_one_process("A harvest")
        if cfg.cached_activations_path is None:
            raise ValueError("`cached_activations_path` must be given; got None.")
        self.cfg = cfg
        self.path = Path(cfg.cached_activations_path)
        if not self._has_begun:
            check_free(self.path)
        self.model = override_model
        if override_model is None:
            shape = loading.shape_by_name(*cfg.named_model)
            names = None if shape is None else cfg.resolve_hook_names(shape.n_layers)
            self.model = loading.load_by_name(*cfg.named_model, cfg.llm_device, names)
        hook_names = cfg.resolve_hook_names(as_model(self.model).shape.n_layers)
        self.source = ModelSource.from_config(
            self.model, hook_names, cfg, override_dataset
        )
        self._start = self.source.state()
        self.record = Record(
            CACHE_KIND,
            vector_settings(cfg) | self._layout(shard_bytes, block_bytes),
            model_fingerprints(self.model),
        )
        if self._has_begun:
            advice = "Give another `cached_activations_path`."
            found = Record.read_same(self.path, self.record, advice)
            if not self._is_complete:
                found.warn_of_versions(self.path)

    def _layout(self, shard_bytes: int, block_bytes: int) -> dict[str, Any]:
        """The other settings that decide the bytes of the cache."""
        source, shape = self.source, as_model(self.model).shape
        split = getattr(source.reader.dataset, "split", None)
        n_in_block = block_bytes // (source.d_in * source.dtype.itemsize)
        return {
            "hook_names": source.hook_names,
            "n_layers": shape.n_layers,
            "d_model": shape.d_model,
            "dataset_split": None if split is None else str(split),
            "excluded_token_ids": source.excluded_token_ids,
            "training_tokens": self.cfg.training_tokens,
            # The rounding of the vectors depends on it.
            "store_batch_size_prompts": self.cfg.store_batch_size_prompts,
            "tokens_per_shard": max(
                shard_bytes // self.source.bytes_per_token, source.max_tokens_per_chunk
            ),
            "tokens_per_block": max(1, n_in_block),
        }

    @property
    def _has_begun(self) -> bool:
        return (self.path / RECORD_FILENAME).exists()

    @property
    def _is_complete(self) -> bool:
        return (self.path / SHARDS_FILENAME).exists()

    @property
    def n_bytes(self) -> int:
        """Upper bound on the cache's bytes on disk."""
        # Prompts, and the prompt and position of each vector, are int32.
        prompt_tokens_per_vector = (
            self.cfg.context_size / self.source.reader.training_context_size
        )
        per_token = self.source.bytes_per_token + 8 + 4 * prompt_tokens_per_vector
        n_tokens = self.cfg.training_tokens + self.source.max_tokens_per_chunk
        return int(n_tokens * per_token)

    def __str__(self) -> str:
        settings = self.record.settings
        return (
            f"{settings['training_tokens']:,} tokens x {len(settings['hook_names'])} "
            f"hooks x {settings['d_in']}, {settings['dtype']}: "
            f"{self.source.bytes_per_token:,} bytes per token, at most "
            f"{self.n_bytes / 2**30:.2f} GiB in shards of "
            f"{settings['tokens_per_shard']:,} tokens at {self.path}"
        )

    def run(self) -> ActivationCache:
        """Harvest the cache, or the rest of it, and open it.

        OSError is raised before anything is written if the disk lacks room. If it is
        full later, complete shards stay.
        """
        if self._is_complete:
            logger.info("The cache at %s is complete.", self.path)
            return ActivationCache(self.path)
        self._check_room()
        if not self._has_begun:
            with complete_or_absent(self.path) as partial:
                self.record.write(partial)
        with locked(self.path):
            # Another process may have finished it meanwhile.
            if not self._is_complete:
                remove_leftovers(self.path)
                try:
                    self._harvest()
                    self._finish()
                except ValueError:
                    self._forget_if_empty()
                    raise
        return ActivationCache(self.path)

    def _check_room(self) -> None:
        parent = self.path.resolve()
        while not parent.exists():
            parent = parent.parent
        needed = self.n_bytes - sum(shard.n_bytes for shard in self._shards())
        free = shutil.disk_usage(parent).free
        logger.info("Caching %s. Disk: %d bytes needed, %d free.", self, needed, free)
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"The cache needs {needed:,} bytes of disk, and {free:,} are free; "
                "cache fewer tokens or layers, or use `dtype='bfloat16'`",
                str(self.path),
            )

    def _shards(self) -> list[Shard]:
        """The shards on disk, in order."""
        folders = sorted(self.path.glob("shard-*"))
        wanted = [self._shard_folder(index) for index in range(len(folders))]
        if missing := [folder.name for folder in wanted if folder not in folders]:
            raise ValueError(f"{self.path} has {missing} missing; put it back.")
        return [Shard.open(folder) for folder in folders]

    def _shard_folder(self, index: int) -> Path:
        return self.path / f"shard-{index:06d}"

    def _harvest(self) -> None:
        """Add the missing shards."""
        source, wanted = self.source, self.cfg.training_tokens
        n_shards, n_tokens = self._resume()
        shard = ShardInMemory(
            source.hook_names,
            self.record.settings["tokens_per_shard"],
            source.d_in,
            source.dtype,
        )
        with tqdm(
            total=wanted, initial=n_tokens, desc="Caching activations", unit="tok"
        ) as progress:
            while n_tokens < wanted and not source.epoch_ended:
                self._fill(shard, wanted - n_tokens, progress)
                if shard.n_tokens:
                    self._save(shard, self._shard_folder(n_shards))
                    n_shards, n_tokens = n_shards + 1, n_tokens + shard.n_tokens
                shard.clear()
        if n_tokens < wanted:
            logger.warning("The dataset has ended after %d tokens.", n_tokens)

    def _resume(self) -> tuple[int, int]:
        """Continue after the shards on disk; their number and their tokens."""
        # An earlier `run` that failed has left the source elsewhere in the dataset.
        self.source.resume(self._start)
        shards = self._shards()
        n_tokens = sum(shard.n_tokens for shard in shards)
        if shards:
            logger.info("Resuming after %d shards, %d tokens.", len(shards), n_tokens)
            found, prompts = shards[0].tokens().tokens, self.source.next_chunk()
            if prompts is None or not torch.equal(prompts.int(), found[: len(prompts)]):
                raise ValueError(
                    f"The dataset must be that of the cache at {self.path}; it begins "
                    "with other tokens."
                )
            self.source.resume(read_tensors(shards[-1].folder / STATE_FILENAME))
        return len(shards), n_tokens

    def _fill(self, shard: ShardInMemory, n_missing: int, progress: Any) -> None:
        """Run the model until the shard is full or has enough, or the dataset ends."""
        source = self.source
        while (
            shard.n_free >= source.max_tokens_per_chunk
            and shard.n_tokens < n_missing
            and not source.epoch_ended
        ):
            prompts = source.next_chunk()
            if prompts is None:
                return
            indices = source.token_indices(prompts)
            shard.add(prompts, indices, source.vectors(prompts))
            progress.update(len(indices))

    def _save(self, shard: ShardInMemory, folder: Path) -> None:
        try:
            with complete_or_absent(folder) as partial:
                shard.save(partial)
                save_file(self.source.state(), partial / STATE_FILENAME)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"{folder} could not be written: {error}. Run the harvest again to "
                "resume it after the shard before."
            ) from error

    def _finish(self) -> None:
        """Save prompts for evaluation, then the list that marks the cache complete."""
        shards = self._shards()
        if not shards:
            raise ValueError(
                "The dataset must have at least one token that has vectors, in whole "
                f"contexts of {self.cfg.context_size}; it has none."
            )
        folder = self.path / EVALUATION_FOLDER
        if not folder.exists():
            with complete_or_absent(folder) as partial:
                tensors = {"tokens": self._evaluation_tokens()}
                save_file(tensors, partial / EVALUATION_FILENAME)
        tensors = read_tensors(folder / EVALUATION_FILENAME)
        listed = {shard.folder.name: shard.numbers for shard in shards}
        content = {"evaluation_hash": hash_of_tensors(tensors), "shards": listed}
        write_whole(self.path / SHARDS_FILENAME, json.dumps(content, indent=1))

    def _forget_if_empty(self) -> None:
        """Without a shard, a harvest with other settings must not be refused."""
        if not self._shards():
            for name in (RECORD_FILENAME, LOCK_FILENAME):
                (self.path / name).unlink()

    def _evaluation_tokens(self) -> Tensor:
        cfg = self.cfg
        if self.source.epoch_ended:
            logger.warning("Evaluations will be on text that is trained on.")
        batch = cfg.eval_batch_size_prompts or cfg.store_batch_size_prompts
        n_prompts = max(1, cfg.n_eval_batches) * batch
        return self.source.evaluation_prompts(n_prompts).cpu().int()
