"""The state of an activations store, which resumes exactly from it; no vectors."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

_COUNTERS = ("fingerprint", "n_tokens_this_epoch", "n_added", "n_served")
_OF_SOURCE = "source."
"""Prefix of the names of the source's tensors."""


@dataclass(frozen=True)
class BufferedChunk:
    """A chunk of which tokens are in the buffer."""

    first_token: int
    """The number of its first token in the buffer."""
    chunk: Int[Tensor, "row column"]
    """What identifies it to the source."""


@dataclass(frozen=True)
class StoreState:
    """State of a store between two batches.

    The vectors in the buffer are not part of it: the source gives those of the same
    chunks again.
    """

    fingerprint: int
    """The source's."""
    source: dict[str, Tensor]
    """State of the source."""
    n_tokens_this_epoch: int
    """Tokens read in this epoch."""
    n_added: int
    """Tokens added to the buffer."""
    n_served: int
    """Tokens taken from the buffer."""
    random_state: Tensor
    """State of the generator that shuffles."""
    buffered: Int[Tensor, " token"]
    """Numbers of the tokens in the buffer, in reverse order of serving."""
    chunks: tuple[BufferedChunk, ...]
    """The chunks that these tokens are from."""

    def to_tensors(self) -> dict[str, Tensor]:
        """The state as tensors for a file."""
        chunks = [buffered.chunk for buffered in self.chunks]
        firsts = [buffered.first_token for buffered in self.chunks]
        return (
            {name: torch.tensor(getattr(self, name)) for name in _COUNTERS}
            | {_OF_SOURCE + name: value for name, value in self.source.items()}
            | {
                "random_state": self.random_state,
                "buffered": self.buffered.contiguous(),
                "chunk_first_tokens": torch.tensor(firsts, dtype=torch.long),
                "chunk_lengths": torch.tensor([len(c) for c in chunks]).long(),
                "chunks": torch.cat(chunks or [torch.empty(0, 0)]).int(),
            }
        )

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "StoreState":
        """The state of which `to_tensors` made these tensors."""
        chunks = zip(
            tensors["chunk_first_tokens"].tolist(),
            tensors["chunks"].long().split(tensors["chunk_lengths"].tolist()),
            strict=True,
        )
        return cls(
            **{name: int(tensors[name]) for name in _COUNTERS},
            source={
                name.removeprefix(_OF_SOURCE): value
                for name, value in tensors.items()
                if name.startswith(_OF_SOURCE)
            },
            random_state=tensors["random_state"],
            buffered=tensors["buffered"],
            chunks=tuple(BufferedChunk(*chunk) for chunk in chunks),
        )


def still_buffered(
    chunks: list[BufferedChunk], buffered: Int[Tensor, " token"]
) -> list[BufferedChunk]:
    """The chunks, in order, of which at least one token is in the buffer."""
    if not chunks:
        return []
    firsts = torch.tensor([chunk.first_token for chunk in chunks])
    chunk_of_token = torch.searchsorted(firsts, buffered, right=True) - 1
    counts = torch.bincount(chunk_of_token, minlength=len(chunks)).tolist()
    return [chunk for chunk, n in zip(chunks, counts, strict=True) if n]
