"""SAELens' stream of contexts, which knows its place and can go on from there."""

import logging
from collections.abc import Generator
from typing import Any

import torch
from jaxtyping import Int
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor
from typing_extensions import override

from sae_lens_multilayer.text.rows import read_rows

logger = logging.getLogger(__name__)

Tokens = Int[Tensor, " _"]


class ResumableTokens(ActivationsStore):
    """The host's reading of a dataset, with a place to which one can go.

    The place is a row and, where documents are joined to contexts, what no context
    holds yet of the document under way.
    """

    _n_rows_this_epoch: int
    _unread: list[Tokens]
    """Of the documents read, what no context holds yet: of one, the last, or none."""
    _n_bad_rows: int = 0

    @override
    def _iterate_tokenized_sequences(self) -> Generator[Tokens, None, None]:
        # Not itself a generator, so that an epoch begins when the host asks for one.
        self._n_rows_this_epoch, self._unread = 0, []
        return self._contexts()

    def go_to(self, n_rows_this_epoch: int, unread: Tokens) -> None:
        """Go on with `unread` and the rows from number `n_rows_this_epoch` on."""
        self._n_rows_this_epoch, self._unread = n_rows_this_epoch, [unread]
        self.iterable_sequences = self._contexts()

    @property
    def unread(self) -> Tokens:
        """What no context holds yet of the document under way."""
        assert len(self._unread) <= 1  # a document is read when the last one is used up
        return self._unread[0] if self._unread else torch.empty(0, dtype=torch.long)

    def _contexts(self) -> Generator[Tokens, None, None]:
        for context in super()._iterate_tokenized_sequences():
            if self.disable_concat_sequences:
                self._unread = []
            self._unread = unread_after(context, self._unread)
            yield context

    @override
    def _iterate_raw_dataset_tokens(self) -> Generator[Tokens, None, None]:
        # An empty one would look like a document of no tokens, which is harmless.
        yield from list(self._unread)
        for tokens in super()._iterate_raw_dataset_tokens():
            self._unread.append(tokens)
            yield tokens

    @override
    def _iterate_raw_dataset(self) -> Generator[Any, None, None]:
        assert self.dataset is not None
        for row in read_rows(self.dataset, self._n_rows_this_epoch):
            self.n_dataset_processed += 1
            self._n_rows_this_epoch += 1
            value: Any = row.get(self.tokens_column)
            if self._is_usable(value):
                yield value

    def _is_usable(self, value: Any) -> bool:
        if self.is_dataset_tokenized:
            usable = value is not None
        else:
            usable = isinstance(value, (str, list) if self.use_chat_formatting else str)
        if not usable:
            self._n_bad_rows += 1
            # The 1st, 2nd, 4th, 8th, ...: a message that all of them can be told by.
            if self._n_bad_rows & (self._n_bad_rows - 1) == 0:
                logger.warning(
                    "Row %d of the dataset is left out: its %r is %.50r (%d such rows "
                    "so far).",
                    self._n_rows_this_epoch - 1,
                    self.tokens_column,
                    value,
                    self._n_bad_rows,
                )
        return usable


def unread_after(context: Tokens, documents: list[Tokens]) -> list[Tokens]:
    """What documents hold beyond a context that was joined from their beginnings.

    SAELens puts a token between documents, or before a context, only where the next
    token is another; so a token of the context that is not the document's next one was
    put there.
    """
    rest, place = list(documents), 0
    while rest and place < len(context):
        first = rest[0]
        if len(first) == 0:
            rest.pop(0)
        elif context[place] != first[0]:
            place += 1
        else:
            n = min(len(first), len(context) - place)
            assert torch.equal(context[place : place + n], first[:n])
            rest[0] = first[n:]
            place += n
    return [document for document in rest if len(document)]
