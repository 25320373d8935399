"""Mixes the vectors of a source and serves them in batches, layers together."""

import logging
import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens.config import HfDataset
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import dtype_to_str
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import override

from sae_lens_multilayer.config import MultiLayerConfig
from sae_lens_multilayer.files import read_tensors
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.ranks import ALONE, Ranks
from sae_lens_multilayer.store.buffer import ShuffleBuffer
from sae_lens_multilayer.store.source import Chunk, ModelSource, Source
from sae_lens_multilayer.store.state import BufferedChunk, StoreState, still_buffered

logger = logging.getLogger(__name__)


class MultiLayerActivationsStore(ActivationsStore):
    """SAELens' activations store for many hooks at once.

    `next(store)` gives `[token, layer, d_in]` in the order of `hook_names`; the layers
    of a token stay together. The vectors of a source go straight into the free slots of
    a buffer that is allocated once. Every token of an epoch is served exactly once
    before any of the next. A store resumes exactly from the state of another one.
    """

    source: Source
    hook_names: list[str]
    _generator: torch.Generator
    _chunks: list[BufferedChunk]
    _n_served: int = 0
    _n_tokens_this_epoch: int = 0

    @override
    @classmethod
    def from_config(  # type: ignore[override]
        cls,
        model: Any,
        cfg: MultiLayerConfig[Any],
        override_dataset: HfDataset | None = None,
        ranks: Ranks = ALONE,
    ) -> "MultiLayerActivationsStore":
        """Make the store of a training run on a model, or of one rank of it.

        Args:
            override_dataset: Used instead of `cfg.dataset_path`.
        """
        hook_names = cfg.resolve_hook_names(as_model(model).shape.n_layers)
        source = ModelSource.from_config(
            model, hook_names, cfg, override_dataset, ranks
        )
        return cls.from_source(source, cfg, ranks)

    @classmethod
    def from_source(
        cls, source: Source, cfg: MultiLayerConfig[Any], ranks: Ranks = ALONE
    ) -> "MultiLayerActivationsStore":
        """Make the store of a training run, or of one rank of it.

        Args:
            source: Gives the vectors of this rank.
            cfg: Its batch size and `training_tokens` are those of all ranks together.
        """
        assert cfg.act_store_device is not None  # set by SAELens' config
        device = torch.device(cfg.act_store_device)
        excluded = torch.tensor(source.excluded_token_ids).long().to(device)
        store = cls(
            model=getattr(source.reader, "model", None),  # type: ignore[arg-type]
            # The source reads the text; SAELens' cache of one hook is not used.
            dataset=None,
            cached_activations_path="",
            streaming=cfg.streaming,
            hook_name=source.hook_names[0],
            hook_head_index=cfg.hook_head_index,
            context_size=cfg.context_size,
            d_in=source.d_in,
            n_batches_in_buffer=cfg.n_batches_in_buffer,
            total_training_tokens=-(-cfg.training_tokens // ranks.count),
            store_batch_size_prompts=cfg.store_batch_size_prompts,
            train_batch_size_tokens=cfg.train_batch_size_tokens // ranks.count,
            prepend_bos=cfg.prepend_bos,
            normalize_activations=cfg.sae.normalize_activations,
            device=device,
            dtype=dtype_to_str(source.dtype),
            model_kwargs=cfg.model_kwargs,
            autocast_lm=cfg.autocast_lm,
            seqpos_slice=cfg.seqpos_slice,
            exclude_special_tokens=excluded if len(excluded) else None,
            activations_mixing_fraction=cfg.activations_mixing_fraction,
        )
        store.source, store.hook_names, store._chunks = source, source.hook_names, []
        store._generator = torch.Generator().manual_seed(cfg.seed)
        return store

    @override
    def load_cached_activation_dataset(self) -> None:
        """SAELens' cache of one hook is not used."""

    @override
    def get_batch_tokens(
        self,
        batch_size: int | None = None,
        raise_at_epoch_end: bool = False,
        move_to_model_device: bool = True,
    ) -> Int[Tensor, "prompt pos"]:
        """Take the next prompts of the text, as SAELens' store does."""
        if self.source.reader is None:
            raise ValueError(f"A {type(self.source).__name__} has no text for prompts.")
        return self.source.reader.get_batch_tokens(
            batch_size or self.store_batch_size_prompts,
            raise_at_epoch_end,
            move_to_model_device,
        )

    @override
    def shuffle_input_dataset(self, seed: int, buffer_size: int = 1) -> None:
        if self.source.reader is not None:
            self.source.reader.shuffle_input_dataset(seed, buffer_size)

    @override
    def reset_input_dataset(self) -> None:
        """Nothing to do: SAELens resets an iterator that it does not read."""

    @override
    def __next__(self) -> Float[Tensor, "token layer d_in"]:
        """The next training batch of `train_batch_size_tokens` tokens."""
        buffer, n_missing = self._buffer, self.train_batch_size_tokens
        parts: list[Tensor] = []
        while n_missing > 0:
            if buffer.n_filled - n_missing < self._n_kept:
                if self.source.epoch_ended:
                    parts.append(self._draw(buffer.n_filled))
                    n_missing -= len(parts[-1])
                self._refill()
            parts.append(self._draw(min(n_missing, buffer.n_filled)))
            n_missing -= len(parts[-1])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _draw(self, n_tokens: int) -> Float[Tensor, "token layer d_in"]:
        self._n_served += n_tokens
        return self._buffer.draw(n_tokens)

    @cached_property
    def _buffer(self) -> ShuffleBuffer:
        buffer = ShuffleBuffer(
            self.buffer_capacity_tokens,
            len(self.hook_names),
            self.d_in,
            self.dtype,
            self.device,
            self._generator if self.activations_mixing_fraction > 0 else None,
        )
        logger.info(
            "Activation buffer: %d tokens x %d layers x %d, %s: %d bytes (%.2f GiB)",
            *buffer.data.shape,
            self.dtype,
            buffer.data.nbytes,
            buffer.data.nbytes / 2**30,
        )
        return buffer

    @property
    def buffer_capacity_tokens(self) -> int:
        """At least `n_batches_in_buffer` contexts, and a chunk and two batches."""
        needed = self.source.max_tokens_per_chunk + 2 * self.train_batch_size_tokens
        return max(self.n_batches_in_buffer * self.training_context_size, needed)

    @property
    def _n_kept(self) -> int:
        """Tokens that stay to be mixed with the next ones, until an epoch ends."""
        if self.source.epoch_ended:
            return 0
        capacity, chunk = self.buffer_capacity_tokens, self.source.max_tokens_per_chunk
        most = capacity - chunk - self.train_batch_size_tokens
        return min(math.floor(capacity * self.activations_mixing_fraction), most)

    def _refill(self) -> None:
        """Read chunks until the buffer is full or enough, or an epoch ends."""
        buffer, max_tokens = self._buffer, self.source.max_tokens_per_chunk
        while buffer.n_free >= max_tokens and not self._has_enough(buffer.n_filled):
            chunk = self.source.next_chunk()
            if chunk is not None:
                self._add(chunk)
            if self.source.epoch_ended:
                self._end_epoch()
                break
        buffer.shuffle()
        self._chunks = still_buffered(self._chunks, buffer.token_numbers)

    def _has_enough(self, n_filled: int) -> bool:
        batch = self.train_batch_size_tokens
        n_in_run = math.ceil(self.total_training_tokens / batch) * batch
        return 0 < n_in_run - self._n_served <= n_filled

    def _add(self, chunk: Chunk) -> None:
        buffer, n_tokens = self._buffer, self.source.n_tokens(chunk)
        self._write(chunk, buffer.free_slots(n_tokens))
        self._chunks.append(BufferedChunk(buffer.n_added, chunk))
        buffer.commit(n_tokens)
        self._n_tokens_this_epoch += n_tokens

    def _write(
        self,
        chunk: Chunk,
        slots: Int[Tensor, " token"],
        rows: Int[Tensor, " token"] | None = None,
    ) -> None:
        """Write vectors of a chunk, those of all or of some rows, into slots."""
        data = self._buffer.data
        for layer, vectors in enumerate(self.source.vectors(chunk, rows)):
            data[:, layer].index_copy_(0, slots, vectors.to(data.device))

    def _end_epoch(self) -> None:
        n_tokens, self._n_tokens_this_epoch = self._n_tokens_this_epoch, 0
        if n_tokens < self.train_batch_size_tokens:
            raise ValueError(
                "The data must have at least one training batch of "
                f"{self.train_batch_size_tokens} tokens, in whole contexts of "
                f"{self.context_size}; it has {n_tokens}."
            )
        logger.info("The data has ended; a new epoch begins.")

    @property
    def state(self) -> StoreState:
        """The state now; it does not change when the store continues."""
        return StoreState(
            fingerprint=self.source.fingerprint,
            source=self.source.state(),
            n_tokens_this_epoch=self._n_tokens_this_epoch,
            n_added=self._buffer.n_added,
            n_served=self._n_served,
            random_state=self._generator.get_state(),
            buffered=self._buffer.token_numbers,
            chunks=tuple(self._chunks),
        )

    @override
    def state_dict(self) -> dict[str, Tensor]:
        """`state` as tensors."""
        return self.state.to_tensors()

    @override
    def load_from_checkpoint(self, checkpoint_path: str | Path) -> None:
        """Resume exactly from the state in a checkpoint."""
        path = Path(checkpoint_path) / ACTIVATIONS_STORE_STATE_FILENAME
        self.resume(StoreState.from_tensors(read_tensors(path)))

    def resume(self, state: StoreState) -> None:
        """Continue exactly from a state; this store must not have been read yet."""
        if state.fingerprint != self.source.fingerprint:
            raise ValueError(
                "A run must be resumed with the source of its vectors: the model, or "
                "the same cache."
            )
        if len(state.buffered) > self.buffer_capacity_tokens:
            raise ValueError(
                f"The buffer must hold the {len(state.buffered)} tokens of the "
                f"checkpoint's; it has {self.buffer_capacity_tokens} slots. Resume "
                "with the checkpoint's `n_batches_in_buffer`, "
                "`store_batch_size_prompts` and `train_batch_size_tokens`."
            )
        self._generator.set_state(state.random_state)
        self._n_tokens_this_epoch = state.n_tokens_this_epoch
        self._n_served = state.n_served
        self.source.resume(state.source)
        self._chunks = list(state.chunks)
        slots = self._buffer.restore(state.buffered, state.n_added)
        for chunk in tqdm(self._chunks, "Refilling the buffer", leave=False):
            rows = state.buffered - chunk.first_token
            here = (rows >= 0) & (rows < self.source.n_tokens(chunk.chunk))
            self._write(chunk.chunk, slots[here.to(slots.device)], rows[here])
