"""The activations above 0 of a batch of tokens, and each token's by latent."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from sae_lens_multilayer.sae.multi_layer_sae import MultiLayerSAE, MultiLayerTrainingSAE
from sae_lens_multilayer.sae.views import hook_names_of, views

_DENSE_ELEMENTS = 2**24
"""Activations of a dense encoder held at a time: 64 MiB of float32."""


def sums_device(sae: SAE[Any]) -> torch.device:
    """Where an analysis adds up: with the SAE, where that device has float64."""
    device = torch.device(sae.device)
    return torch.device("cpu") if device.type == "mps" else device


def check_latents(latents: Sequence[int], d_sae: int) -> None:
    """Raise ValueError unless there are latents, all of them the SAE's, each once."""
    unknown = [latent for latent in latents if not 0 <= latent < d_sae]
    if unknown or not len(latents) or len(set(latents)) != len(latents):
        raise ValueError(
            f"`latents` must be in [0, d_sae = {d_sae}), each once and at least one; "
            f"got {list(latents)}."
        )


@dataclass
class TokenLatents:
    """Each latent of each token at which it is active, over the token's layers."""

    token: Int[Tensor, " pair"]
    latent: Int[Tensor, " pair"]
    total: Float[Tensor, " pair"]
    """Sum of the activations over layers."""
    mean_layer: Float[Tensor, " pair"]
    """`E[L | j, t]`, from layer 0, the first on the layer axis."""
    spread: Float[Tensor, " pair"]
    """`total * Var(L | j, t)`."""
    pair: Int[Tensor, " act"]
    """Which of the pairs each activation belongs to."""


@dataclass
class ActiveLatents:
    """Activations above 0, ordered by token.

    This is all that an SAE's layers say of a batch; nothing of shape
    [token, layer, d_sae] is held.
    """

    n_tokens: int
    n_layers: int
    d_sae: int
    token: Int[Tensor, " act"]
    layer: Int[Tensor, " act"]
    latent: Int[Tensor, " act"]
    value: Float[Tensor, " act"]
    """Activations, in float64."""

    @classmethod
    def from_dense(cls, acts: Float[Tensor, "token layer d_sae"]) -> "ActiveLatents":
        """The activations of a tensor that holds all of them; for small ones."""
        token, layer, latent = acts.nonzero(as_tuple=True)
        n_tokens, n_layers, d_sae = acts.shape
        value = acts[token, layer, latent].double()
        return cls(n_tokens, n_layers, d_sae, token, layer, latent, value)

    @cached_property
    def cell(self) -> Int[Tensor, " act"]:
        """Position of each activation in a flat [layer, d_sae] tensor."""
        return self.layer * self.d_sae + self.latent

    @cached_property
    def by_token(self) -> TokenLatents:
        """The activations of each token gathered by latent."""
        keys, order = (self.token * self.d_sae + self.latent).sort()
        keys, in_order = keys.unique_consecutive(return_inverse=True)
        pair = torch.empty_like(in_order).index_copy_(0, order, in_order)
        zeros = self.value.new_zeros(len(keys))
        total = zeros.index_add(0, pair, self.value)
        mean = zeros.index_add(0, pair, self.value * self.layer) / total
        deviation = (self.layer - mean[pair]).square()
        return TokenLatents(
            token=keys // self.d_sae,
            latent=keys % self.d_sae,
            total=total,
            mean_layer=mean,
            spread=zeros.index_add(0, pair, self.value * deviation),
            pair=pair,
        )

    def of_tokens(self, start: int, stop: int) -> "ActiveLatents":
        """The activations of some consecutive tokens, counted from `start`."""
        if start == 0 and stop >= self.n_tokens:
            return self
        bounds = torch.tensor([start, stop], device=self.token.device)
        first, last = torch.searchsorted(self.token, bounds).tolist()
        return ActiveLatents(
            min(stop, self.n_tokens) - start,
            self.n_layers,
            self.d_sae,
            self.token[first:last] - start,
            self.layer[first:last],
            self.latent[first:last],
            self.value[first:last],
        )


class LayerEncoder:
    """Encodes the vectors of all layers by one SAE, ours or a stock one.

    Attributes:
        hook_names: The hooks, in the order of the layer axis.
        sae: The SAE.
    """

    def __init__(self, sae: SAE[Any]) -> None:
        """Take an SAE that was trained on several hooks.

        Raises:
            ValueError: If the SAE does not name its hooks.
        """
        self.hook_names = hook_names_of(sae)
        self.sae = sae
        is_ours = isinstance(sae, (MultiLayerSAE, MultiLayerTrainingSAE))
        self._encode = self._encode_topk if is_ours else self._encode_dense
        self._stock = None if is_ours else views(sae)[0]

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "token layer d_in"]) -> ActiveLatents:
        """The activations above 0 of these vectors, in raw space.

        Raises:
            ValueError: If an activation is negative or not finite.
        """
        active = self._encode(x.to(self.sae.device))
        token, layer, latent, value = active
        token, layer, latent, value = (t.to(sums_device(self.sae)) for t in active)
        if not bool((value.isfinite() & (value > 0)).all()):
            bad = self.hook_names[int(layer[~(value.isfinite() & (value > 0))][0])]
            raise ValueError(
                "Distributions over layers need activations that are finite and at "
                f"least 0; one at {bad!r} is not. Check the model's vectors there, "
                "and that the SAE's activation function is not negative."
            )
        shape = (x.shape[0], x.shape[1], self.sae.cfg.d_sae)
        return ActiveLatents(*shape, token, layer, latent, value.double())

    def _encode_topk(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert isinstance(self.sae, (MultiLayerSAE, MultiLayerTrainingSAE))
        acts = self.sae.encode_topk(x)
        token, layer, place = (acts.values != 0).nonzero(as_tuple=True)
        chosen = token, layer, place
        return token, layer, acts.indices[chosen], acts.values[chosen]

    def _encode_dense(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert self._stock is not None
        n_layers = x.shape[1]
        n_rows = max(1, _DENSE_ELEMENTS // self.sae.cfg.d_sae)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for i, rows in enumerate(x.flatten(0, 1).split(n_rows)):
            acts = self._stock.encode(rows)
            row, latent = acts.nonzero(as_tuple=True)
            parts.append((row + i * n_rows, latent, acts[row, latent]))
        row, latent, value = (torch.cat(p) for p in zip(*parts, strict=True))
        return row // n_layers, row % n_layers, latent, value
