"""Counts the layers at which a latent is active, at one token and over all tokens."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from sae_lens_multilayer.analysis.active import sums_device
from sae_lens_multilayer.analysis.batch import TokenBatch
from sae_lens_multilayer.analysis.stream import single_analysis
from sae_lens_multilayer.analysis.tables import layer_columns, make_table
from sae_lens_multilayer.pictures.description import Axis, Panel, Picture, histogram
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.sae.views import hook_names_of


@dataclass
class ActiveLayers(Result):
    """Number of layers at which each latent is active: above `threshold`.

    Activations are of standardised vectors if the SAE standardises them.
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
        """Number of layers with more than `min_share` of the latent's counts."""
        return (self.counts > min_share * self.counts.sum(0)).sum(0)

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each latent; a column `count_{layer}` for each layer."""
        columns = {
            "n_active_tokens": self.n_active_tokens,
            "mean_per_token": self.mean_per_token,
            "overall": self.overall(),
        }
        columns |= layer_columns("count", self.hook_names, self.counts)
        return make_table(columns, "latent")

    def numbers(self) -> dict[str, float]:
        return {"active_layers_per_token": self.mean_per_token.nanmean().item()}

    def pictures(self, **context: Any) -> dict[str, Picture]:
        n_layers = len(self.hook_names)
        was_active = self.n_active_tokens > 0
        edges = np.arange(n_layers + 1) + 0.5
        values = {
            "at one token (mean over its tokens)": self.mean_per_token,
            "over all tokens (layers with over 1% of its counts)": self.overall(0.01),
        }
        ticks = range(1, n_layers + 1, -(-n_layers // 12))
        panel = Panel(
            Axis(f"layers at which a latent is active, of {n_layers}", ticks=ticks),
            Axis("latents"),
            [histogram(n, v[was_active].numpy(), edges) for n, v in values.items()],
        )
        caption = (
            f"{int(was_active.sum()):,} latents active above {self.threshold:g} on "
            f"{self.n_tokens:,} tokens."
        )
        return {"": Picture("At how many layers a latent is active", [panel], caption)}


class ActiveLayerCounts:
    """Adds up `ActiveLayers` over tokens; `threshold` is at least 0."""

    def __init__(self, sae: SAE[Any], threshold: float = 0.0) -> None:
        names, device = hook_names_of(sae), sums_device(sae)
        zeros = torch.zeros(2 * len(names), sae.cfg.d_sae, dtype=torch.int64)
        counts, per_token = zeros.to(device).chunk(2)
        self._sums = ActiveLayers(names, 0, float(threshold), counts, per_token)

    def update(self, batch: TokenBatch) -> None:
        active, pairs, sums = batch.active, batch.active.by_token, self._sums
        above = (active.value > sums.threshold).long()
        sums.n_tokens += active.n_tokens
        sums.counts.view(-1).index_add_(0, active.cell, above)
        n_layers = torch.zeros_like(pairs.token).index_add_(0, pairs.pair, above)
        cell = ((n_layers - 1) * active.d_sae + pairs.latent)[n_layers > 0]
        sums.per_token.view(-1).index_add_(0, cell, torch.ones_like(cell))

    def compute(self) -> ActiveLayers:
        return self._sums.on_cpu()


active_layers = single_analysis(ActiveLayerCounts)
"""Number of layers at which each latent is active, per token and overall."""
