"""Where vectors come from: a running model or a cache, a chunk of tokens at a time."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sae_lens.config import HfDataset
from sae_lens.util import str_to_dtype
from torch import Tensor
from typing_extensions import override

from sae_lens_multilayer.config import MultiLayerConfig
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.models.model import Model, ModelShape
from sae_lens_multilayer.ranks import ALONE, Ranks
from sae_lens_multilayer.store.cache import ActivationCache
from sae_lens_multilayer.text.prompts import (
    Text,
    check_not_all_special,
    mark_counted,
    next_rows,
)
from sae_lens_multilayer.text.stream import ResumableTokens

logger = logging.getLogger(__name__)

Chunk = Int[Tensor, "row column"]
"""Identifies a chunk of tokens: its prompts, or the index of a block of a cache."""


class NonFiniteActivationError(ValueError):
    """An activation of the model is NaN or infinite."""


class Source(ABC):
    """Gives the vectors of all hooks, a chunk of tokens at a time.

    A checkpoint stores chunks instead of vectors, so `vectors` of a chunk must give the
    same values again.
    """

    hook_names: list[str]
    d_in: int
    dtype: torch.dtype
    """Of the vectors."""
    max_tokens_per_chunk: int
    fingerprint: int = 0
    """Differs between sources whose chunks cannot be exchanged; 0: a model."""
    excluded_token_ids: list[int]
    """Tokens that are left out."""
    n_chunks: int = 0
    """Chunks taken so far."""
    epoch_ended: bool = False
    """Whether no chunk of this epoch follows the one taken last."""

    @property
    def shape(self) -> ModelShape:
        """Shape of the model whose vectors they are; its hooks are all by default."""
        return ModelShape(len(self.hook_names), self.d_in)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the vectors of one token at all hooks."""
        return len(self.hook_names) * self.d_in * self.dtype.itemsize

    @property
    def reader(self) -> ResumableTokens | None:
        """The text that is read; None: the source has no text."""
        return None

    @abstractmethod
    def next_chunk(self) -> Chunk | None:
        """Take the next chunk, on the CPU; None if the epoch ended before one."""

    @abstractmethod
    def n_tokens(self, chunk: Chunk) -> int:
        """Tokens of a chunk that have vectors."""

    @abstractmethod
    def vectors(
        self, chunk: Chunk, rows: Int[Tensor, " token"] | None = None
    ) -> Generator[Float[Tensor, "token d_in"]]:
        """The vectors of a chunk hook by hook; use each before taking the next.

        Args:
            rows: Indices of some of its `n_tokens` tokens, on the CPU; None: all.
        """

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Small tensors from which `resume` continues after the chunk taken last."""

    @abstractmethod
    def resume(self, state: dict[str, Tensor]) -> None:
        """Continue from the `state` of another source with the same settings."""

    def evaluation_prompts(self, n_prompts: int) -> Int[Tensor, "prompt pos"] | None:
        """Prompts that are not trained on; None: the source has no text."""
        return None


class ModelSource(Source):
    """Runs a model on a text; a chunk is a batch of prompts run to the last hook."""

    def __init__(
        self,
        model: Model,
        reader: ResumableTokens,
        hook_names: list[str],
        cfg: MultiLayerConfig[Any],
    ) -> None:
        """Use `from_config`, which checks that model, hooks and text fit."""
        self._reader, self.hook_names, self.d_in = reader, hook_names, cfg.sae.d_in
        self.dtype = str_to_dtype(cfg.dtype)
        self._n_prompts = cfg.store_batch_size_prompts
        self.max_tokens_per_chunk = self._n_prompts * reader.training_context_size
        excluded = reader.exclude_special_tokens
        self.excluded_token_ids = [] if excluded is None else excluded.tolist()
        self._model, self._autocast = model, cfg.autocast_lm
        self._model_kwargs = {
            "head_indices": [cfg.hook_head_index] * len(hook_names),
            **cfg.model_kwargs,
        }

    @classmethod
    def from_config(
        cls,
        model: Any,
        hook_names: list[str],
        cfg: MultiLayerConfig[Any],
        dataset: HfDataset | None = None,
        ranks: Ranks = ALONE,
    ) -> "ModelSource":
        """The source of a training run; each rank reads its own rows.

        Args:
            model: A loaded model of any kind that SAELens can hook.
            dataset: Used instead of `cfg.dataset_path`.
        """
        lm = as_model(model)
        reader = Text.from_config(cfg).reader(lm.module, dataset)
        assert reader.dataset is not None
        reader.dataset = ranks.own_rows(reader.dataset)
        source = cls(lm, reader, hook_names, cfg)
        lm.check_hook_widths(hook_names, source.d_in, **source._model_kwargs)
        return source

    @property
    @override
    def reader(self) -> ResumableTokens:
        return self._reader

    @override
    def next_chunk(self) -> Int[Tensor, "prompt pos"] | None:
        prompts, self.epoch_ended = next_rows(self.reader, self._n_prompts)
        if prompts is None:
            return None
        self.n_chunks += 1
        prompts = prompts.cpu()
        self._model.check_tokens(prompts)
        if self.n_chunks == 1:
            check_not_all_special(self.reader, prompts)
        return prompts

    @override
    def n_tokens(self, chunk: Chunk) -> int:
        return len(self.token_indices(chunk))

    def token_indices(
        self, prompts: Int[Tensor, "prompt pos"]
    ) -> Int[Tensor, " token"]:
        """Indices into the flattened prompts of the tokens that have vectors."""
        return mark_counted(self.reader, prompts).counted.flatten().nonzero().flatten()

    @torch.no_grad()
    def activations(
        self, prompts: Int[Tensor, "prompt pos"]
    ) -> dict[str, Float[Tensor, "prompt pos d_in"]]:
        """Activations of all hooks and positions from one forward pass, raw."""
        with torch.autocast(
            device_type=self._model.device.type,
            dtype=torch.bfloat16,
            enabled=self._autocast,
        ):
            vectors = self._model.vectors(
                prompts, self.hook_names, **self._model_kwargs
            )
        return dict(zip(self.hook_names, vectors, strict=True))

    @override
    @torch.no_grad()
    def vectors(
        self, chunk: Chunk, rows: Int[Tensor, " token"] | None = None
    ) -> Generator[Float[Tensor, "token d_in"]]:
        """Run the model on a chunk; its vectors, all finite, hook by hook."""
        indices = self.token_indices(chunk)
        indices = indices if rows is None else indices[rows]
        is_whole = rows is None and len(indices) == chunk.numel()
        for name, acts in self.activations(chunk).items():
            flat = acts.flatten(0, 1)  # [token, d_in]
            vectors = flat if is_whole else flat[indices.to(flat.device)]
            vectors = vectors.to(self.dtype)
            self._check_finite(vectors, name)
            yield vectors

    def _check_finite(self, vectors: Tensor, hook_name: str) -> None:
        if vectors.numel() and not vectors.abs().amax().isfinite():
            n_bad = int((~vectors.isfinite().all(-1)).sum())
            raise NonFiniteActivationError(
                f"Activations must be finite; {n_bad} of {len(vectors)} vectors at "
                f"{hook_name!r} in model batch {self.n_chunks} (dataset row "
                f"{self.reader.n_dataset_processed}) are NaN or infinite in "
                f"{self.dtype}. Check the dtypes of the model and of the run."
            )

    @override
    def state(self) -> dict[str, Tensor]:
        return {
            "n_chunks": torch.tensor(self.n_chunks),
            "epoch_ended": torch.tensor(self.epoch_ended),
            "n_rows": torch.tensor(self.reader.n_dataset_processed),
            "n_rows_this_epoch": torch.tensor(self.reader.n_rows_this_epoch),
            "remaining_tokens": self.reader.remaining_tokens,
        }

    @override
    def resume(self, state: dict[str, Tensor]) -> None:
        self.n_chunks = int(state["n_chunks"])
        self.epoch_ended = bool(state["epoch_ended"])
        self.reader.n_dataset_processed = int(state["n_rows"])
        self.reader.resume(int(state["n_rows_this_epoch"]), state["remaining_tokens"])

    @override
    def evaluation_prompts(self, n_prompts: int) -> Int[Tensor, "prompt pos"]:
        """Take the next prompts of the text; they are not trained on."""
        return self.reader.get_batch_tokens(n_prompts)


class IndexedSource(Source):
    """A source with the same chunks in each epoch; a chunk is the index of one."""

    chunks_per_epoch: int

    def index_of(self, epoch: int, i: int) -> int:
        """Index of the i-th chunk of an epoch."""
        return i

    @override
    def next_chunk(self) -> Int[Tensor, "one index"]:
        epoch, i = divmod(self.n_chunks, self.chunks_per_epoch)
        self.n_chunks += 1
        self.epoch_ended = i + 1 == self.chunks_per_epoch
        return torch.tensor([[self.index_of(epoch, i)]])

    @override
    def state(self) -> dict[str, Tensor]:
        return {"n_chunks": torch.tensor(self.n_chunks)}

    @override
    def resume(self, state: dict[str, Tensor]) -> None:
        self.n_chunks = int(state["n_chunks"])
        is_end = self.n_chunks % self.chunks_per_epoch == 0
        self.epoch_ended = self.n_chunks > 0 and is_end


class CacheSource(IndexedSource):
    """Reads a cache; a chunk is one of its blocks.

    Their order depends on the seed and on the index of the epoch.
    """

    def __init__(
        self,
        cache: ActivationCache,
        hook_names: list[str],
        seed: int | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """Prepare to read some hooks of a cache, in any order.

        Args:
            seed: Decides the order of blocks; None: the order of the dataset.
            ranks: Each reads its own blocks.
        """
        if cache.n_blocks < ranks.count:
            raise ValueError(
                f"The cache must have a block of tokens for each of {ranks.count} "
                f"processes; {cache.path} has {cache.n_blocks}."
            )
        settings = cache.record.settings
        self.cache, self.hook_names, self.d_in = cache, hook_names, settings["d_in"]
        self.dtype = str_to_dtype(cache.dtype)
        self.max_tokens_per_chunk = cache.tokens_per_block
        self.fingerprint = cache.identity
        self.excluded_token_ids = settings["excluded_token_ids"]
        self._seed, self._ranks = seed, ranks
        self.chunks_per_epoch = len(range(ranks.index, cache.n_blocks, ranks.count))
        self._order = 0, self._order_of(0)

    @classmethod
    def from_config(
        cls,
        cache: ActivationCache,
        hook_names: list[str],
        cfg: MultiLayerConfig[Any],
        ranks: Ranks = ALONE,
    ) -> "CacheSource":
        """The source of a training run; blocks are in order if nothing is mixed."""
        seed = cfg.seed if cfg.activations_mixing_fraction > 0 else None
        return cls(cache, hook_names, seed, ranks)

    @override
    def index_of(self, epoch: int, i: int) -> int:
        if self._order[0] != epoch:
            self._order = epoch, self._order_of(epoch)
        return int(self._order[1][i])

    def _order_of(self, epoch: int) -> Int[np.ndarray, " block"]:
        order = np.arange(self.cache.n_blocks)
        if self._seed is not None:
            order = np.random.default_rng([self._seed, epoch]).permutation(order)
        # The order is the same on all ranks, so each block belongs to one rank.
        return order[self._ranks.index :: self._ranks.count]

    @override
    def n_tokens(self, chunk: Chunk) -> int:
        return self.cache.n_tokens_of(int(chunk))

    @override
    def vectors(
        self, chunk: Chunk, rows: Int[Tensor, " token"] | None = None
    ) -> Generator[Float[Tensor, "token d_in"]]:
        for vectors in self.cache.vectors(int(chunk), self.hook_names):
            # Indexing with brackets would start threads even for a few rows.
            yield vectors if rows is None else vectors.index_select(0, rows)

    @override
    def evaluation_prompts(self, n_prompts: int) -> Int[Tensor, "prompt pos"]:
        """The same prompts each time, which follow those of the cache in the text."""
        prompts = self.cache.evaluation_tokens()[:n_prompts]
        if len(prompts) < n_prompts:
            logger.warning(
                "The cache has %d of %d evaluation prompts.", len(prompts), n_prompts
            )
        return prompts
