"""SAELens' stream of contexts, resumable at any context."""

import logging
from collections.abc import Generator
from typing import Any

import torch
from jaxtyping import Int
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor
from typing_extensions import override

from sae_lens_multilayer.text.dataset import read_rows

logger = logging.getLogger(__name__)

Tokens = Int[Tensor, " _"]


class ResumableTokens(ActivationsStore):
    """SAELens' reading of a dataset, resumable.

    Its state is the number of rows read and, if documents are joined to contexts, the
    tokens of the last document that are not in a context yet.
    """

    n_rows_this_epoch: int
    _remaining: list[Tokens]
    """Tokens of the documents read that are in no context yet; between contexts at most
    one document has any."""
    _n_bad_rows: int = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take SAELens' arguments; ValueError if the tokenizer cannot read text."""
        super().__init__(*args, **kwargs)
        if not self.is_dataset_tokenized:
            _check_has_words(self.model.tokenizer)

    @override
    def _iterate_tokenized_sequences(self) -> Generator[Tokens, None, None]:
        # Not itself a generator, so that an epoch starts when SAELens calls this.
        self.n_rows_this_epoch, self._remaining = 0, []
        return self._contexts()

    def resume(self, n_rows_this_epoch: int, remaining_tokens: Tokens) -> None:
        """Continue with the remaining tokens, then row `n_rows_this_epoch`."""
        self.n_rows_this_epoch = n_rows_this_epoch
        self._remaining = [remaining_tokens]
        self.iterable_sequences = self._contexts()

    @property
    def remaining_tokens(self) -> Tokens:
        """Tokens of the last document that are in no context yet, on the CPU."""
        rest = self._remaining
        assert len(rest) <= 1  # a document is read once the last one is used up
        return rest[0].cpu().contiguous() if rest else torch.empty(0, dtype=torch.long)

    def _contexts(self) -> Generator[Tokens, None, None]:
        for context in super()._iterate_tokenized_sequences():
            if self.disable_concat_sequences:
                self._remaining = []
            self._remaining = remaining_after(context, self._remaining)
            yield context

    @override
    def _iterate_raw_dataset_tokens(self) -> Generator[Tokens, None, None]:
        yield from list(self._remaining)
        for tokens in super()._iterate_raw_dataset_tokens():
            self._remaining.append(tokens)
            yield tokens

    @override
    def _iterate_raw_dataset(self) -> Generator[Any, None, None]:
        assert self.dataset is not None
        for row in read_rows(self.dataset, self.n_rows_this_epoch):
            self.n_dataset_processed += 1
            self.n_rows_this_epoch += 1
            value: Any = row.get(self.tokens_column)
            if self.use_chat_formatting and isinstance(value, list):
                self._check_turns(value)  # pyright: ignore[reportUnknownArgumentType]
            if self._is_usable(value):
                yield value

    def _check_turns(self, conversation: list[Any]) -> None:
        for turn in conversation:
            if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
                raise ValueError(
                    f"Turns in {self.tokens_column!r} must have role and content; row "
                    f"{self.n_rows_this_epoch - 1} has {turn!r:.100}."
                )

    def _is_usable(self, value: Any) -> bool:
        if self.is_dataset_tokenized:
            usable = value is not None
        elif self.use_chat_formatting:
            # A chat template fails on an empty conversation.
            usable = isinstance(value, str) or (isinstance(value, list) and value != [])
        else:
            usable = isinstance(value, str)
        if not usable:
            self._n_bad_rows += 1
            # Log the 1st, 2nd, 4th, 8th, ... of them.
            if self._n_bad_rows & (self._n_bad_rows - 1) == 0:
                message = "Row %d of the dataset is skipped (%d so far): %r is %.50r."
                row, column = self.n_rows_this_epoch - 1, self.tokens_column
                logger.warning(message, row, self._n_bad_rows, column, value)
        return usable


def _check_has_words(tokenizer: Any) -> None:
    special = getattr(tokenizer, "all_special_ids", None)
    if special is not None and len(tokenizer) <= len(set(special)):
        raise ValueError(
            "The tokenizer must have tokens for the text; it has special ones only, "
            f"{tokenizer.all_special_tokens}, as for a folder of a model without a "
            "tokenizer. Save it there: `tokenizer.save_pretrained(folder)`."
        )


def remaining_after(context: Tokens, documents: list[Tokens]) -> list[Tokens]:
    """Tokens of documents beyond a context that was joined from their beginnings.

    SAELens inserts a token between documents, or before a context, only if the next
    token is another one; so a token of the context that is not the document's next one
    was inserted.
    """
    rest, index = list(documents), 0
    while rest and index < len(context):
        first = rest[0]
        if len(first) == 0:
            rest.pop(0)
        elif context[index] != first[0]:
            index += 1
        else:
            n = min(len(first), len(context) - index)
            assert torch.equal(context[index : index + n], first[:n])
            rest[0] = first[n:]
            index += n
    return [document for document in rest if len(document)]
