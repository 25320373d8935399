"""The prompts that an SAE or a lens is measured on."""

import operator
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import Int
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor

from sae_lens_multilayer.models.kinds import as_model


def take_prompts(
    model: Any,
    model_name: str,
    tokens: object,
    n_prompts: int | None,
    batch_size_prompts: int,
) -> Int[Tensor, "prompt pos"]:
    """The prompts to measure on, once they and their numbers are known to be good.

    Args:
        model: The model that will run them.
        model_name: For messages.
        tokens: Prompts, or a store to take them from.
        n_prompts: Prompts to take from a store; None: one model batch of it.
        batch_size_prompts: Checked only.

    Raises:
        ValueError: If the prompts are not what the model can run, or too few.
    """
    _check_numbers(tokens, n_prompts, batch_size_prompts)
    if isinstance(tokens, ActivationsStore):
        tokens = _take_from_store(tokens, n_prompts)
    return check_prompts(model, model_name, tokens)


class PromptBatches:
    """Prompts in batches, so that those of a store need not fit into memory.

    Iterating again gives the same prompts, where `repeatable`: those of a store wait in
    a temporary file.
    """

    def __init__(
        self,
        model: Any,
        model_name: str,
        tokens: object,
        n_prompts: int | None = None,
        batch_size_prompts: int = 8,
        repeatable: bool = False,
    ) -> None:
        """Check what can be known before the first prompt of a store is read.

        Args:
            model: The model that will run them.
            model_name: For messages.
            tokens: Prompts, or a store to take them from.
            n_prompts: Prompts to take from a store; None: one model batch of it. Where
                its dataset ends before, there are fewer, with a warning.
            batch_size_prompts: Prompts in a batch; the last one may have fewer.

        Raises:
            ValueError: If the prompts are not what the model can run.
        """
        _check_numbers(tokens, n_prompts, batch_size_prompts)
        self._model, self._model_name = model, model_name
        self._batch_size = batch_size_prompts
        if isinstance(tokens, ActivationsStore):
            self._source: Tensor | ActivationsStore = tokens
            self._n_prompts = n_prompts or tokens.store_batch_size_prompts
        else:
            self._source = check_prompts(model, model_name, tokens)
            self._n_prompts = len(self._source)
        self._repeatable = repeatable
        self._file: IO[bytes] | None = None
        self._n_in_file = 0

    def __len__(self) -> int:
        """Batches, if a store's dataset does not end before."""
        return -(-self._n_prompts // self._batch_size)

    def __iter__(self) -> Iterator[Int[Tensor, "prompt pos"]]:
        if isinstance(self._source, Tensor):
            yield from self._source.split(self._batch_size)
        elif self._file is not None:
            self._file.seek(0)
            for _ in range(self._n_in_file):
                yield torch.from_numpy(np.load(self._file, allow_pickle=False))
        else:
            yield from self._read(self._source)

    def _read(self, store: ActivationsStore) -> Iterator[Int[Tensor, "prompt pos"]]:
        if self._repeatable:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 (kept for later)
        n_read, ended = 0, False
        while n_read < self._n_prompts and not ended:
            n_wanted = min(self._batch_size, self._n_prompts - n_read)
            rows, ended = next_rows(store, n_wanted)
            if rows is None:
                break
            batch = check_prompts(self._model, self._model_name, rows).cpu()
            n_read += len(batch)
            if self._file is not None:
                np.save(self._file, batch.numpy())
                self._n_in_file += 1
            yield batch
        if n_read < self._n_prompts:
            warnings.warn(
                f"The store's dataset ended after {n_read} of the {self._n_prompts} "
                "prompts that were asked for; the result is of those.",
                stacklevel=2,
            )


def next_rows(
    store: ActivationsStore, n_rows: int
) -> tuple[Int[Tensor, "prompt pos"] | None, bool]:
    """Up to `n_rows` prompts of a store's dataset, and whether it has ended."""
    rows: list[Tensor] = []
    try:
        while len(rows) < n_rows:
            # A larger batch that the epoch cuts short would be lost, and its size too.
            rows.append(store.get_batch_tokens(1, raise_at_epoch_end=True))
    except StopIteration:
        return (torch.cat(rows) if rows else None), True
    return torch.cat(rows), False


def check_integers(name: str, values: Any) -> None:
    """Raise ValueError unless these are whole numbers in a list, tuple or the like.

    Args:
        name: The name of the setting, for the message.
    """
    is_list = isinstance(values, Iterable) and not isinstance(values, str)
    if not is_list or not all(map(_is_integer, values)):
        raise ValueError(f"`{name}` must be a list of whole numbers; got {values!r}.")


def _is_integer(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def check_positions(
    name: str, places: Sequence[int], prompts: Int[Tensor, "prompt pos"]
) -> None:
    """Raise ValueError if a place is not a position of these prompts.

    Args:
        name: The name of the setting, for the message.
    """
    n_pos = prompts.shape[1]
    outside = [place for place in places if not -n_pos <= place < n_pos]
    if outside:
        raise ValueError(
            f"`{name}` must be in [-{n_pos}, {n_pos}), as prompts have {n_pos} "
            f"tokens; got {outside}."
        )


def _check_numbers(tokens: object, n_prompts: Any, batch_size_prompts: Any) -> None:
    for name, number in [
        ("n_prompts", n_prompts),
        ("batch_size_prompts", batch_size_prompts),
    ]:
        if number is not None and not (_is_integer(number) and number >= 1):
            raise ValueError(f"`{name}` must be at least 1; got {number!r}.")
    if n_prompts is not None and not isinstance(tokens, ActivationsStore):
        raise ValueError(
            "`n_prompts` says how many prompts to take from a store; the tokens were "
            "given. Leave it out, or give a store."
        )


def check_prompts(
    model: Any, model_name: str, tokens: object
) -> Int[Tensor, "prompt pos"]:
    """The prompts as int64, once they are known to be what the model can run.

    Raises:
        ValueError: If they are no prompts, a token id is not in the vocabulary, or they
            are longer than the context.
    """
    prompts = _check_tokens(tokens)
    as_model(model).check_tokens(prompts)
    return prompts


def _take_from_store(
    store: ActivationsStore, n_prompts: int | None
) -> Int[Tensor, "prompt pos"]:
    n_wanted = store.store_batch_size_prompts if n_prompts is None else n_prompts
    prompts, ended = next_rows(store, n_wanted)
    if prompts is None or ended:
        n_left = 0 if prompts is None else len(prompts)
        raise ValueError(
            f"`n_prompts` must be at most {n_left}, the prompts left in the "
            f"store before its dataset repeats; got {n_wanted}. The store is at the "
            "start of its dataset again."
        )
    return prompts


def _check_tokens(tokens: object) -> Int[Tensor, "prompt pos"]:
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or not _has_integers(tokens):
        found = type(tokens).__name__
        if isinstance(tokens, Tensor):
            found = f"{tokens.dtype} of shape {tuple(tokens.shape)}"
        raise ValueError(
            "`tokens` must be a tensor of token ids, integers of shape [prompt, pos]; "
            f"got {found}."
        )
    if tokens.numel() == 0:
        raise ValueError(
            "`tokens` must hold at least one prompt of at least one token; got shape "
            f"{tuple(tokens.shape)}."
        )
    return tokens.long()


def _has_integers(tokens: Tensor) -> bool:
    return tokens.dtype != torch.bool and not (
        tokens.is_floating_point() or tokens.is_complex()
    )
