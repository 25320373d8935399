"""Cosine similarities between layers of the residual stream, and norms by layer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from sae_lens_multilayer.analysis.batch import TokenBatch
from sae_lens_multilayer.analysis.stream import PassOptions, TokenStream
from sae_lens_multilayer.analysis.tables import make_table
from sae_lens_multilayer.lens.lens import LayerLens
from sae_lens_multilayer.pictures.description import (
    Heatmap,
    Panel,
    Picture,
    Series,
    layer_axis,
    layer_panel,
)
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.text.prompts import Tokens
from sae_lens_multilayer.topk.tile import sum_dtype, wide_dtype

_ELEMENTS = 2**22
"""Vector entries processed at a time."""


@dataclass
class ResidualStream(Result):
    """Cosine similarities between layers and norms, over tokens.

    Cosine similarities are between vectors minus their layer's mean vector over all
    tokens, as in the paper; 0 if a difference is 0. Norms are without this subtraction.
    All in raw space, or after the lens if `has_lens`. Variances are over tokens, with
    n - 1.
    """

    hook_names: list[str]
    n_tokens: int
    has_lens: bool
    """Whether a tuned lens was applied to the vectors."""
    cos_sim: Float[Tensor, "layer layer"]
    """Mean over tokens."""
    cos_sim_var: Float[Tensor, "layer layer"]
    norm: Float[Tensor, " layer"]
    """Mean over tokens of the L2 norm."""
    norm_var: Float[Tensor, " layer"]

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each layer: norm and similarity with the next layer.

        `_std` is the standard deviation over tokens, `_sem` the standard error of the
        mean. The similarity of the last layer is NaN.
        """
        no_next = self.cos_sim.new_full((1,), torch.nan)
        next_var = torch.cat([self.cos_sim_var.diagonal(1), no_next])
        columns = {
            "norm": self.norm,
            "norm_std": self.norm_var.sqrt(),
            "next_cos_sim": torch.cat([self.cos_sim.diagonal(1), no_next]),
            "next_cos_sim_std": next_var.sqrt(),
        }
        table = make_table(columns, pd.Index(self.hook_names, name="hook_name"))
        for name in ("norm", "next_cos_sim"):
            table[f"{name}_sem"] = table[f"{name}_std"] / self.n_tokens**0.5
        return table

    def pictures(self, **context: Any) -> dict[str, Picture]:
        norms = layer_panel(self.hook_names, "L2 norm", {"mean": self.norm.numpy()})
        mean, std = replace(norms.series[0], colour=0), self.norm_var.sqrt()
        low, high = (self.norm - std).clamp(min=0).numpy(), (self.norm + std).numpy()
        band = Series("± standard deviation", mean.x, low, "band", high, colour=0)
        norms.series = [band, mean]
        layers = layer_axis(self.hook_names)
        cos_sim = Heatmap(self.cos_sim.numpy(), "mean cosine similarity (centred)")
        space = " after the lens" if self.has_lens else ""
        picture = Picture(
            f"Residual stream{space}, {self.n_tokens:,} tokens",
            [Panel(layers, layers, heatmap=cos_sim), norms],
            "Similarity of the centred vectors of any two layers, and norms by layer.",
        )
        return {"": picture}


class LayerMeans:
    """Adds up the mean vector of each layer, after the lens if there is one."""

    def __init__(self, lens: LayerLens | None = None) -> None:
        self._lens = lens
        self._n_tokens, self._sum = 0, torch.zeros(())

    def update(self, batch: TokenBatch) -> None:
        for x in _pieces(batch.x, self._lens):
            total = x.sum(0, dtype=sum_dtype(x.device))
            self._sum = self._sum + total.cpu().double()
            self._n_tokens += len(x)

    def compute(self) -> Float[Tensor, "layer d_in"]:
        return self._sum / self._n_tokens


class ResidualSums:
    """Adds up `ResidualStream` over tokens, given `LayerMeans` with the same lens."""

    def __init__(
        self,
        hook_names: Sequence[str],
        means: Float[Tensor, "layer d_in"],
        lens: LayerLens | None = None,
    ) -> None:
        self._hook_names, self._means, self._lens = list(hook_names), means, lens
        n = len(means)
        self._n_tokens = 0
        self._cos = torch.zeros(2, n, n, dtype=torch.float64)
        self._norm = torch.zeros(2, n, dtype=torch.float64)

    def update(self, batch: TokenBatch) -> None:
        for x in _pieces(batch.x, self._lens):
            norm = x.norm(dim=-1).cpu().double()
            centred = x - self._means.to(x.device, x.dtype)
            unit = torch.nn.functional.normalize(centred, dim=-1, eps=0.0).nan_to_num()
            cos = (unit @ unit.mT).cpu().double()
            self._n_tokens += len(x)
            self._norm += torch.stack([norm.sum(0), norm.square().sum(0)])
            self._cos += torch.stack([cos.sum(0), cos.square().sum(0)])

    def compute(self) -> ResidualStream:
        if self._n_tokens < 2:
            raise ValueError(f"Give at least two tokens; got {self._n_tokens}.")
        if not (finite := self._norm.isfinite().all(0)).all():
            bad = (~finite).nonzero().flatten().tolist()
            names = [self._hook_names[layer] for layer in bad]
            raise ValueError(f"Vectors must be finite; they are not at {names}.")
        cos, norm = (_mean_and_var(s, self._n_tokens) for s in (self._cos, self._norm))
        has_lens = self._lens is not None
        return ResidualStream(self._hook_names, self._n_tokens, has_lens, *cos, *norm)


def residual_stream(
    model: Any,
    hook_names: Sequence[str],
    tokens: Tokens,
    *,
    lens: LayerLens | None = None,
    **options: Unpack[PassOptions],
) -> ResidualStream:
    """Cosine similarities between all layers, and norms by layer.

    The model runs on the tokens twice: first for the mean vectors, then for the rest.

    Args:
        model: A model without SAEs attached; no SAE is needed.
        lens: A tuned lens of the same hooks, applied to the vectors first.

    References:
        Lawson et al. (2025), arXiv:2409.04185, section 4.
    """
    if lens is not None and lens.hook_names != list(hook_names):
        raise ValueError(
            f"The lens must be of the hooks {list(hook_names)}; got "
            f"{lens.hook_names}. Use `lens.select(hook_names)`."
        )
    stream = TokenStream(model, hook_names, tokens, **options)
    (means,) = stream.run(LayerMeans(lens))
    return stream.run(ResidualSums(hook_names, means, lens))[0]


def _pieces(
    x: Float[Tensor, "token layer d_in"], lens: LayerLens | None
) -> Iterator[Float[Tensor, "piece layer d_in"]]:
    """Some tokens at a time, at least in float32, after the lens."""
    n_tokens = max(1, _ELEMENTS // x[0].numel())
    for piece in x.split(n_tokens):
        piece = piece.to(wide_dtype(piece.dtype))
        if lens is not None:
            piece = lens.transform(piece.to(next(lens.buffers(), x).device))
        yield piece


def _mean_and_var(sums: Float[Tensor, "2 layer ..."], n: int) -> tuple[Tensor, Tensor]:
    mean = sums[0] / n
    variance = (sums[1] - sums[0].square() / n) / (n - 1)
    return mean, variance.clamp(min=0)
