"""From which layers a crosscoder's latents get their activations."""

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
from sae_lens_multilayer.sae.crosscoder import CrosscoderSAE, CrosscoderTrainingSAE
from sae_lens_multilayer.sae.views import hook_names_of
from sae_lens_multilayer.topk.reference import standardize

_GATHERED_ELEMENTS = 2**24


@dataclass
class FunctionalLayers(Result):
    """What each layer contributes to a crosscoder's latents, where they are active.

    The pre-activation of latent j at token t is `sum_l h[t,l,j]`, with
    `h[t,l,j] = w_j^l . (u[t,l] - b_l)` and u standardised if the SAE does so.
    """

    hook_names: list[str]
    n_tokens: int
    counts: Int[Tensor, " d_sae"]
    """Number of tokens at which a latent is active; means are over these."""
    contribution: Float[Tensor, "layer d_sae"]
    """`c_jl`: mean of `|h[t,l,j]|`, in units of activations; NaN if never active."""
    fall: Float[Tensor, "layer d_sae"]
    """`1 - sum_t ReLU(a[t,j] - h[t,l,j]) / sum_t a[t,j]`: the share of its activation
    that a latent loses if the layer is left out; below 0 if it gains. Other latents
    are not selected instead."""
    decoder_norm: Float[Tensor, "layer d_sae"]
    """Norm of the latent's decoder at each layer; the squares sum to 1 over layers."""

    @property
    def n_functional(self) -> Float[Tensor, " d_sae"]:
        """`exp H` of `c_jl / sum_l c_jl`: from 1 to the number of layers."""
        share = self.contribution / self.contribution.sum(0)
        return torch.special.entr(share).sum(0).exp()

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each latent; columns `contribution_{layer}`, `fall_{layer}` and
        `decoder_norm_{layer}` for each layer."""
        columns = {"n_active_tokens": self.counts, "n_functional": self.n_functional}
        for name in ("contribution", "fall", "decoder_norm"):
            columns |= layer_columns(name, self.hook_names, getattr(self, name))
        return make_table(columns, "latent")

    def numbers(self) -> dict[str, float]:
        return {"functional_layers": self.n_functional.nanmean().item()}

    def pictures(self, **context: Any) -> dict[str, Picture]:
        n_layers = len(self.hook_names)
        was_active = self.counts > 0
        edges = np.linspace(1, max(2, n_layers), 2 * n_layers + 1)
        values = self.n_functional[was_active].numpy()
        panel = Panel(
            Axis(f"functional layers of a latent, of {n_layers}"),
            Axis("latents"),
            [histogram("exp H of the layers' contributions", values, edges)],
        )
        caption = (
            f"{int(was_active.sum()):,} latents active on {self.n_tokens:,} tokens."
        )
        title = "From how many layers a latent gets its activation"
        return {"": Picture(title, [panel], caption)}


class FunctionalLayerSums:
    """Adds up `FunctionalLayers` over tokens, for a crosscoder."""

    nulls = ("random_weights",)
    """The others change layers or latents, to which the encoder's parts belong."""

    def __init__(self, sae: SAE[Any]) -> None:
        if not isinstance(sae, (CrosscoderSAE, CrosscoderTrainingSAE)):
            raise ValueError(
                "Functional layers need a crosscoder, which has an encoder for each "
                f"layer; got a {type(sae).__name__}."
            )
        self._sae, self._n_tokens, self._device = sae, 0, sums_device(sae)
        zeros = torch.zeros(len(hook_names_of(sae)), sae.cfg.d_sae).double()
        self._absolute = zeros.to(self._device)
        self._left_out = torch.zeros_like(self._absolute)
        self._total = torch.zeros_like(self._absolute[0])
        self._counts = torch.zeros_like(self._total, dtype=torch.int64)

    @torch.no_grad()
    def update(self, batch: TokenBatch) -> None:
        sae, pairs = self._sae, batch.active.by_token
        self._n_tokens += batch.active.n_tokens
        z = sae.into_lens(batch.x.to(sae.device, sae.dtype))
        u = standardize(z)[0] if sae.standardizes else z
        v = u - sae.b_dec.view(u.shape[1:])
        size = max(1, _GATHERED_ELEMENTS // sae.d_enc)
        for token, latent in zip(
            pairs.token.split(size), pairs.latent.split(size), strict=True
        ):
            rows = sae.W_enc.T[latent.to(v.device)].view(-1, *v.shape[1:])
            h = (rows * v[token.to(v.device)]).sum(2).T.to(self._device).double()
            self._add(h, latent)

    def _add(
        self, h: Float[Tensor, "layer pair"], latent: Int[Tensor, " pair"]
    ) -> None:
        acts = h.sum(0)
        self._total.index_add_(0, latent, acts)
        self._counts.index_add_(0, latent, torch.ones_like(latent))
        self._absolute.index_add_(1, latent, h.abs())
        self._left_out.index_add_(1, latent, (acts - h).relu())

    def compute(self) -> FunctionalLayers:
        return FunctionalLayers(
            hook_names_of(self._sae),
            self._n_tokens,
            self._counts,
            self._absolute / self._counts,
            1 - self._left_out / self._total,
            self._sae.decoders.norm(dim=-1),
        ).on_cpu()


functional_layers = single_analysis(FunctionalLayerSums)
"""What each layer contributes to the latents of a crosscoder."""
