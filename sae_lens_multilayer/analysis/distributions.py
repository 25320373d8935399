"""The distribution over layers of each latent, over all tokens or at each of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor
from typing_extensions import Unpack

from sae_lens_multilayer.analysis.active import sums_device
from sae_lens_multilayer.analysis.batch import TokenBatch
from sae_lens_multilayer.analysis.stream import (
    PassOptions,
    TokenStream,
    single_analysis,
)
from sae_lens_multilayer.analysis.tables import (
    layer_columns,
    layer_mean,
    layer_variance,
    make_table,
)
from sae_lens_multilayer.evaluation.encoder import LayerEncoder
from sae_lens_multilayer.pictures.description import (
    Axis,
    Heatmap,
    Panel,
    Picture,
    layer_axis,
    token_axis,
)
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.sae.views import hook_names_of
from sae_lens_multilayer.text.prompts import Tokens

_MODE_SHARE, _MODE_ERRORS = 0.1, 3
"""See `LayerDistributions.has_two_modes`."""
_MOST_LATENTS = 4_096
"""Latents in one heatmap; a screen has no more pixels."""


@dataclass
class LayerDistributions(Result):
    """`P(l | j) = sum_t a[t,l,j] / sum_t,l' a[t,l',j]` of each latent j.

    Layers are indices into the layer axis, from 0. Probabilities and their moments are
    NaN for a latent that is never active.

    References:
        Lawson et al. (2025), arXiv:2409.04185, section 4.
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
    def frequency(self) -> Float[Tensor, "layer d_sae"]:
        """Share of the tokens at which a latent is active at a layer."""
        return self.counts.double() / self.n_tokens

    @property
    def has_two_modes(self) -> Bool[Tensor, " d_sae"]:
        """Whether `P(l | j)` has two modes, so that its mean may be at neither.

        True if at some layer it is below half of its peaks before and after, with at
        least 10% of it before and after, and the tokens at which the latent is active
        are fewer than at both peaks by three standard errors of single counts. Each
        layer is averaged with `n_layers // 12` neighbours on either side.
        """
        done = self.probs.cumsum(0)
        smaller_side = torch.minimum(done - self.probs, 1 - done)
        probs, counts = _smooth(self.probs), _smooth(self.counts.double())
        peaks = _smaller_peak(counts)
        is_valley = probs < _smaller_peak(probs) / 2
        is_valley &= peaks - counts > _MODE_ERRORS * (peaks + counts).sqrt()
        return (is_valley & (smaller_side >= _MODE_SHARE)).any(0)

    @property
    def mean_act(self) -> Float[Tensor, " d_sae"]:
        """Mean activation of a latent where it is active."""
        return self.totals.sum(0) / self.counts.sum(0)

    def active_latents(self) -> Int[Tensor, " latent"]:
        """Latents that are active at any token, by mean layer, then by index."""
        order = self.mean_layer.sort(stable=True).indices
        return order[self.counts.sum(0)[order] > 0]

    def most_active(self, n_latents: int) -> Int[Tensor, " latent"]:
        """Latents with the largest sums of activations, the largest first; inactive
        ones are left out."""
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
            "has_two_modes": self.has_two_modes,
        }
        columns |= layer_columns("p", self.hook_names, self.probs)
        return make_table(columns, "latent")

    def pictures(
        self, latents: Int[Tensor, " latent"] | None = None, **context: Any
    ) -> dict[str, Picture]:
        """`P(layer | latent)` and the frequency of `latents`, in this order.

        None: all that are active, by mean layer, with those of two modes at the end, as
        their mean layer may be between the modes.
        """
        chosen = self._by_modes() if latents is None else latents
        if not len(chosen):
            raise ValueError("There must be a latent that was active; there is none.")
        has_two = self.has_two_modes[chosen]
        caption = f"Latents with two modes: {int(has_two.sum()):,}."
        which = "latents" if latents is not None else "active latents, by mean layer"
        label = f"{len(chosen):,} {which}"
        if len(chosen) > _MOST_LATENTS:
            drawn = torch.linspace(0, len(chosen) - 1, _MOST_LATENTS).long()
            chosen, has_two = chosen[drawn], has_two[drawn]
            caption += f" {_MOST_LATENTS:,} of all, evenly spaced, are drawn."
        n_first = int((~has_two).sum())
        line = None
        if latents is None and 0 < n_first < len(chosen):
            line = n_first - 0.5, "right of it: two modes"
        marked = zip(chosen.tolist(), has_two.tolist(), strict=True)
        names = [f"{j} (two modes)" if two else str(j) for j, two in marked]
        x = Axis(label, names, most_names=0)
        panels = [
            Panel(x, layer_axis(self.hook_names), heatmap=heatmap, vertical_line=line)
            for heatmap in self._heatmaps(chosen)
        ]
        title = f"Layers of each latent over {self.n_tokens:,} tokens"
        return {"": Picture(title, panels, caption, n_columns=1)}

    def _by_modes(self) -> Int[Tensor, " latent"]:
        """`active_latents`, those with two modes at the end."""
        active = self.active_latents()
        return active[self.has_two_modes[active].sort(stable=True).indices]

    def _heatmaps(self, chosen: Int[Tensor, " latent"]) -> list[Heatmap]:
        # Most latents are spread over many layers, and a few are active at one.
        probs = Heatmap(self.probs[:, chosen].numpy(), "P(layer | latent)", power=0.5)
        frequency = self.frequency[:, chosen].numpy()
        return [probs, Heatmap(frequency, "share of tokens", top=None, power=0.25)]


