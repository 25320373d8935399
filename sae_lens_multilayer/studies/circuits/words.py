"""Words of the tasks' templates, and which of them a tokenizer has as one token."""

from collections.abc import Sequence
from typing import Any, NamedTuple

NOUNS = (
    *(("boy", "boys"), ("girl", "girls"), ("dog", "dogs"), ("cat", "cats")),
    *(("king", "kings"), ("author", "authors"), ("teacher", "teachers")),
    *(("student", "students"), ("doctor", "doctors"), ("farmer", "farmers")),
    *(("car", "cars"), ("book", "books"), ("house", "houses"), ("tree", "trees")),
    *(("bird", "birds"), ("artist", "artists"), ("worker", "workers")),
    *(("parent", "parents"), ("friend", "friends"), ("player", "players")),
)
VERBS = (("is", "are"), ("was", "were"), ("has", "have"))
PREPOSITIONS = ("near", "behind", "beside", "with", "by")
OF_EVENTS = ("war", "siege", "strike", "project", "study", "work", "trial", "series")
"""Nouns of what lasts from one year to another."""
LEAST_NUMBERS = 30
"""Numbers from 00 to 99 that need a token of their own after the century."""


class Part(NamedTuple):
    """A piece of a prompt."""

    position: str
    """The class of its positions."""
    text: str


class Vocabulary:
    """The tokens that a tokenizer gives to words after some text."""

    def __init__(self, tokenizer: Any, task: str) -> None:
        """`task` is for error messages."""
        self._tokenizer, self._task = tokenizer, task

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _after(self, prefix: str, text: str) -> list[int] | None:
        """The tokens of a text after a prefix; None if the tokens of both merge."""
        before, whole = self._ids(prefix), self._ids(prefix + text)
        own = whole[len(before) :]
        unknown = getattr(self._tokenizer, "unk_token_id", None)
        is_bad = whole[: len(before)] != before or not own or unknown in own
        return None if is_bad else own

    def id_after(self, prefix: str, word: str) -> int:
        """The token of one of the words that `pairs` or `singles` found."""
        own = self._after(prefix, f" {word}")
        assert own is not None
        return own[0]

    def singles(
        self, prefix: str, words: Sequence[str], what: str, least: int
    ) -> list[str]:
        """The words that are one token; ValueError if there are fewer than `least`."""
        found = [word for word in words if self._is_single(prefix, word)]
        return self._enough(found, words, what, least)

    def pairs(
        self, prefix: str, words: Sequence[tuple[str, str]], what: str, least: int
    ) -> list[tuple[str, str]]:
        """The pairs of which both words are one token; ValueError if too few."""
        found = [
            pair for pair in words if all(self._is_single(prefix, one) for one in pair)
        ]
        return self._enough(found, words, what, least)

    def _is_single(self, prefix: str, word: str) -> bool:
        own = self._after(prefix, f" {word}")
        return own is not None and len(own) == 1

    def _enough(
        self, found: list[Any], words: Sequence[Any], what: str, least: int
    ) -> list[Any]:
        if len(found) < least:
            raise ValueError(
                f"The task {self._task!r} needs a tokenizer with single tokens for at "
                f"least {least} of these {what}: {list(words)}; it has {found}."
            )
        return found

    def ordinary_ids(self, least: int) -> list[int]:
        """Ids of tokens that the tokenizer does not flag as special, ascending."""
        added = self._tokenizer.added_tokens_decoder.items()
        special = {*self._tokenizer.all_special_ids}
        special |= {i for i, token in added if token.special}
        found = sorted({*self._tokenizer.get_vocab().values()} - special)
        if len(found) < least:
            raise ValueError(
                f"The task {self._task!r} needs at least {least} tokens that are not "
                f"special; the tokenizer has {len(found)}."
            )
        return found

    def numbers_after(self, prefix: str) -> dict[int, int]:
        """Tokens after a number that are one more number: 00 to 99, or else 0 to 9.

        A number of two digits is left out if the tokenizer does not split it off, as it
        has the whole year or splits it otherwise; all numbers of one digit are needed.

        Raises:
            ValueError: If fewer than `LEAST_NUMBERS` numbers of two digits and not all
                digits are single, distinct tokens.
        """
        counts: list[int] = []
        for n_digits, least in ((2, LEAST_NUMBERS), (1, 10)):
            found: dict[int, int] = {}
            for i in range(10**n_digits):
                own = self._after(prefix, f"{i:0{n_digits}d}")
                if own is not None and len(own) == 1:
                    found[i] = own[0]
            counts.append(len(found))
            if len(found) >= least and len({*found.values()}) == len(found):
                return found
        raise ValueError(
            f"The task {self._task!r} needs a tokenizer that splits years, such as "
            f"1745, into 17 and 45 or into digits; after {prefix!r} it has single "
            f"tokens for {counts[0]} of 00 to 99 (needed are {LEAST_NUMBERS}), and for "
            f"{counts[1]} of 0 to 9 (needed are all)."
        )

    def encode(self, parts: Sequence[Part]) -> tuple[list[int], list[str]]:
        """The tokens of a prompt, and the class of each."""
        text, ids, classes = "", list[int](), list[str]()
        for part in parts:
            own = self._after(text, part.text)
            if own is None:
                raise ValueError(
                    f"The task {self._task!r} needs a tokenizer with tokens of their "
                    f"own for {part.text!r} after {text!r}; it lacks them."
                )
            text += part.text
            ids += own
            classes += [part.position] * len(own)
        return ids, classes
