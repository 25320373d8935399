"""Runs the model once for all hooks and serves shuffled tokens, layers together."""

import logging
import math
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens.config import HfDataset
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import override

from sae_lens_multilayer.config import MultiLayerConfig
from sae_lens_multilayer.files import read_tensors
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.models.model import Model
from sae_lens_multilayer.ranks import ALONE, Ranks
from sae_lens_multilayer.store.buffer import ShuffleBuffer
from sae_lens_multilayer.store.place import Harvest, Place, still_waiting
from sae_lens_multilayer.text.prompts import Text, counted_positions, next_rows
from sae_lens_multilayer.text.stream import ResumableTokens

logger = logging.getLogger(__name__)


class NonFiniteActivationError(ValueError):
    """An activation of the model is NaN or infinite."""


class MultiLayerActivationsStore(ResumableTokens):
    """SAELens' activations store for many hooks at once.

    The tokens come from the host's store. One forward pass, which stops after the last
    block needed, gives the vectors of all hooks; they go straight into the free slots
    of a buffer that is allocated once. `next(store)` gives `[token, layer, d_in]` in
    the order of `hook_names`; a token's layers stay together. Every token of an epoch
    is served exactly once before any of the next. A store goes on exactly from the
    `Place` of another one.
    """

    hook_names: list[str]
    _lm: Model
    _generator: torch.Generator
    _buffer: ShuffleBuffer | None = None
    _n_model_batches: int = 0
    _n_served: int = 0
    _n_tokens_this_epoch: int = 0
    _epoch_has_ended: bool = False  # the buffer holds the last tokens of an epoch
    _harvests: list[Harvest]  # of which tokens wait in the buffer

    @override
    @classmethod
    def from_config(  # type: ignore[override]
        cls,
        model: Any,
        cfg: MultiLayerConfig[Any],
        override_dataset: HfDataset | None = None,
        ranks: Ranks = ALONE,
    ) -> "MultiLayerActivationsStore":
        """Make the store of a training run, or of one rank of it.

        Args:
            model: A loaded model of any kind the host can hook.
            cfg: The run's configuration.
            override_dataset: A dataset to read instead of `cfg.dataset_path`.
            ranks: Each reads rows of its own.

        Raises:
            ValueError: If a hook does not exist or the hooks differ in width, if the
                context is too long for the model, or if the dataset is empty.
        """
        lm = as_model(model)
        lm.shape.check_context_size(cfg.context_size, cfg.model_name)
        names = cfg.resolve_hook_names(lm.shape.n_layers)
        lm.own_hook_names(names)
        dataset = Text.from_config(cfg).load_dataset(override_dataset)
        store = super().from_config(lm.module, cfg, override_dataset=dataset)  # type: ignore[arg-type]
        assert isinstance(store, cls)
        store.hook_name, store.hook_names = names[0], names
        store._lm = lm
        store._generator = torch.Generator().manual_seed(cfg.seed)
        assert store.dataset is not None
        store.dataset = ranks.own_rows(store.dataset)
        store._harvests = []
        lm.check_hook_widths(
            names, cfg.sae.d_in, head_indices=store._head_indices, **store.model_kwargs
        )
        return store

    @property
    def _head_indices(self) -> list[int | None]:
        return [self.hook_head_index] * len(self.hook_names)

    @override
    @torch.no_grad()
    def get_multi_hook_activations(
        self, batch_tokens: Int[Tensor, "prompt pos"]
    ) -> dict[str, Float[Tensor, "prompt kept_pos d_in"]]:
        """Vectors of all hooks from one forward pass, in raw space.

        Positions outside `seqpos_slice` are left out.
        """
        with torch.autocast(
            device_type=self._lm.device.type,
            dtype=torch.bfloat16,
            enabled=self.autocast_lm,
        ):
            vectors = self._lm.vectors(
                batch_tokens, self.hook_names, self._head_indices, **self.model_kwargs
            )
        positions = slice(*self.seqpos_slice)
        return {
            name: x[:, positions]
            for name, x in zip(self.hook_names, vectors, strict=True)
        }

    @override
    def __next__(self) -> Float[Tensor, "token layer d_in"]:
        """The next training batch of `train_batch_size_tokens` tokens.

        Raises:
            NonFiniteActivationError: If the model gives a NaN or an infinity; names the
                hook and the batch.
            ValueError: If the dataset holds less than one training batch.
        """
        buffer = self._ensure_buffer()
        n_missing = self.train_batch_size_tokens
        parts: list[Tensor] = []
        while n_missing > 0:
            if buffer.n_filled - n_missing < self._n_kept(buffer):
                if self._epoch_has_ended:
                    parts.append(self._draw(buffer, buffer.n_filled))
                    n_missing -= len(parts[-1])
                self._refill(buffer)
            parts.append(self._draw(buffer, min(n_missing, buffer.n_filled)))
            n_missing -= len(parts[-1])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _draw(self, buffer: ShuffleBuffer, n_tokens: int) -> Tensor:
        self._n_served += n_tokens
        return buffer.draw(n_tokens)

    def _ensure_buffer(self) -> ShuffleBuffer:
        if self._buffer is None:
            capacity = self.buffer_capacity_tokens
            shuffles = self.activations_mixing_fraction > 0
            self._buffer = ShuffleBuffer(
                capacity,
                len(self.hook_names),
                self.d_in,
                self.dtype,
                self.device,
                self._generator if shuffles else None,
            )
            logger.info(
                "Activation buffer: %d tokens x %d layers x %d, %s: %d bytes "
                "(%.2f GiB)",
                *self._buffer.data.shape,
                self.dtype,
                self._buffer.data.nbytes,
                self._buffer.data.nbytes / 2**30,
            )
        return self._buffer

    def evaluation_prompts(
        self, n_batches: int, batch_size_prompts: int
    ) -> Int[Tensor, "prompt pos"]:
        """Take the prompts of an evaluation; they are not trained on."""
        batches = [self.get_batch_tokens(batch_size_prompts) for _ in range(n_batches)]
        return torch.cat(batches)

    @override
    def load_cached_activation_dataset(self) -> None:
        """SAELens' cache of one hook is not read."""

    @property
    def source(self) -> int:
        """Which cache the vectors come from; 0: the model."""
        return 0

    @property
    def tokens_per_model_batch(self) -> int:
        """Tokens whose vectors one forward pass can give."""
        return self.store_batch_size_prompts * self.training_context_size

    @property
    def buffer_capacity_tokens(self) -> int:
        """Slots of the buffer.

        The host's size, `n_batches_in_buffer` contexts, or more where that cannot hold
        a model batch beside two training batches (the host then raises).
        """
        needed = self.tokens_per_model_batch + 2 * self.train_batch_size_tokens
        return max(self.n_batches_in_buffer * self.training_context_size, needed)

    def _n_kept(self, buffer: ShuffleBuffer) -> int:
        """Tokens that stay to be mixed with the next ones, while an epoch lasts."""
        if self._epoch_has_ended:
            return 0
        capacity = buffer.n_filled + buffer.n_free
        most = capacity - self.tokens_per_model_batch - self.train_batch_size_tokens
        return min(math.floor(capacity * self.activations_mixing_fraction), most)

    def _refill(self, buffer: ShuffleBuffer) -> None:
        """Run the model until the buffer is full, or holds all that the run needs, or
        the dataset has ended."""
        self._epoch_has_ended = False
        while buffer.n_free >= self.tokens_per_model_batch:
            if self._has_enough(buffer.n_filled) or self._epoch_has_ended:
                break
            prompts = self.take_next()
            if prompts is not None:
                self._harvest(prompts, buffer)
            if self._epoch_has_ended:
                self._end_epoch()
        buffer.shuffle()
        self._harvests = still_waiting(self._harvests, buffer.waiting)

    def _has_enough(self, n_filled: int) -> bool:
        batch = self.train_batch_size_tokens
        n_in_run = math.ceil(self.total_training_tokens / batch) * batch
        return 0 < n_in_run - self._n_served <= n_filled

    def _end_epoch(self) -> None:
        n_tokens, self._n_tokens_this_epoch = self._n_tokens_this_epoch, 0
        if n_tokens < self.train_batch_size_tokens:
            raise ValueError(
                "The dataset must hold at least one training batch of "
                f"{self.train_batch_size_tokens} tokens, in whole contexts of "
                f"{self.context_size}; it gives {n_tokens}. Use more data, a smaller "
                "`train_batch_size_tokens` or a shorter `context_size`."
            )
        logger.info("The dataset has ended; a new epoch begins.")

    def take_next(self) -> Int[Tensor, "prompt pos"] | None:
        """The prompts of the next forward pass; None if the dataset ends before one.

        `epoch_has_ended` says whether the dataset has ended with them.
        """
        prompts, self._epoch_has_ended = next_rows(self, self.store_batch_size_prompts)
        if prompts is not None:
            self._n_model_batches += 1
            self._lm.check_tokens(prompts)
        return prompts

    @property
    def epoch_has_ended(self) -> bool:
        """Whether the last tokens of an epoch are those that were taken last."""
        return self._epoch_has_ended

    def _harvest(
        self, prompts: Int[Tensor, "prompt pos"], buffer: ShuffleBuffer
    ) -> None:
        """Write the vectors of a batch of prompts into free slots."""
        kept = self.kept_tokens(prompts)
        self._write(prompts, kept, buffer.free_slots(len(kept)), buffer)
        self._harvests.append(Harvest(buffer.n_committed, prompts.cpu()))
        buffer.commit(len(kept))
        self._n_tokens_this_epoch += len(kept)

    def _write(
        self,
        prompts: Int[Tensor, "prompt pos"],
        rows: Int[Tensor, " token"],
        slots: Int[Tensor, " token"],
        buffer: ShuffleBuffer,
    ) -> None:
        """Write the vectors of some tokens of a batch of prompts into slots."""
        for layer, vectors in enumerate(self.vectors_of(prompts, rows)):
            buffer.data[:, layer].index_copy_(0, slots, vectors)

    @torch.no_grad()
    def vectors_of(
        self, prompts: Int[Tensor, "prompt pos"], rows: Int[Tensor, " token"]
    ) -> Generator[Float[Tensor, "token d_in"]]:
        """Run the model; the vectors of some tokens hook by hook, in the store's dtype.

        Args:
            rows: Some of `kept_tokens(prompts)`.

        Raises:
            NonFiniteActivationError: If one is NaN or infinite.
        """
        for name, acts in self.get_multi_hook_activations(prompts).items():
            vectors = acts.flatten(0, 1).to(self.device)[rows].to(self.dtype)
            self._check_finite(vectors, name)
            yield vectors

    def kept_tokens(self, prompts: Tensor) -> Int[Tensor, " token"]:
        """Which tokens of a batch of prompts are trained on, by their place in it.

        The places are those after `seqpos_slice`.
        """
        inside = prompts[:, slice(*self.seqpos_slice)].to(self.device)
        if self.exclude_special_tokens is None:
            return torch.arange(inside.numel(), device=inside.device)
        counted = counted_positions(inside, self.exclude_special_tokens)
        return counted.flatten().nonzero().flatten()

    def _check_finite(self, rows: Tensor, hook_name: str) -> None:
        if rows.numel() and not rows.abs().amax().isfinite():
            n_bad = int((~rows.isfinite().all(-1)).sum())
            raise NonFiniteActivationError(
                f"Activations must be finite; {n_bad} of {len(rows)} vectors at "
                f"{hook_name!r} in model batch {self._n_model_batches} (dataset row "
                f"{self.n_dataset_processed}) are NaN or infinite in {self.dtype}. "
                "Nothing was trained on them or saved. Check the dtypes of the model "
                "and of the run, and this part of the data."
            )

    @property
    def place(self) -> Place:
        """Where the store stands now; it does not change when the store goes on."""
        buffer = self._ensure_buffer()
        return Place(
            source=self.source,
            n_dataset_processed=self.n_dataset_processed,
            n_rows_this_epoch=self._n_rows_this_epoch,
            n_tokens_this_epoch=self._n_tokens_this_epoch,
            epoch_has_ended=self._epoch_has_ended,
            n_model_batches=self._n_model_batches,
            n_harvested=buffer.n_committed,
            n_served=self._n_served,
            random_state=self._generator.get_state(),
            unread=self.unread,
            waiting=buffer.waiting,
            harvests=tuple(self._harvests),
        )

    @override
    def state_dict(self) -> dict[str, Tensor]:
        """The place of the store, as tensors."""
        return self.place.to_tensors()

    @override
    def load_from_checkpoint(self, checkpoint_path: str | Path) -> None:
        """Go on exactly where a checkpoint was written.

        The model runs again on the prompts whose tokens wait in the buffer.

        Raises:
            ValueError: If the checkpoint is not of such a store or its file is torn, or
                if more tokens wait than the buffer of this run holds.
        """
        path = Path(checkpoint_path) / ACTIVATIONS_STORE_STATE_FILENAME
        tensors = read_tensors(path)
        try:
            place = Place.from_tensors(tensors)
        except KeyError as error:
            raise ValueError(
                f"{path} must hold the place of a multi-layer store; {error} is not in "
                "it. Resume from a checkpoint of this version of the package."
            ) from error
        self._go_to(place)

    def _go_to(self, place: Place) -> None:
        if place.source != self.source:
            raise ValueError(
                "The tokens of a run that is resumed must come from where they came "
                "from in the checkpoint: from the model, or from one and the same "
                "cache. Resume with the checkpoint's `use_cached_activations` and "
                "`cached_activations_path`."
            )
        self._generator.set_state(place.random_state)
        self.n_dataset_processed = place.n_dataset_processed
        self._n_tokens_this_epoch = place.n_tokens_this_epoch
        self._epoch_has_ended = place.epoch_has_ended
        self._n_served = place.n_served
        self.go_to(place.n_rows_this_epoch, place.unread)
        self._fill_again(place)
        self._n_model_batches = place.n_model_batches

    def _fill_again(self, place: Place) -> None:
        """Rebuild the buffer from the forward passes whose tokens wait in it."""
        buffer = self._ensure_buffer()
        if len(place.waiting) > buffer.n_free:
            raise ValueError(
                f"The buffer must hold the {len(place.waiting)} tokens that waited in "
                f"the checkpoint; it has {buffer.n_free} slots. Resume with the "
                "checkpoint's `n_batches_in_buffer`, `store_batch_size_prompts` and "
                "`train_batch_size_tokens`."
            )
        self._harvests = list(place.harvests)
        slots = buffer.restore(place.waiting, place.n_harvested)
        for harvest in tqdm(self._harvests, "Filling the buffer again", leave=False):
            kept = self.kept_tokens(harvest.prompts)
            in_batch = place.waiting - harvest.first_token
            here = ((in_batch >= 0) & (in_batch < len(kept))).to(slots.device)
            rows = kept[in_batch.to(slots.device)[here]]
            self._write(harvest.prompts, rows, slots[here], buffer)
