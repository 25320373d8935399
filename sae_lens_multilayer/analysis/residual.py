"""Cosine similarities between layers of the residual stream, and norms by layer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from sae_lens_multilayer.analysis.stream import (
    PassOptions,
    TokenBatch,
    TokenStream,
)
from sae_lens_multilayer.analysis.tables import make_table
from sae_lens_multilayer.hooks import layer_labels
from sae_lens_multilayer.lens.lens import LayerLens
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.text.prompts import Tokens
from sae_lens_multilayer.topk.tile import sum_dtype

_ELEMENTS = 2**22
"""Vector entries processed at a time."""


@dataclass
class ResidualStream(Result):
    """Cosine similarities between layers and norms, over tokens.

    Cosine similarities are between vectors minus their layer's mean vector over all
    tokens, as in the paper; 0 if a difference is 0. Norms are without this subtraction.
    All in raw space, or after the lens if `has_lens`.
    """

    hook_names: list[str]
    n_tokens: int
    has_lens: bool
    """Whether a tuned lens was applied to the vectors."""
    cos_sim: Float[Tensor, "layer layer"]
    """Mean over tokens."""
    cos_sim_var: Float[Tensor, "layer layer"]
    """Variance over tokens, with n - 1."""
    norm: Float[Tensor, " layer"]
    """Mean over tokens of the L2 norm."""
    norm_var: Float[Tensor, " layer"]
    """Variance over tokens, with n - 1."""

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

    def pairs_to_dataframe(self) -> pd.DataFrame:
        """`cos_sim` as a square table."""
        labels = layer_labels(self.hook_names)
        return pd.DataFrame(self.cos_sim.numpy(), index=labels, columns=labels)


class LayerMeans:
    """Adds up the mean vector of each layer, after the lens if there is one."""

    def __init__(self, lens: LayerLens | None = None) -> None:
        """Start without tokens."""
        self._lens = lens
        self._n_tokens = 0
        self._sum: Tensor | None = None

    def update(self, batch: TokenBatch) -> None:
        """Add a batch of tokens."""
        for x in _pieces(batch.x, self._lens):
            total = x.sum(0, dtype=sum_dtype(x.device)).cpu().double()
            self._sum = total if self._sum is None else self._sum + total
            self._n_tokens += len(x)

    def compute(self) -> Float[Tensor, "layer d_in"]:
        """The means over all tokens so far."""
        assert self._sum is not None
        return self._sum / self._n_tokens


class ResidualSums:
    """Adds up `ResidualStream` over tokens, given the mean vectors."""

    def __init__(
        self,
        hook_names: Sequence[str],
        means: Float[Tensor, "layer d_in"],
        lens: LayerLens | None = None,
    ) -> None:
        """Start without tokens.

        Args:
            hook_names: The hooks, in the order of the layer axis.
            means: From `LayerMeans` with the same lens.
        """
        self._hook_names, self._means, self._lens = list(hook_names), means, lens
        n = len(means)
        self._n_tokens = 0
        self._cos = torch.zeros(2, n, n, dtype=torch.float64)
        self._norm = torch.zeros(2, n, dtype=torch.float64)

    def update(self, batch: TokenBatch) -> None:
        """Add a batch of tokens."""
        for x in _pieces(batch.x, self._lens):
            norm = x.norm(dim=-1).cpu().double()
            centred = x - self._means.to(x.device, x.dtype)
            unit = torch.nn.functional.normalize(centred, dim=-1, eps=0.0).nan_to_num()
            cos = (unit @ unit.mT).cpu().double()
            self._n_tokens += len(x)
            self._norm += torch.stack([norm.sum(0), norm.square().sum(0)])
            self._cos += torch.stack([cos.sum(0), cos.square().sum(0)])

    def compute(self) -> ResidualStream:
        """The similarities and norms over all tokens so far.

        Raises:
            ValueError: If a vector was not finite, or there were fewer than two.
        """
        if self._n_tokens < 2:
            raise ValueError(f"Give at least two tokens; got {self._n_tokens}.")
        finite = self._norm.isfinite().all(0)
        if not finite.all():
            bad = (~finite).nonzero().flatten().tolist()
            names = [self._hook_names[layer] for layer in bad]
            raise ValueError(f"Vectors must be finite; they are not at {names}.")
        return ResidualStream(
            self._hook_names,
            self._n_tokens,
            self._lens is not None,
            *_mean_and_variance(self._cos, self._n_tokens),
            *_mean_and_variance(self._norm, self._n_tokens),
        )


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
        hook_names: The hooks to compare, as `sae.cfg.metadata.hook_names`.
        tokens: Prompts, or a store that provides them.
        lens: A tuned lens of the same hooks, applied to the vectors first.
        options: See `PassOptions`.

    Raises:
        ValueError: As `analyze`, or if the lens has other hooks, a vector is not finite
            or there is only one token.

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
        piece = piece.to(torch.promote_types(piece.dtype, torch.float32))
        if lens is not None:
            piece = lens.transform(piece.to(next(lens.buffers(), x).device))
        yield piece


def _mean_and_variance(
    sums: Float[Tensor, "2 layer ..."], n: int
) -> tuple[Float[Tensor, "layer ..."], Float[Tensor, "layer ..."]]:
    mean = sums[0] / n
    variance = (sums[1] - sums[0].square() / n) / (n - 1)
    return mean, variance.clamp(min=0)
