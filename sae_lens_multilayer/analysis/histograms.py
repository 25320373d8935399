"""Histogram of each latent's activations at each layer."""

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from sae_lens_multilayer.analysis.active import sums_device
from sae_lens_multilayer.analysis.batch import TokenBatch
from sae_lens_multilayer.analysis.stream import single_analysis
from sae_lens_multilayer.analysis.tables import make_table
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.sae.views import hook_names_of

N_BINS = 16
"""Even, as two neighbouring bins become one when larger activations come."""
_FIRST_EXPONENT = -40


@dataclass
class ActHistograms(Result):
    """Numbers of activations in bins of equal width, by latent and layer.

    Bin b of latent j holds activations in `[b, b + 1) * width[j]`. The width is the
    smallest power of 2 (from 2^-40) for which all activations of the latent are in the
    bins, so that between 8 and 16 of the bins are used.
    """

    hook_names: list[str]
    n_tokens: int
    widths: Float[Tensor, " d_sae"]
    """In units of the activations."""
    counts: Int[Tensor, "layer d_sae bin"]

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each latent, layer and bin that is not empty."""
        layer, latent, bin_ = self.counts.nonzero(as_tuple=True)
        return make_table(
            {
                "latent": latent,
                "layer": layer,
                "from": bin_ * self.widths[latent],
                "to": (bin_ + 1) * self.widths[latent],
                "count": self.counts[layer, latent, bin_],
            }
        )


class HistogramSums:
    """Adds up `ActHistograms` over tokens; memory: 64 bytes per layer and latent."""

    def __init__(self, sae: SAE[Any]) -> None:
        device, self._hook_names = sums_device(sae), hook_names_of(sae)
        self._n_tokens, d_sae = 0, sae.cfg.d_sae
        self._exponents = torch.full((d_sae,), _FIRST_EXPONENT, device=device)
        shape = len(self._hook_names), d_sae, N_BINS
        self._counts = torch.zeros(shape, dtype=torch.int32, device=device)

    def update(self, batch: TokenBatch) -> None:
        active = batch.active
        self._n_tokens += active.n_tokens
        # `value = m * 2^e` with m in [0.5, 1) is below `N_BINS * 2^(e - 4)`.
        exponents = torch.frexp(active.value).exponent.long() - (
            N_BINS.bit_length() - 1
        )
        self._widen(self._exponents.scatter_reduce(0, active.latent, exponents, "amax"))
        shift = -self._exponents[active.latent]
        bin_ = torch.ldexp(active.value, shift).long()
        ones = torch.ones_like(bin_, dtype=torch.int32)
        self._counts.view(-1).index_add_(0, active.cell * N_BINS + bin_, ones)

    def _widen(self, exponents: Int[Tensor, " d_sae"]) -> None:
        """Join neighbouring bins of latents whose exponent increases."""
        grown = (exponents > self._exponents).nonzero().squeeze(1)
        shift = (exponents - self._exponents)[grown].clamp(max=N_BINS)
        bins = torch.arange(N_BINS, device=shift.device) >> shift.unsqueeze(1)
        before = self._counts[:, grown]
        after = torch.zeros_like(before)
        after.scatter_add_(2, bins.expand_as(before), before)
        self._counts[:, grown] = after
        self._exponents = exponents

    def compute(self) -> ActHistograms:
        widths = torch.ldexp(torch.ones_like(self._exponents).double(), self._exponents)
        sums = (self._hook_names, self._n_tokens, widths, self._counts)
        return ActHistograms(*sums).on_cpu()


act_histograms = single_analysis(HistogramSums)
"""Histogram of each latent's activations at each layer."""
