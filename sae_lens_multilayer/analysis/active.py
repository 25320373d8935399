"""The activations above 0 of a batch of tokens, and their sums over layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from sae_lens_multilayer.evaluation.encoder import LayerEncoder


def sums_device(sae: SAE[Any]) -> torch.device:
    """The device of an analysis' sums: the SAE's, or the CPU if it lacks float64."""
    device = torch.device(sae.device)
    return torch.device("cpu") if device.type == "mps" else device


def check_latents(latents: Sequence[int], d_sae: int) -> None:
    """Raise ValueError unless the latents are distinct indices, at least one."""
    unknown = [latent for latent in latents if not 0 <= latent < d_sae]
    if unknown or not len(latents) or len(set(latents)) != len(latents):
        raise ValueError(
            f"`latents` must be in [0, d_sae = {d_sae}), each once and at least one; "
            f"got {list(latents)}."
        )


def check_are_active(
    latents: Sequence[int],
    counts: Int[Tensor, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
) -> None:
    """Raise ValueError for a latent without activations, with the nearest that has any.

    Args:
        counts: Activations of each latent at the tokens.
        W_dec: Decoder directions, by whose cosine similarity the nearest is found.
    """
    silent = [latent for latent in latents if not counts[latent]]
    if not silent:
        return
    directions = torch.nn.functional.normalize(W_dec.float().cpu(), dim=1)
    cosines = directions @ directions[silent[0]]
    cosines[counts.cpu() == 0] = -2
    nearest = f"{int(cosines.argmax())} (cosine {cosines.max():.2f} of the decoder)"
    raise ValueError(
        f"`latents` must be active at the tokens; {silent} never are. The nearest to "
        f"{silent[0]} that is: {nearest if counts.any() else 'none'}. Give other "
        "latents or more tokens."
    )


@dataclass
class TokenLatents:
    """Sums over layers of each token's activations, one per active latent."""

    token: Int[Tensor, " pair"]
    latent: Int[Tensor, " pair"]
    total: Float[Tensor, " pair"]
    """Sum of the activations over layers."""
    mean_layer: Float[Tensor, " pair"]
    """`E[L | j, t]`, an index into the layer axis."""
    spread: Float[Tensor, " pair"]
    """`total * Var(L | j, t)`."""
    pair: Int[Tensor, " act"]
    """Index of the pair that each activation belongs to."""


@dataclass
class ActiveLatents:
    """Activations above 0, ordered by token; never a tensor [token, layer, d_sae]."""

    n_tokens: int
    n_layers: int
    d_sae: int
    token: Int[Tensor, " act"]
    layer: Int[Tensor, " act"]
    latent: Int[Tensor, " act"]
    value: Float[Tensor, " act"]
    """Activations, in float64."""

    @cached_property
    def cell(self) -> Int[Tensor, " act"]:
        """Index of each activation into a flat [layer, d_sae] tensor."""
        return self.layer * self.d_sae + self.latent

    @cached_property
    def by_token(self) -> TokenLatents:
        """The activations of each token, summed by latent."""
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
        """The activations of tokens `start` to `stop - 1`, renumbered from 0."""
        if start == 0 and stop >= self.n_tokens:
            return self
        bounds = torch.tensor([start, stop], device=self.token.device)
        some = slice(*torch.searchsorted(self.token, bounds).tolist())
        return ActiveLatents(
            min(stop, self.n_tokens) - start,
            self.n_layers,
            self.d_sae,
            self.token[some] - start,
            self.layer[some],
            self.latent[some],
            self.value[some],
        )


@torch.no_grad()
def active_latents(
    encoder: LayerEncoder, x: Float[Tensor, "token layer d_in"]
) -> ActiveLatents:
    """The activations above 0 of raw vectors of all hooks."""
    sae = encoder.saes[0]
    acts = encoder.encode(x.to(sae.device))
    device = sums_device(sae)
    row, latent, value = (t.to(device) for t in (acts.row, acts.latent, acts.value))
    n_tokens, n_layers = x.shape[:2]
    token, layer = row // n_layers, row % n_layers
    bad = ~(value.isfinite() & (value > 0))
    if bool(bad.any()):
        raise ValueError(
            "Distributions over layers need activations that are finite and at "
            f"least 0; one at {encoder.hook_names[int(layer[bad][0])]!r} is not. Check "
            "the model's vectors there, and that the SAE's activation function is not "
            "negative."
        )
    d_sae: int = sae.cfg.d_sae
    return ActiveLatents(
        n_tokens, n_layers, d_sae, token, layer, latent, value.double()
    )
