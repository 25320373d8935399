"""The distribution over layers of each latent, over all tokens or at each of them."""

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
from sae_lens_multilayer.analysis.tables import (
    by_layer,
    layer_mean,
    layer_variance,
    make_table,
)
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.sae.views import hook_names_of
from sae_lens_multilayer.text.prompts import Tokens


@dataclass
class LayerDistributions(Result):
    """`P(l | j) = sum_t a[t,l,j] / sum_t,l' a[t,l',j]` of each latent j.

    Layers are indices into the layer axis, from 0. Probabilities and their moments are
    NaN for a latent that is never active.
    """

    hook_names: list[str]
    n_tokens: int
    counts: Int[Tensor, "layer d_sae"]
    """Number of tokens at which a latent is active at a layer."""
    totals: Float[Tensor, "layer d_sae"]
    """Sum of its activations over tokens."""

    @property
    def probs(self) -> Float[Tensor, "layer d_sae"]:
        """`P(l | j)`; the sum over layers is 1."""
        return self.totals / self.totals.sum(0)

    @property
    def mean_layer(self) -> Float[Tensor, " d_sae"]:
        """`E[L | j]`."""
        return layer_mean(self.probs)

    @property
    def var_layer(self) -> Float[Tensor, " d_sae"]:
        """`Var(L | j)`, in layers squared."""
        return layer_variance(self.probs)

    @property
    def std_layer(self) -> Float[Tensor, " d_sae"]:
        """Standard deviation of L given j, in layers."""
        return self.var_layer.sqrt()

    @property
    def mean_act(self) -> Float[Tensor, " d_sae"]:
        """Mean activation of a latent where it is active."""
        return self.totals.sum(0) / self.counts.sum(0)

    def active_latents(self) -> Int[Tensor, " latent"]:
        """Latents that are active at any token, by mean layer, then by index.

        Example:
            >>> counts = torch.tensor([[0, 0, 2], [1, 0, 0]])
            >>> dists = LayerDistributions(["a", "b"], 2, counts, counts.double())
            >>> dists.active_latents()
            tensor([2, 0])
        """
        order = self.mean_layer.sort(stable=True).indices
        return order[self.counts.sum(0)[order] > 0]

    def most_active(self, n_latents: int) -> Int[Tensor, " latent"]:
        """Latents with the largest sums of activations, the largest first.

        Fewer than `n_latents` if fewer are active.
        """
        n_active = int((self.counts.sum(0) > 0).sum())
        return self.totals.sum(0).topk(min(n_latents, n_active)).indices

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each latent; a column `p_{layer}` for each layer."""
        columns = {
            "count": self.counts.sum(0),
            "total": self.totals.sum(0),
            "mean_act": self.mean_act,
            "mean_layer": self.mean_layer,
            "var_layer": self.var_layer,
            "std_layer": self.std_layer,
        }
        columns |= by_layer("p", self.hook_names, self.probs)
        return make_table(columns, "latent")


class DistributionSums:
    """Adds up `LayerDistributions` over tokens."""

    def __init__(self, sae: SAE[Any]) -> None:
        """Start without tokens."""
        self._hook_names = hook_names_of(sae)
        shape = len(self._hook_names), sae.cfg.d_sae
        self.n_tokens = 0
        device = sums_device(sae)
        self._counts = torch.zeros(shape, dtype=torch.int64, device=device)
        self._totals = torch.zeros(shape, dtype=torch.float64, device=device)

    def update(self, batch: TokenBatch) -> None:
        """Add a batch of tokens."""
        active = batch.active
        self.n_tokens += active.n_tokens
        ones = torch.ones_like(active.cell)
        self._counts.view(-1).index_add_(0, active.cell, ones)
        self._totals.view(-1).index_add_(0, active.cell, active.value)

    def compute(self) -> LayerDistributions:
        """The distributions over all tokens so far."""
        return LayerDistributions(
            self._hook_names,
            self.n_tokens,
            self._counts.cpu().clone(),
            self._totals.cpu().clone(),
        )


def layer_distributions(
    sae: SAE[Any],
    model: Any,
    tokens: Tokens,
    **options: Unpack[PassOptions],
) -> LayerDistributions:
    """The distribution over layers of each latent, over all tokens.

    References:
        Lawson et al. (2025), arXiv:2409.04185, section 4.
    """
    return analyze(sae, model, tokens, DistributionSums(sae), **options)[0]


@dataclass
class PromptActs(Result):
    """All activations of one prompt, and so `P(l | j, t)` for each token t."""

    hook_names: list[str]
    token_ids: Int[Tensor, " pos"]
    """The prompt, with excluded tokens."""
    positions: Int[Tensor, " act"]
    layers: Int[Tensor, " act"]
    latents: Int[Tensor, " act"]
    acts: Float[Tensor, " act"]

    def of_latent(self, latent: int) -> Float[Tensor, "layer pos"]:
        """The activations of one latent at each layer and position."""
        acts = self.acts.new_zeros(len(self.hook_names), len(self.token_ids))
        chosen = self.latents == latent
        acts[self.layers[chosen], self.positions[chosen]] = self.acts[chosen]
        return acts

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each activation; `prob` is `P(l | j, t)`."""
        table = make_table(
            {
                "position": self.positions,
                "token_id": self.token_ids[self.positions],
                "latent": self.latents,
                "layer": self.layers,
                "act": self.acts,
            }
        )
        totals = table.groupby(["position", "latent"])["act"].transform("sum")
        return table.assign(prob=table["act"] / totals)


class PromptCollector:
    """Keeps the activations of one prompt."""

    def __init__(self, sae: SAE[Any]) -> None:
        """Start without a prompt."""
        self._hook_names = hook_names_of(sae)
        self._batch: TokenBatch | None = None

    def update(self, batch: TokenBatch) -> None:
        """Store the prompt.

        Raises:
            ValueError: If there is more than one.
        """
        if len(batch.prompts) > 1 or self._batch is not None:
            raise ValueError("`tokens` must be one prompt; got more than one.")
        self._batch = batch

    def compute(self) -> PromptActs:
        """The activations of the prompt."""
        assert self._batch is not None
        active = self._batch.active
        return PromptActs(
            self._hook_names,
            self._batch.prompts[0],
            self._batch.position[active.token.cpu()],
            active.layer.cpu(),
            active.latent.cpu(),
            active.value.cpu(),
        )


def prompt_acts(
    sae: SAE[Any],
    model: Any,
    tokens: Int[Tensor, "prompt pos"],
    exclude_tokens: tuple[int, ...] = (),
) -> PromptActs:
    """The distribution over layers of each latent at each token of one prompt.

    Args:
        sae, model: As in `analyze`.
        tokens: One prompt.
        exclude_tokens: Token ids whose positions are excluded.
    """
    collector = PromptCollector(sae)
    return analyze(sae, model, tokens, collector, exclude_tokens=exclude_tokens)[0]
