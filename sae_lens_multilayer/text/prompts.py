"""Prompts to measure on, and which of their positions count."""

import operator
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Int
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor

from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.record import hash_of_tensors


@dataclass(frozen=True, eq=False)
class Prompts:
    """Token ids, and which positions count."""

    ids: Int[Tensor, "prompt pos"]
    counted: Bool[Tensor, "prompt pos"]
    """Positions that do not count keep their own vectors when a layer is replaced, and
    are left out of all averages."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, chosen: slice) -> "Prompts":
        return Prompts(self.ids[chosen], self.counted[chosen])

    def to(self, device: torch.device | str) -> "Prompts":
        """The same prompts on another device."""
        return Prompts(self.ids.to(device), self.counted.to(device))

    def split(self, batch_size: int) -> list["Prompts"]:
        """Batches of prompts; the last one may have fewer."""
        starts = range(0, len(self), batch_size)
        return [self[start : start + batch_size] for start in starts]

    @property
    def fingerprint(self) -> str:
        """Hash of the token ids and of which positions count."""
        return hash_of_tensors({"ids": self.ids, "counted": self.counted})


Tokens: TypeAlias = Int[Tensor, "prompt pos"] | Prompts | ActivationsStore
"""Prompts to measure on, or a store to take them from."""


def counted_positions(
    ids: Int[Tensor, "prompt pos"],
    exclude_tokens: Sequence[int] | Tensor = (),
    exclude_positions: Sequence[int] = (),
    seqpos_slice: Sequence[int | None] = (None,),
) -> Bool[Tensor, "prompt pos"]:
    """Positions inside `seqpos_slice` that are not excluded by token id or position."""
    excluded = torch.as_tensor(exclude_tokens, dtype=ids.dtype, device=ids.device)
    counted = ~torch.isin(ids, excluded)
    inside = torch.zeros(ids.shape[1], dtype=torch.bool, device=ids.device)
    inside[slice(*seqpos_slice)] = True
    inside[list(exclude_positions)] = False
    return counted & inside


def mark_counted(
    source: Tokens,
    ids: Int[Tensor, "prompt pos"],
    exclude_tokens: Sequence[int] | None = None,
    exclude_positions: Sequence[int] = (),
) -> Prompts:
    """Prompts with the positions that count.

    Args:
        source: Where `ids` are from. A store's `seqpos_slice` and the counted positions
            of `Prompts` (then `ids` are theirs) apply beside what is excluded here.
        ids: The token ids.
        exclude_tokens: Token ids that do not count; None: those that a store excludes.
        exclude_positions: Positions that do not count; negative ones count from the
            end.

    Raises:
        ValueError: If a position is not in the prompts.
    """
    check_positions("exclude_positions", exclude_positions, ids)
    seqpos_slice: Sequence[int | None] = (None,)
    excluded: Sequence[int] | Tensor | None = exclude_tokens
    if isinstance(source, ActivationsStore):
        seqpos_slice = source.seqpos_slice
        excluded = source.exclude_special_tokens if excluded is None else excluded
    excluded = () if excluded is None else excluded
    counted = counted_positions(ids, excluded, exclude_positions, seqpos_slice)
    if isinstance(source, Prompts):
        counted &= source.counted
    return Prompts(ids, counted)


def take_prompts(
    model: Any,
    model_name: str,
    tokens: object,
    n_prompts: int | None,
    batch_size_prompts: int,
    exclude_tokens: Sequence[int] | None = None,
    exclude_positions: Sequence[int] = (),
) -> Prompts:
    """The prompts to measure on, checked.

    Args:
        model: The model that will run them.
        model_name: For messages.
        tokens: See `Tokens`.
        n_prompts: Prompts to take from a store; None: one model batch of it.
        batch_size_prompts: Checked only.
        exclude_tokens, exclude_positions: See `mark_counted`.

    Raises:
        ValueError: If the model cannot run the prompts, or they are too few.
    """
    _check_numbers(tokens, n_prompts, batch_size_prompts)
    source: Any = tokens
    if isinstance(tokens, ActivationsStore):
        tokens = _take_from_store(tokens, n_prompts)
    elif isinstance(tokens, Prompts):
        tokens = tokens.ids
    ids = check_prompts(model, model_name, tokens)
    return mark_counted(source, ids, exclude_tokens, exclude_positions)


class PromptBatches:
    """Prompts in batches; those of a store are read batch by batch."""

    def __init__(
        self,
        model: Any,
        model_name: str,
        tokens: object,
        n_prompts: int | None = None,
        batch_size_prompts: int = 8,
        exclude_tokens: Sequence[int] | None = None,
        exclude_positions: Sequence[int] = (),
        repeatable: bool = False,
    ) -> None:
        """Check the prompts, or the numbers of those that a store will give.

        Args:
            model: The model that will run them.
            model_name: For messages.
            tokens: See `Tokens`.
            n_prompts: Prompts to take from a store; None: one model batch of it. If its
                dataset ends before, there are fewer, with a warning.
            batch_size_prompts: Prompts in a batch; the last one may have fewer.
            exclude_tokens, exclude_positions: See `mark_counted`.
            repeatable: Keep the token ids of a store in memory, so that a second
                iteration gives the same prompts.

        Raises:
            ValueError: If the model cannot run the prompts.
        """
        _check_numbers(tokens, n_prompts, batch_size_prompts)
        self._model, self._model_name = model, model_name
        self._batch_size = batch_size_prompts
        self._exclude = exclude_tokens, exclude_positions
        self._kept: list[Prompts] | None = [] if repeatable else None
        self._is_read = False
        if isinstance(tokens, ActivationsStore):
            self._source: Prompts | ActivationsStore = tokens
            self._n_prompts = n_prompts or tokens.store_batch_size_prompts
        else:
            self._source = take_prompts(
                model, model_name, tokens, None, batch_size_prompts, *self._exclude
            )
            self._n_prompts = len(self._source)

    def __len__(self) -> int:
        """Batches, unless a store's dataset ends before."""
        return -(-self._n_prompts // self._batch_size)

    def __iter__(self) -> Iterator[Prompts]:
        if isinstance(self._source, Prompts):
            yield from self._source.split(self._batch_size)
        elif self._is_read and self._kept is not None:
            yield from self._kept
        else:
            yield from self._read(self._source)

    def _read(self, store: ActivationsStore) -> Iterator[Prompts]:
        self._is_read = True
        n_read, ended = 0, False
        while n_read < self._n_prompts and not ended:
            n_wanted = min(self._batch_size, self._n_prompts - n_read)
            ids, ended = next_rows(store, n_wanted)
            if ids is None:
                break
            ids = check_prompts(self._model, self._model_name, ids).cpu()
            batch = mark_counted(store, ids, *self._exclude)
            n_read += len(batch)
            if self._kept is not None:
                self._kept.append(batch)
            yield batch
        if n_read < self._n_prompts:
            warnings.warn(
                f"The store's dataset ended after {n_read} of the {self._n_prompts} "
                "prompts wanted; the result is of those.",
                stacklevel=2,
            )


def next_rows(
    store: ActivationsStore, n_rows: int
) -> tuple[Int[Tensor, "prompt pos"] | None, bool]:
    """Up to `n_rows` prompts of a store's dataset, and whether it has ended."""
    rows: list[Tensor] = []
    try:
        while len(rows) < n_rows:
            # The end of an epoch would lose a larger batch, and its size too.
            rows.append(store.get_batch_tokens(1, raise_at_epoch_end=True))
    except StopIteration:
        return (torch.cat(rows) if rows else None), True
    return torch.cat(rows), False


def check_integers(name: str, values: Any) -> None:
    """Raise ValueError unless the setting `name` is a list or the like of integers."""
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
    name: str, positions: Sequence[int], prompts: Int[Tensor, "prompt pos"]
) -> None:
    """Raise ValueError if the setting `name` has a position outside the prompts."""
    n_pos = prompts.shape[1]
    outside = [position for position in positions if not -n_pos <= position < n_pos]
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
            "`n_prompts` is the number of prompts to take from a store; the tokens "
            "themselves were given."
        )


def check_prompts(
    model: Any, model_name: str, tokens: object
) -> Int[Tensor, "prompt pos"]:
    """The prompts as int64.

    Raises:
        ValueError: If they are not integers of shape [prompt, pos], a token id is not
            in the vocabulary, or they are longer than the context.
    """
    is_integer = isinstance(tokens, Tensor) and not (
        tokens.dtype == torch.bool or tokens.is_floating_point() or tokens.is_complex()
    )
    if not isinstance(tokens, Tensor) or not is_integer or tokens.ndim != 2:
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
    prompts = tokens.long()
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
