"""The latents and tokens at which interventions are made."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor
from typing_extensions import Unpack

from sae_lens_multilayer.analysis.active import check_are_active, check_latents
from sae_lens_multilayer.analysis.batch import TokenBatch
from sae_lens_multilayer.analysis.distributions import (
    DistributionSums,
    LayerDistributions,
)
from sae_lens_multilayer.analysis.layer_counts import ActiveLayerCounts, ActiveLayers
from sae_lens_multilayer.analysis.stream import PassOptions, analyze
from sae_lens_multilayer.text.prompts import Prompts

_BINS = 4, 3
"""Strata of the mean layer, and within each of the number of layers at a token."""


@dataclass
class Sample:
    """Latents, and some of the tokens at which each is active."""

    latents: Int[Tensor, " latent"]
    distributions: LayerDistributions
    """Of all latents over all tokens."""
    active_layers: ActiveLayers
    pairs: Int[Tensor, "pair 3"]
    """Latent, prompt and position, ordered by prompt and position."""
    acts: Float[Tensor, "pair layer"]
    """Activations of each pair, at the layers that the null gives them."""


def take_sample(
    sae: SAE[Any],
    model: Any,
    prompts: Prompts,
    latents: Sequence[int] | None,
    n_latents: int,
    n_tokens: int,
    seed: int,
    **options: Unpack[PassOptions],
) -> Sample:
    """Choose latents, stratified by mean layer and number of layers, and tokens.

    Args:
        latents: Instead of the choice.
        n_latents, n_tokens: Most latents, and most tokens of each.

    Raises:
        ValueError: If no latent, or one of `latents`, is active at these tokens.
    """
    rng = np.random.default_rng(seed)
    sums = DistributionSums(sae), ActiveLayerCounts(sae)
    distributions, layers = analyze(sae, model, prompts, *sums, **options)
    counts = layers.n_active_tokens
    if latents is None:
        mean, n_layers = distributions.mean_layer, layers.mean_per_token
        chosen = stratified(mean.numpy(), n_layers.numpy(), n_latents, rng)
    else:
        check_latents(latents, sae.cfg.d_sae)
        check_are_active(latents, counts, sae.W_dec.detach())
        chosen = np.array(latents)
    if not len(chosen):
        raise ValueError("Some latent must be active at the tokens; none is.")
    found = torch.from_numpy(chosen)
    tokens = _TokensOfLatents(found, n_tokens, seed)
    (pairs,) = analyze(sae, model, prompts, tokens, **options)
    return Sample(found, distributions, layers, *pairs)


def stratified(
    mean_layer: Float[np.ndarray, " d_sae"],
    n_layers: Float[np.ndarray, " d_sae"],
    n_latents: int,
    rng: np.random.Generator,
) -> Int[np.ndarray, " latent"]:
    """As many latents of each stratum as possible, in order of their index.

    Strata are quarters of the latents by mean layer, and thirds of each quarter by
    number of layers. Latents that are never active have NaN and are left out.
    """
    order = np.argsort(mean_layer, kind="stable")[: np.isfinite(mean_layer).sum()]
    strata = [
        rng.permutation(part)
        for quarter in np.array_split(order, _BINS[0])
        for part in np.array_split(quarter[np.argsort(n_layers[quarter])], _BINS[1])
    ]
    ranked = [
        (rank, stratum, latent)
        for stratum, part in enumerate(strata)
        for rank, latent in enumerate(part)
    ]
    chosen = [latent for _, _, latent in sorted(ranked)[:n_latents]]
    return np.sort(np.array(chosen, dtype=np.int64))


class _TokensOfLatents:
    """Some random tokens at which each latent is active at any layer."""

    def __init__(self, latents: Tensor, n_tokens: int, seed: int) -> None:
        self._latents, self._n_tokens = latents, n_tokens
        self._generator = torch.Generator().manual_seed(seed)
        self._pairs: Tensor | None = None
        self._acts, self._keys = torch.empty(0), torch.empty(0)

    def update(self, batch: TokenBatch) -> None:
        active, found = batch.active, batch.active.by_token
        latent, token = found.latent.cpu(), found.token.cpu()
        acts = active.value.new_zeros(len(latent), active.n_layers)
        acts[found.pair, active.layer] = active.value
        chosen = torch.isin(latent, self._latents)
        latent, token, acts = latent[chosen], token[chosen], acts.cpu()[chosen]
        prompt = batch.prompt[token] + batch.first_prompt
        pairs = torch.stack([latent, prompt, batch.position[token]], 1)
        keys = torch.rand(len(pairs), generator=self._generator)
        if self._pairs is not None:
            pairs = torch.cat([self._pairs, pairs])
            acts, keys = torch.cat([self._acts, acts]), torch.cat([self._keys, keys])
        self._keep(pairs, acts, keys)

    def _keep(self, pairs: Tensor, acts: Tensor, keys: Tensor) -> None:
        """Keep the pairs of each latent with the smallest random keys."""
        order = keys.argsort()
        order = order[pairs[order, 0].argsort(stable=True)]
        latent = pairs[order, 0].contiguous()
        first = torch.searchsorted(latent, latent)
        order = order[torch.arange(len(latent)) - first < self._n_tokens]
        self._pairs, self._acts, self._keys = pairs[order], acts[order], keys[order]

    def compute(self) -> tuple[Int[Tensor, "pair 3"], Float[Tensor, "pair layer"]]:
        assert self._pairs is not None
        order = self._pairs[:, 2].argsort(stable=True)
        order = order[self._pairs[order, 1].argsort(stable=True)]
        return self._pairs[order], self._acts[order]
