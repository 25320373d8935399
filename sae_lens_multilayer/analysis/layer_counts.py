"""At how many layers a latent is active, for one token and over all."""

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor
from typing_extensions import Unpack

from sae_lens_multilayer.analysis.active import sums_device
from sae_lens_multilayer.analysis.results import Result
from sae_lens_multilayer.analysis.stream import PassOptions, TokenBatch, analyze
from sae_lens_multilayer.hooks import layer_labels
from sae_lens_multilayer.sae.views import hook_names_of


@dataclass
class ActiveLayers(Result):
    """How many layers each latent is active at.

    A latent is active where its activation is above `threshold`, in the SAE's own
    units: those of standardised vectors, if it standardises them.
    """

    hook_names: list[str]
    n_tokens: int
    threshold: float
    counts: Int[Tensor, "layer d_sae"]
    """Number of tokens at which a latent was active at a layer."""
    per_token: Int[Tensor, "layer d_sae"]
    """Number of tokens at which it was active at 1, 2, ... layers."""

    @property
    def n_active_tokens(self) -> Int[Tensor, " d_sae"]:
        """Tokens at which a latent was active at any layer."""
        return self.per_token.sum(0)

    @property
    def mean_per_token(self) -> Float[Tensor, " d_sae"]:
        """Mean number of layers over the tokens at which a latent was active at any;
        NaN if there were none."""
        n_layers = torch.arange(1, len(self.per_token) + 1).unsqueeze(1)
        return (self.per_token * n_layers).sum(0) / self.n_active_tokens.double()

    def overall(self, min_share: float = 0.0) -> Int[Tensor, " d_sae"]:
        """Number of layers at which a latent was active, over all tokens.

        Args:
            min_share: Leave out layers with no more than this share of the times that
                the latent was active at any layer.

        Raises:
            ValueError: If the share is not in [0, 1).
        """
        if not 0 <= min_share < 1:
            raise ValueError(f"`min_share` must be in [0, 1); got {min_share}.")
        return (self.counts > min_share * self.counts.sum(0)).sum(0)

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each latent; a column `count_{layer}` for each layer."""
        table = pd.DataFrame(
            {
                "n_active_tokens": self.n_active_tokens.numpy(),
                "mean_per_token": self.mean_per_token.numpy(),
                "overall": self.overall().numpy(),
            }
        )
        labels = [f"count_{label}" for label in layer_labels(self.hook_names)]
        counts = pd.DataFrame(self.counts.T.numpy(), columns=pd.Index(labels))
        return table.join(counts).rename_axis("latent")


class ActiveLayerCounts:
    """Adds up `ActiveLayers` over tokens."""

    def __init__(self, sae: SAE[Any], threshold: float = 0.0) -> None:
        """Start at no token.

        Raises:
            ValueError: If the threshold is negative.
        """
        if not threshold >= 0:
            raise ValueError(f"`threshold` must be at least 0; got {threshold}.")
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
    tokens: Int[Tensor, "prompt pos"] | ActivationsStore,
    *,
    threshold: float = 0.0,
    **options: Unpack[PassOptions],
) -> ActiveLayers:
    """At how many layers each latent is active, per token and overall.

    Args:
        sae, model, tokens: As in `analyze`.
        threshold: Activation above which a latent counts as active.
        options: See `PassOptions`.
    """
    counts = ActiveLayerCounts(sae, threshold)
    return analyze(sae, model, tokens, counts, **options)[0]
