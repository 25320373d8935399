"""At which layers each latent is active: its distribution over layers."""

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
from sae_lens_multilayer.hooks import layer_labels
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.sae.views import hook_names_of
from sae_lens_multilayer.text.prompts import Tokens


@dataclass
class LayerDistributions(Result):
    """`P(l | j) = sum_t a[t,l,j] / sum_t,l' a[t,l',j]` of each latent j.

    Layers are counted from 0 along the layer axis, whatever blocks they are. What has
    no value for a latent that is never active is NaN there.
    """

    hook_names: list[str]
    n_tokens: int
    counts: Int[Tensor, "layer d_sae"]
    """Number of tokens at which a latent was active at a layer."""
    totals: Float[Tensor, "layer d_sae"]
    """Sum over tokens of its activations there."""

    @property
    def probs(self) -> Float[Tensor, "layer d_sae"]:
        """`P(l | j)`; each latent's sum to 1."""
        return self.totals / self.totals.sum(0)

    @property
    def mean_layer(self) -> Float[Tensor, " d_sae"]:
        """`E[L | j]`."""
        return (self.probs * self._layers).sum(0)

    @property
    def var_layer(self) -> Float[Tensor, " d_sae"]:
        """`Var(L | j)`, in layers squared."""
        return (self.probs * (self._layers - self.mean_layer).square()).sum(0)

    @property
    def std_layer(self) -> Float[Tensor, " d_sae"]:
        """Standard deviation of L given j, in layers."""
        return self.var_layer.sqrt()

    @property
    def mean_act(self) -> Float[Tensor, " d_sae"]:
        """Mean activation of a latent where it is active."""
        return self.totals.sum(0) / self.counts.sum(0)

    @property
    def _layers(self) -> Float[Tensor, "layer 1"]:
        return torch.arange(len(self.totals), dtype=self.totals.dtype).unsqueeze(1)

    def active_latents(self) -> Int[Tensor, " latent"]:
        """Latents that were active, by mean layer; ties in the order of their number.

        Example:
            >>> counts = torch.tensor([[0, 0, 2], [1, 0, 0]])
            >>> dists = LayerDistributions(["a", "b"], 2, counts, counts.double())
            >>> dists.active_latents()
            tensor([2, 0])
        """
        order = self.mean_layer.sort(stable=True).indices
        return order[self.counts.sum(0)[order] > 0]

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each latent; a column `p_{layer}` for each layer."""
        table = pd.DataFrame(
            {
                "count": self.counts.sum(0).numpy(),
                "total": self.totals.sum(0).numpy(),
                "mean_act": self.mean_act.numpy(),
                "mean_layer": self.mean_layer.numpy(),
                "var_layer": self.var_layer.numpy(),
                "std_layer": self.std_layer.numpy(),
            }
        )
        labels = [f"p_{label}" for label in layer_labels(self.hook_names)]
        probs = pd.DataFrame(self.probs.T.numpy(), columns=pd.Index(labels))
        return table.join(probs).rename_axis("latent")


class DistributionSums:
    """Adds up `LayerDistributions` over tokens."""

    def __init__(self, sae: SAE[Any]) -> None:
        """Start at no token."""
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
    """The distribution over layers of each latent, over many tokens or one prompt.

    Args:
        sae, model, tokens: As in `analyze`.
        options: See `PassOptions`.

    References:
        Lawson et al. (2025), arXiv:2409.04185, section 4; design of this package,
        section 7.
    """
    return analyze(sae, model, tokens, DistributionSums(sae), **options)[0]


@dataclass
class PromptActs(Result):
    """Every activation of one prompt: `P(l | j, t)` for each token t."""

    hook_names: list[str]
    token_ids: Int[Tensor, " pos"]
    """The prompt, with tokens that were left out."""
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
        """One row for each activation: its share `prob` of its token's and latent's."""
        table = pd.DataFrame(
            {
                "position": self.positions.numpy(),
                "token_id": self.token_ids[self.positions].numpy(),
                "latent": self.latents.numpy(),
                "layer": self.layers.numpy(),
                "act": self.acts.numpy(),
            }
        )
        totals = table.groupby(["position", "latent"])["act"].transform("sum")
        return table.assign(prob=table["act"] / totals)


class PromptCollector:
    """Keeps the activations of one prompt."""

    def __init__(self, sae: SAE[Any]) -> None:
        """Wait for the prompt."""
        self._hook_names = hook_names_of(sae)
        self._batch: TokenBatch | None = None

    def update(self, batch: TokenBatch) -> None:
        """Take the prompt.

        Raises:
            ValueError: If there is more than one.
        """
        if len(batch.prompts) > 1 or self._batch is not None:
            raise ValueError(
                "The distributions of every token are for one prompt; got more. Give "
                "`tokens` of shape [1, pos]."
            )
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
        exclude_tokens: Token ids whose positions are left out.

    Raises:
        ValueError: If there is more than one prompt, or as `analyze`.
    """
    options: PassOptions = {"exclude_tokens": exclude_tokens}
    return analyze(sae, model, tokens, PromptCollector(sae), **options)[0]
