"""Nulls: what an analysis finds without the structure that it measures."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor, nn

from sae_lens_multilayer.analysis.batch import TokenBatch

Null: TypeAlias = Literal["random_weights", "shuffled_layers", "matched_frequency"]
"""See `RandomWeights`, `LayerShuffle` and `LatentExchange`."""

NULL_TITLES = {
    "": "",
    "random_weights": ", random weights",
    "shuffled_layers": ", layers shuffled within tokens",
    "matched_frequency": ", latents exchanged for others of about their frequency",
}
"""Ends of the titles of pictures."""

BatchChange: TypeAlias = Callable[[TokenBatch], TokenBatch]

_GROUP_SIZE = 16
"""Latents of about equal frequency that are exchanged with each other."""


class RandomWeights:
    """Random parameters for a model, which keeps everything else.

    Each parameter tensor is drawn from a normal distribution with its own mean and
    standard deviation. An SAE that was trained on the trained model is analysed on
    vectors without anything learnt; to train one on such a model, train it `applied()`.

    References:
        Heap et al. (2025), arXiv:2501.17727, "re-randomized" models.
    """

    def __init__(self, module: nn.Module, seed: int = 0) -> None:
        """Draw the parameters, which takes as much memory as the model's."""
        self._generators: dict[torch.device, torch.Generator] = {}
        self._pairs = [
            (parameter, self._draw(parameter.data, seed))
            for parameter in module.parameters()
            if parameter.is_floating_point() and parameter.numel() > 1
        ]

    def _draw(self, like: Tensor, seed: int) -> Tensor:
        if like.device not in self._generators:
            generator = torch.Generator(like.device).manual_seed(seed)
            self._generators[like.device] = generator
        mean, std = like.float().mean().item(), like.float().std().item()
        generator = self._generators[like.device]
        return torch.empty_like(like).normal_(mean, std, generator=generator)

    @contextmanager
    def applied(self) -> Generator[None]:
        """The model has the random parameters within this context."""
        own = [parameter.data for parameter, _ in self._pairs]
        try:
            for parameter, drawn in self._pairs:
                parameter.data = drawn
            yield
        finally:
            for (parameter, _), data in zip(self._pairs, own, strict=True):
                parameter.data = data


class LayerShuffle:
    """Permutes the layers of each token: one permutation for all of its latents.

    The number of layers of a latent at a token, and of latents at a layer, stay.
    Activations are those at the vectors' own layers, before the permutation.
    """

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, batch: TokenBatch) -> TokenBatch:
        n_tokens, n_layers = batch.x.shape[:2]
        keys = torch.rand(
            n_tokens, n_layers, dtype=torch.float64, generator=self._generator
        )
        old_layer = keys.argsort(1)
        changed = replace(batch, x=_take(batch.x, old_layer))
        if batch.encoder is not None:
            active = batch.active
            new_layer = old_layer.argsort(1).to(active.layer.device)
            layer = new_layer[active.token, active.layer]
            changed.active = replace(active, layer=layer)
        return changed


def _take(x: Tensor, layer: Int[Tensor, "token layer"]) -> Tensor:
    token = torch.arange(len(x), device=x.device).unsqueeze(1)
    return x[token, layer.to(x.device)]


class LatentExchange:
    """Exchanges the latents of each token with latents of about the same frequency.

    Latents are ordered by the number of tokens at which they are active, in groups of
    `_GROUP_SIZE`. At each token the latents of a group are shifted within it by one
    random number. Layers and activations at a token stay, so a latent's results are
    those of any latent of its frequency. Vectors do not change.
    """

    def __init__(self, n_tokens: Int[Tensor, " d_sae"], seed: int = 0) -> None:
        """Order the latents by the number of tokens at which they are active."""
        self._generator = torch.Generator().manual_seed(seed)
        order = n_tokens.argsort(descending=True, stable=True)
        self._order, self._rank = order, order.argsort()
        n_active = int((n_tokens > 0).sum())
        starts = torch.arange(0, max(1, n_active), _GROUP_SIZE)
        ends = (starts + _GROUP_SIZE).clamp(max=n_active)
        self._sizes = (ends - starts).clamp(min=1).to(order.device)

    def __call__(self, batch: TokenBatch) -> TokenBatch:
        if batch.encoder is None:
            return batch
        active = batch.active
        shape = active.n_tokens, len(self._sizes)
        drawn = torch.rand(shape, dtype=torch.float64, generator=self._generator)
        rank = self._rank[active.latent]
        group = rank // _GROUP_SIZE
        size = self._sizes[group]
        shift = (drawn.to(rank.device)[active.token, group] * size).long()
        start = group * _GROUP_SIZE
        latent = self._order[start + (rank - start + shift) % size]
        changed = replace(batch)
        changed.active = replace(active, latent=latent)
        return changed
