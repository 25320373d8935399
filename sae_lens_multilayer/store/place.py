"""Where an activations store stands in its data: all that rebuilds it, in few bytes."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

_COUNTERS = (
    "source",
    "n_dataset_processed",
    "n_rows_this_epoch",
    "n_tokens_this_epoch",
    "epoch_has_ended",
    "n_model_batches",
    "n_harvested",
    "n_served",
)


@dataclass(frozen=True)
class Harvest:
    """The prompts of one forward pass, or the number of one block of a cache; some of
    its tokens wait in the buffer."""

    first_token: int
    """The buffer's number of its first token."""
    prompts: Int[Tensor, "prompt pos"]


@dataclass(frozen=True)
class Place:
    """Where a store stands between two batches.

    It holds no activations: the vectors of the tokens that wait in the buffer are those
    that the same forward passes give again.
    """

    source: int
    """Which cache the tokens come from, whose blocks are then the rows of the dataset;
    0: the model."""
    n_dataset_processed: int
    """Rows read, over all epochs."""
    n_rows_this_epoch: int
    """Rows read since the dataset was last begun."""
    n_tokens_this_epoch: int
    epoch_has_ended: bool
    """Whether the buffer holds the last tokens of an epoch."""
    n_model_batches: int
    n_harvested: int
    """Tokens that came into the buffer."""
    n_served: int
    """Tokens that went out of it."""
    random_state: Tensor
    """Of the generator that shuffles."""
    unread: Int[Tensor, " pos"]
    """What no context holds yet of the document under way."""
    waiting: Int[Tensor, " token"]
    """Numbers of the tokens in the buffer, in reverse order of serving."""
    harvests: tuple[Harvest, ...]
    """The forward passes that gave them."""

    def to_tensors(self) -> dict[str, Tensor]:
        """As tensors that go into a file."""
        prompts = [harvest.prompts for harvest in self.harvests]
        firsts = [harvest.first_token for harvest in self.harvests]
        return {name: torch.tensor(int(getattr(self, name))) for name in _COUNTERS} | {
            "random_state": self.random_state,
            "unread": self.unread.cpu().contiguous(),
            "waiting": self.waiting.contiguous(),
            "harvest_first_tokens": torch.tensor(firsts, dtype=torch.long),
            "harvest_n_prompts": torch.tensor([len(p) for p in prompts]).long(),
            "harvest_prompts": torch.cat(prompts or [torch.empty(0, 0)]).int(),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "Place":
        """The place that `to_tensors` wrote.

        Raises:
            KeyError: If one of them is missing.
        """
        counters: dict[str, Any] = {name: int(tensors[name]) for name in _COUNTERS}
        counters["epoch_has_ended"] = bool(counters["epoch_has_ended"])
        n_prompts: list[int] = tensors["harvest_n_prompts"].tolist()
        harvests = zip(
            tensors["harvest_first_tokens"].tolist(),
            tensors["harvest_prompts"].long().split(n_prompts),
            strict=True,
        )
        return cls(
            **counters,
            random_state=tensors["random_state"],
            unread=tensors["unread"],
            waiting=tensors["waiting"],
            harvests=tuple(Harvest(*harvest) for harvest in harvests),
        )


def still_waiting(
    harvests: list[Harvest], waiting: Int[Tensor, " token"]
) -> list[Harvest]:
    """The harvests, in order, of which at least one token waits."""
    if not harvests:
        return []
    firsts = torch.tensor([harvest.first_token for harvest in harvests])
    of_token = torch.searchsorted(firsts, waiting, right=True) - 1
    counts = torch.bincount(of_token, minlength=len(harvests)).tolist()
    return [h for h, count in zip(harvests, counts, strict=True) if count]