def _smooth(values: Float[Tensor, "layer d_sae"]) -> Float[Tensor, "layer d_sae"]:
    """Averages of neighbouring layers, with weights that fall with the distance."""
    n = len(values) // 12
    padded = torch.cat([values[:1]] * n + [values] + [values[-1:]] * n)
    weights = (n + 1 - torch.arange(-n, n + 1).abs()).to(values)
    return (padded.unfold(0, 2 * n + 1, 1) * weights).sum(-1) / weights.sum()


def _smaller_peak(values: Float[Tensor, "layer d_sae"]) -> Float[Tensor, "layer d_sae"]:
    """The smaller one of the largest values up to each layer and from it on."""
    after = values.flip(0).cummax(0).values.flip(0)
    return torch.minimum(values.cummax(0).values, after)


class DistributionSums:
    """Adds up `LayerDistributions` over tokens."""

    def __init__(self, sae: SAE[Any]) -> None:
        names = hook_names_of(sae)
        counts = torch.zeros(len(names), sae.cfg.d_sae, dtype=torch.int64)
        counts = counts.to(sums_device(sae))
        self._sums = LayerDistributions(names, 0, counts, counts.double())

    def update(self, batch: TokenBatch) -> None:
        active, sums = batch.active, self._sums
        sums.n_tokens += active.n_tokens
        ones = torch.ones_like(active.cell)
        sums.counts.view(-1).index_add_(0, active.cell, ones)
        sums.totals.view(-1).index_add_(0, active.cell, active.value)

    def compute(self) -> LayerDistributions:
        return self._sums.on_cpu()


layer_distributions = single_analysis(DistributionSums)
"""The distribution over layers of each latent, over all tokens."""


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

    def pictures(
        self,
        latent: int | None = None,
        text_of: Callable[[int], str] = "[{}]".format,
        **context: Any,
    ) -> dict[str, Picture]:
        """One latent at each layer and token; None: the one with the largest sum."""
        if latent is None:
            latent = int(self.latents.bincount(self.acts).argmax())
        values = self.of_latent(latent).numpy()
        panel = Panel(
            token_axis("token", self.token_ids.tolist(), text_of, len(self.token_ids)),
            layer_axis(self.hook_names),
            heatmap=Heatmap(values, "activation", top=None, colours="magma_r"),
        )
        return {"": Picture(f"Latent {latent}", [panel])}


def prompt_acts(
    sae: SAE[Any], model: Any, tokens: Tokens, **options: Unpack[PassOptions]
) -> PromptActs:
    """The distribution over layers of each latent at each token of one prompt."""
    encoder = LayerEncoder(sae, hook_names_of(sae))
    names = encoder.hook_names
    batches = iter(TokenStream(model, names, tokens, encoder=encoder, **options))
    first = next(batches)
    if len(first.prompts) > 1 or next(batches, None) is not None:
        raise ValueError("`tokens` must be one prompt; got more than one.")
    active = first.active
    position = first.position[active.token.cpu()]
    acts = (t.cpu() for t in (active.layer, active.latent, active.value))
    return PromptActs(names, first.prompts[0], position, *acts)
