"""Vectors less their linear prediction from the layer before, as a source."""

from collections.abc import Generator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from sae_lens_multilayer.lens.closed_form import least_squares
from sae_lens_multilayer.store.source import Chunk, Source


@dataclass(frozen=True)
class Prediction:
    """`x A + b`: the least-squares prediction of a layer from the one before."""

    weight: Float[Tensor, "d_in d_in"]
    bias: Float[Tensor, " d_in"]

    @classmethod
    def fit(
        cls, before: Float[Tensor, "token d_in"], after: Float[Tensor, "token d_in"]
    ) -> "Prediction":
        """Fit the vectors of a layer by those of the layer before."""
        x, y = before.double(), after.double()
        centred = x - x.mean(0)
        weight = least_squares(centred.T @ centred, centred.T @ y)
        return cls(weight.float(), (y.mean(0) - x.mean(0) @ weight).float())

    def __call__(self, before: Float[Tensor, "*batch d_in"]) -> Tensor:
        """Predict the vectors of a layer."""
        return before @ self.weight.to(before) + self.bias.to(before)


def fit_predictions(x: Float[Tensor, "token layer d_in"]) -> list[Prediction]:
    """The predictions of all layers but the first.

    ValueError if there are so few vectors that they are fitted exactly.
    """
    if len(x) <= x.shape[2]:
        raise ValueError(
            f"Predictions of a layer need more training tokens than `d_in` = "
            f"{x.shape[2]}; got {len(x)}."
        )
    layers = range(1, x.shape[1])
    return [Prediction.fit(x[:, layer - 1], x[:, layer]) for layer in layers]


class ResidualSource(Source):
    """The vectors of a layer less their prediction, from a source of both layers."""

    def __init__(self, source: Source, prediction: Prediction) -> None:
        """Wrap a source of two hooks, the layer before and the layer."""
        self._source, self._prediction = source, prediction
        self.hook_names, self.d_in = source.hook_names[1:], source.d_in
        self.dtype = source.dtype
        self.max_tokens_per_chunk = source.max_tokens_per_chunk
        self.fingerprint = source.fingerprint
        self.excluded_token_ids = source.excluded_token_ids

    @override
    def next_chunk(self) -> Chunk | None:
        chunk = self._source.next_chunk()
        self.n_chunks = self._source.n_chunks
        self.epoch_ended = self._source.epoch_ended
        return chunk

    @override
    def n_tokens(self, chunk: Chunk) -> int:
        return self._source.n_tokens(chunk)

    @override
    def vectors(
        self, chunk: Chunk, rows: Int[Tensor, " token"] | None = None
    ) -> Generator[Float[Tensor, "token d_in"]]:
        vectors = self._source.vectors(chunk, rows)
        before = next(vectors).clone()  # a cache reuses its memory
        yield next(vectors) - self._prediction(before)

    @override
    def state(self) -> dict[str, Tensor]:
        return self._source.state()

    @override
    def resume(self, state: dict[str, Tensor]) -> None:
        self._source.resume(state)
        self.n_chunks = self._source.n_chunks
        self.epoch_ended = self._source.epoch_ended


def first_vectors(source: Source, n_tokens: int) -> Float[Tensor, "token layer d_in"]:
    """The vectors of the first tokens of a source, or of its first epoch."""
    parts: list[Tensor] = []
    n_left = n_tokens
    while n_left > 0 and not source.epoch_ended:
        chunk = source.next_chunk()
        if chunk is not None:
            vectors = [x[:n_left].float().cpu() for x in source.vectors(chunk)]
            parts.append(torch.stack(vectors, 1))
            n_left -= len(parts[-1])
    return torch.cat(parts)
