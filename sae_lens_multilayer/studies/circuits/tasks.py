"""Tasks: clean prompts, each with a corrupted one, and a metric of the logits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lens_multilayer.record import hash_of_tensors
from sae_lens_multilayer.studies.circuits.words import (
    NOUNS,
    OF_EVENTS,
    PREPOSITIONS,
    VERBS,
    Part,
    Vocabulary,
)


@dataclass(frozen=True, eq=False)
class Task:
    """Prompts of equal length whose positions have the same roles.

    The metric of a prompt is the log odds of correct against wrong next tokens,
    `logsumexp(logits of correct) - logsumexp(logits of wrong)`: with one token each,
    the difference of their logits.
    """

    name: str
    clean: Int[Tensor, "prompt pos"]
    corrupted: Int[Tensor, "prompt pos"]
    """The clean prompts with what decides the answer replaced."""
    positions: Sequence[str]
    """The class of each position."""
    candidates: Int[Tensor, " candidate"]
    """Token ids that are correct or wrong in some prompt."""
    is_correct: Bool[Tensor, "prompt candidate"]
    is_wrong: Bool[Tensor, "prompt candidate"]

    def __post_init__(self) -> None:
        if not len(self.clean):
            raise ValueError(f"The task {self.name!r} needs prompts; it has none.")
        if self.clean.shape != self.corrupted.shape:
            raise ValueError(
                f"Clean and corrupted prompts of {self.name!r} must have the same "
                f"shape; got {tuple(self.clean.shape)} and "
                f"{tuple(self.corrupted.shape)}."
            )
        if len(self.positions) != self.clean.shape[1]:
            raise ValueError(
                f"`positions` of {self.name!r} must name a class for each of "
                f"{self.clean.shape[1]} positions; got {len(self.positions)}."
            )
        if not (self.is_correct.any(1) & self.is_wrong.any(1)).all():
            raise ValueError(
                f"Each prompt of {self.name!r} needs a correct and a wrong token."
            )

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def fingerprint(self) -> str:
        """Hash of the prompts and their answers."""
        names = "clean", "corrupted", "candidates", "is_correct", "is_wrong"
        return hash_of_tensors({name: getattr(self, name) for name in names})

    @property
    def classes(self) -> list[str]:
        """The classes of positions, in the order of their first position."""
        return list(dict.fromkeys(self.positions))

    @property
    def class_of(self) -> Int[Tensor, " pos"]:
        """Index in `classes` of each position."""
        classes = self.classes
        return torch.tensor([classes.index(name) for name in self.positions])

    def metric(
        self, logits: Float[Tensor, "prompt d_vocab"], prompts: slice = slice(None)
    ) -> Float[Tensor, " prompt"]:
        """The metric from the logits at the last position, nats.

        Args:
            prompts: To which prompts of the task the logits belong.
        """
        chosen = logits[:, self.candidates.to(logits.device)]
        odds = [
            chosen.masked_fill(~mask[prompts].to(logits.device), -torch.inf)
            for mask in (self.is_correct, self.is_wrong)
        ]
        return odds[0].logsumexp(1) - odds[1].logsumexp(1)


def agreement(tokenizer: Any, n_prompts: int, seed: int, bos: int | None) -> Task:
    """Number of the verb after "The (subject) near the (attractor)".

    Correct is the form that agrees with the subject, wrong the other form of the same
    verb; in half of the prompts the attractor has the other number. The corrupted
    prompt has the subject's other number.
    """
    words, rng = Vocabulary(tokenizer, "agreement"), np.random.default_rng(seed)
    nouns = words.pairs("The", NOUNS, "nouns", 2)
    verbs = words.pairs("The", VERBS, "verbs", 1)
    prepositions = words.singles("The", PREPOSITIONS, "prepositions", 1)
    prompts: list[tuple[list[Part], list[Part]]] = []
    answers: list[tuple[int, int]] = []
    for i in range(n_prompts):
        subject, attractor = rng.choice(len(nouns), 2, replace=False)
        number, other = i % 2, (i // 2 + i) % 2
        verb = verbs[rng.integers(len(verbs))]
        place = prepositions[rng.integers(len(prepositions))]
        pair = [
            [
                Part("article", "The"),
                Part("subject", f" {nouns[subject][n]}"),
                Part("preposition", f" {place}"),
                Part("second article", " the"),
                Part("attractor", f" {nouns[attractor][other]}"),
            ]
            for n in (number, 1 - number)
        ]
        prompts.append((pair[0], pair[1]))
        ids = words.id_after("The", verb[0]), words.id_after("The", verb[1])
        answers.append((ids[number], ids[1 - number]))
    return _of_pairs("agreement", words, prompts, answers, bos)


def induction(tokenizer: Any, n_prompts: int, seed: int, bos: int | None) -> Task:
    """Random tokens, repeated: the token after the earlier copy of the last one.

    Correct is the token that followed the earlier copy. In the corrupted prompt another
    one, which is the wrong token, is in its place.
    """
    length, match = 7, 3
    words, rng = Vocabulary(tokenizer, "induction"), np.random.default_rng(seed)
    ordinary = words.ordinary_ids(length + 1)
    rows = np.stack(
        [rng.choice(ordinary, length + 1, replace=False) for _ in range(n_prompts)]
    )
    tokens = torch.from_numpy(rows).long()
    first, wrong = tokens[:, :-1], tokens[:, -1]
    clean = torch.cat([first, first[:, : match + 1]], 1)
    corrupted = clean.clone()
    corrupted[:, match + 1] = wrong
    names = ["start", *["before"] * (match - 1), "match", "answer"]
    names += ["after"] * (length - match - 2)
    names += [*["repeat"] * match, "query"]
    answers = list(zip(clean[:, match + 1].tolist(), wrong.tolist(), strict=True))
    return _task("induction", clean, corrupted, names, answers, bos)


def greater_than(tokenizer: Any, n_prompts: int, seed: int, bos: int | None) -> Task:
    """End year after "The war lasted from the year 17yy to the year 17".

    With tokens of two digits, correct are years greater than yy and wrong ones smaller;
    with tokens of one digit, correct are greater decades and wrong ones smaller. The
    corrupted prompt has the year 1701, or decade 0. Years that the tokenizer does not
    split into 17 and yy, as some of GPT-2's, are neither prompts nor answers; if 1701
    is one of them, the first year that is split takes its place.

    References:
        Hanna et al. (2023), arXiv:2305.00586, whose data has only years that GPT-2
        splits so. Theirs has several centuries.
    """
    words, rng = Vocabulary(tokenizer, "greater_than"), np.random.default_rng(seed)
    nouns = words.singles("The", OF_EVENTS, "nouns of events", 1)
    tokens = words.numbers_after("The war lasted from the year 17")
    low, n_digits = (2, 1) if len(tokens) == 10 else (10, 2)
    years = [*tokens]
    early = 1 if n_digits == 2 and 1 in tokens else years[0]
    prompts: list[tuple[list[Part], list[Part]]] = []
    answers: list[tuple[list[int], list[int]]] = []
    for _ in range(n_prompts):
        at = int(rng.integers(low, len(years) - low))
        unit = "" if n_digits == 2 else str(rng.integers(2, 9))
        noun = nouns[rng.integers(len(nouns))]
        pair = [
            _years(noun, f"{year:0{n_digits}d}", unit) for year in (years[at], early)
        ]
        prompts.append((pair[0], pair[1]))
        after, before = years[at + 1 :], years[:at]
        answers.append(([tokens[y] for y in after], [tokens[y] for y in before]))
    return _of_pairs("greater_than", words, prompts, answers, bos)


def _years(noun: str, year: str, unit: str) -> list[Part]:
    parts = [
        Part("article", "The"),
        Part("noun", f" {noun}"),
        Part("context", " lasted from the year"),
        Part("century", " 17"),
        Part("year", year),
        Part("unit", unit),
        Part("between", " to the year"),
        Part("last", " 17"),
    ]
    return [part for part in parts if part.text]


TASKS: dict[str, Callable[[Any, int, int, int | None], Task]] = {
    "agreement": agreement,
    "induction": induction,
    "greater_than": greater_than,
}
"""The tasks by name."""


def make_task(
    name: str, tokenizer: Any, n_prompts: int, seed: int = 0, prepend_bos: bool = False
) -> Task:
    """A task with the tokens of a tokenizer.

    Args:
        name: In `TASKS`.
        prepend_bos: Start prompts with the tokenizer's BOS, of class "bos".

    Raises:
        ValueError: If the tokenizer lacks what the task needs, or `n_prompts` is 0.
    """
    if name not in TASKS:
        raise ValueError(f"`tasks` must be among {[*TASKS]}; got {name!r}.")
    if n_prompts < 1:
        raise ValueError(f"`n_prompts` must be at least 1; got {n_prompts}.")
    if tokenizer is None:
        raise ValueError(f"The task {name!r} needs the model's tokenizer; it has none.")
    bos = tokenizer.bos_token_id if prepend_bos else None
    return TASKS[name](tokenizer, n_prompts, seed, bos)


def _of_pairs(
    name: str,
    words: Vocabulary,
    prompts: Sequence[tuple[list[Part], list[Part]]],
    answers: Sequence[tuple[Any, Any]],
    bos: int | None,
) -> Task:
    encoded = [[words.encode(parts) for parts in pair] for pair in prompts]
    positions = encoded[0][0][1]
    if any(classes != positions for pair in encoded for _, classes in pair):
        raise ValueError(
            f"The prompts of {name!r} must have the same number of tokens; with this "
            "tokenizer they differ."
        )
    ids = torch.tensor([[one[0] for one in pair] for pair in encoded])
    return _task(name, ids[:, 0], ids[:, 1], positions, answers, bos)


def _task(
    name: str,
    clean: Int[Tensor, "prompt pos"],
    corrupted: Int[Tensor, "prompt pos"],
    positions: Sequence[str],
    answers: Sequence[tuple[Any, Any]],
    bos: int | None,
) -> Task:
    """A task from the correct and wrong ids of each prompt."""
    sides = [
        [[one] if isinstance(one, int) else list(one) for one in side]
        for side in zip(*answers, strict=True)
    ]
    candidates = sorted({one for side in sides for ids in side for one in ids})
    masks = [
        torch.tensor([[one in ids for one in candidates] for ids in side])
        for side in sides
    ]
    if bos is not None:
        first = torch.full((len(clean), 1), bos)
        clean, corrupted = (torch.cat([first, ids], 1) for ids in (clean, corrupted))
        positions = ["bos", *positions]
    ids = torch.tensor(candidates)
    return Task(name, clean, corrupted, list(positions), ids, masks[0], masks[1])
