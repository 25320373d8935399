"""How similar the residual stream is at different layers, and how long its vectors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from sae_lens_multilayer.analysis.stream import PassOptions, TokenBatch, TokenStream
from sae_lens_multilayer.hooks import layer_labels
from sae_lens_multilayer.lens.lens import LayerLens
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.text.prompts import Tokens
from sae_lens_multilayer.topk.tile import sum_dtype

_ELEMENTS = 2**22
"""Vector entries worked on at a time."""


@dataclass
class ResidualStream(Result):
    """Cosine similarities between layers and norms, over tokens.

    Cosine similarities are of vectors from which their layer's mean vector over all
    these tokens was subtracted, as in the paper; 0 where nothing is left of one. Norms
    are of the vectors themselves. All in raw space, or after the lens where one is
    named.
    """

    hook_names: list[str]
    n_tokens: int
    has_lens: bool
    """Whether the vectors went through a tuned lens."""
    cos_sim: Float[Tensor, "layer layer"]
    """Mean over tokens of the similarity of its vectors at two layers."""
    cos_sim_var: Float[Tensor, "layer layer"]
    """Its variance over tokens, with n - 1."""
    norm: Float[Tensor, " layer"]
    """Mean over tokens of the L2 norm."""
    norm_var: Float[Tensor, " layer"]
    """Its variance over tokens, with n - 1."""

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each layer: norms, and the similarity with the next layer.

        `_std` is the standard deviation over tokens and `_sem` the standard error of
        the mean. The last layer has no next one: NaN.
        """
        next_layer = {
            "next_cos_sim": self.cos_sim.diagonal(1),
            "next_cos_sim_std": self.cos_sim_var.diagonal(1).sqrt(),
        }
        table = pd.DataFrame(
            {"norm": self.norm.numpy(), "norm_std": self.norm_var.sqrt().numpy()}
            | {name: np.append(v.numpy(), np.nan) for name, v in next_layer.items()},
            index=pd.Index(self.hook_names, name="hook_name"),
        )
        for name in ("norm", "next_cos_sim"):
            table[f"{name}_sem"] = table[f"{name}_std"] / self.n_tokens**0.5
        return table

    def pairs_to_dataframe(self) -> pd.DataFrame:
        """The similarity of every two layers: a square table."""
        labels = layer_labels(self.hook_names)
        return pd.DataFrame(self.cos_sim.numpy(), index=labels, columns=labels)


class LayerMeans:
    """Adds up the mean vector of each layer."""

    def __init__(self, lens: LayerLens | None = None) -> None:
        """Start at no token.

        Args:
            lens: A lens that the vectors go through before.
        """
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
        """The means over all tokens so far, in float64."""
        assert self._sum is not None
        return self._sum / self._n_tokens


class ResidualSums:
    """Adds up `ResidualStream` over tokens, once the mean vectors are known."""

    def __init__(
        self,
        hook_names: Sequence[str],
        means: Float[Tensor, "layer d_in"],
        lens: LayerLens | None = None,
    ) -> None:
        """Start at no token.

        Args:
            hook_names: The hooks, in the order of the layer axis.
            means: Mean vector of each layer, after the lens.
            lens: A lens that the vectors go through before.
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
            raise ValueError(
                "Similarities of centred vectors need at least two tokens; got "
                f"{self._n_tokens}."
            )
        if not self._norm.isfinite().all():
            bad = ~self._norm.isfinite().all(0)
            names = [n for n, b in zip(self._hook_names, bad, strict=True) if b]
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

    The model goes over the tokens twice: for the mean vectors, then for the rest. (The
    prompts of a store are kept in memory meanwhile.)

    Args:
        model: A model without SAEs attached; no SAE is needed.
        hook_names: The hooks to compare, as `sae.cfg.metadata.hook_names`.
        tokens: Prompts, or a store to take them from.
        lens: A tuned lens of the same hooks; its outputs are compared instead.
        options: See `PassOptions`.

    Raises:
        ValueError: As `analyze`; or if the lens is of other hooks, a vector is not
            finite or there is only one token.

    References:
        Lawson et al. (2025), arXiv:2409.04185, section 4.
    """
    if lens is not None and lens.hook_names != list(hook_names):
        raise ValueError(
            f"The lens must be of the hooks {list(hook_names)}; it is of "
            f"{lens.hook_names}. Choose them with `lens.select(hook_names)`."
        )
    stream = TokenStream(model, hook_names, tokens, repeatable=True, **options)
    (means,) = stream.run(LayerMeans(lens))
    return stream.run(ResidualSums(hook_names, means, lens))[0]


def _pieces(
    x: Float[Tensor, "token layer d_in"], lens: LayerLens | None
) -> Iterator[Float[Tensor, "piece layer d_in"]]:
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
