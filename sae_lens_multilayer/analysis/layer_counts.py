"""Counts the layers at which a latent is active, at one token and over all tokens."""

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor
from typing_extensions import Unpack

from sae_lens_multilayer.analysis.active import sums_device
from sae_lens_multilayer.analysis.stream import PassOptions, TokenBatch, analyze
from sae_lens_multilayer.analysis.tables import by_layer, make_table
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.sae.views import hook_names_of
from sae_lens_multilayer.text.prompts import Tokens


@dataclass
class ActiveLayers(Result):
    """Number of layers at which each latent is active.

    A latent is active if its activation is above `threshold`, in the SAE's units: those
    of standardised vectors if it standardises them.
    """

    hook_names: list[str]
    n_tokens: int
    threshold: float
    counts: Int[Tensor, "layer d_sae"]
    """Number of tokens at which a latent is active at a layer."""
    per_token: Int[Tensor, "layer d_sae"]
    """Number of tokens at which it is active at exactly 1, 2, ... layers."""

    @property
    def n_active_tokens(self) -> Int[Tensor, " d_sae"]:
        """Number of tokens at which a latent is active at any layer."""
        return self.per_token.sum(0)

    @property
    def mean_per_token(self) -> Float[Tensor, " d_sae"]:
        """Mean number of layers over the tokens at which a latent is active at any
        layer; NaN if there are none."""
        n_layers = torch.arange(1, len(self.per_token) + 1).unsqueeze(1)
        return (self.per_token * n_layers).sum(0) / self.n_active_tokens.double()

    def overall(self, min_share: float = 0.0) -> Int[Tensor, " d_sae"]:
        """Number of layers at which a latent is active at any token.

        Args:
            min_share: Fraction of the latent's counts over all layers, in [0, 1), that
                a layer must exceed.
        """
        return (self.counts > min_share * self.counts.sum(0)).sum(0)

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each latent; a column `count_{layer}` for each layer."""
        columns = {
            "n_active_tokens": self.n_active_tokens,
            "mean_per_token": self.mean_per_token,
            "overall": self.overall(),
        }
        columns |= by_layer("count", self.hook_names, self.counts)
        return make_table(columns, "latent")


class ActiveLayerCounts:
    """Adds up `ActiveLayers` over tokens."""

    def __init__(self, sae: SAE[Any], threshold: float = 0.0) -> None:
        """Start without tokens.

        Args:
            threshold: Activation above which a latent is active, at least 0.
        """
        self._hook_names = hook_names_of(sae)
        self._threshold = float(threshold)
        self._n_tokens = 0
        zeros = torch.zeros(
            2 * len(self._hook_names), sae.cfg.d_sae, dtype=torch.int64
        ).to(sums_device(sae))
        self._counts, self._per_token = zeros.chunk(2)

    def update(self, batch: TokenBatch) -> None:
        """Add a batch of tokens."""
        active, pairs = batch.active, batch.active.by_token
        above = (active.value > self._threshold).long()
        self._n_tokens += active.n_tokens
        self._counts.view(-1).index_add_(0, active.cell, above)
        n_layers = torch.zeros_like(pairs.token).index_add_(0, pairs.pair, above)
        any_layer = n_layers > 0
        cell = (n_layers - 1) * active.d_sae + pairs.latent
        ones = torch.ones_like(cell[any_layer])
        self._per_token.view(-1).index_add_(0, cell[any_layer], ones)

    def compute(self) -> ActiveLayers:
        """The counts over all tokens so far."""
        return ActiveLayers(
            self._hook_names,
            self._n_tokens,
            self._threshold,
            self._counts.cpu().clone(),
            self._per_token.cpu().clone(),
        )


def active_layers(
    sae: SAE[Any],
    model: Any,
    tokens: Tokens,
    *,
    threshold: float = 0.0,
    **options: Unpack[PassOptions],
) -> ActiveLayers:
    """Number of layers at which each latent is active, per token and overall.

    Args:
        threshold: Activation above which a latent is active, at least 0.
    """
    counts = ActiveLayerCounts(sae, threshold)
    return analyze(sae, model, tokens, counts, **options)[0]
