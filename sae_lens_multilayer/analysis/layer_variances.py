"""Decomposes the variance over layers into parts within tokens and within latents."""

import sys
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor
from typing_extensions import Unpack

from sae_lens_multilayer.analysis.active import ActiveLatents, sums_device
from sae_lens_multilayer.analysis.stream import PassOptions, TokenBatch, analyze
from sae_lens_multilayer.analysis.tables import (
    layer_index,
    layer_mean,
    layer_variance,
    make_table,
)
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.sae.views import hook_names_of
from sae_lens_multilayer.text.prompts import Tokens

_COLUMNS = [
    "n_tokens",
    "var_l",
    "exp_var_l_j",
    "exp_var_l_jt",
    "reference_var_l",
    "reference_exp_var_l_f",
    "reference_exp_var_l_tf",
    "reference_rel_var_f",
    "reference_rel_var_t",
]


@dataclass
class Variances(Result):
    """The law of total variance of the layer L of an activation, in layers squared.

    An activation of latent J at token T and layer L is drawn with a probability
    proportional to its size, over all tokens:

        Var(L | j) = E_T[Var(L | j, T)] + Var_T(E[L | j, T])
        Var(L)     = E_J[Var(L | J)]    + Var_J(E[L | J])

    Tokens are weighted by their share of the latent's activation, latents by their
    share of all activation, so both laws hold exactly.

    References:
        Lawson et al. (2025), arXiv:2409.04185, section 4.
    """

    hook_names: list[str]
    total_acts: Float[Tensor, " d_sae"]
    """Sum of each latent's activations."""
    mean_layer: Float[Tensor, " d_sae"]
    """`E[L | j]`; NaN, like the variances, for a latent that is never active."""
    var_layer: Float[Tensor, " d_sae"]
    """`Var(L | j)`."""
    within_token: Float[Tensor, " d_sae"]
    """`E_T[Var(L | j, T)]`."""
    between_tokens: Float[Tensor, " d_sae"]
    """`Var_T(E[L | j, T])`."""
    points: Float[Tensor, "point column"]
    """The columns of `history` without the ratios of the exact variances."""

    @property
    def history(self) -> pd.DataFrame:
        """The variances over all latents after 1, 2, 4, ... and all tokens.

        `var_l`, `exp_var_l_j` and `exp_var_l_jt` are `Var(L)`, `E[Var(L | J)]` and
        `E[Var(L | J, T)]`. `latent_ratio` is the second over the first: 1 if all
        latents have the same mean layer, 0 if each is active at one layer only.
        `token_ratio` is the third over the second: 1 if a latent's layers are the same
        at all tokens, 0 if it is active at one layer of each token. A ratio is NaN if
        its divisor is 0.

        `reference_var_l`, `reference_exp_var_l_f`, `reference_exp_var_l_tf` and their
        ratios `reference_rel_var_f`, `reference_rel_var_t` are the estimates of the
        paper's code, from means of `P(l | j, t)` over all tokens and latents, with
        `P = 0` without activation; these do not sum to 1, and the law does not hold.
        """
        table = pd.DataFrame(self.points.numpy(), columns=pd.Index(_COLUMNS))
        table.insert(4, "latent_ratio", table.exp_var_l_j / table.var_l)
        table.insert(5, "token_ratio", table.exp_var_l_jt / table.exp_var_l_j)
        return table.astype({"n_tokens": int})

    @property
    def summary(self) -> pd.Series:
        """The last row of `history`: all tokens."""
        return self.history.iloc[-1]

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each latent; `token_ratio` is `within_token / var_layer`."""
        columns = {
            "total": self.total_acts,
            "mean_layer": self.mean_layer,
            "var_layer": self.var_layer,
            "within_token": self.within_token,
            "between_tokens": self.between_tokens,
            "token_ratio": self.within_token / self.var_layer,
        }
        return make_table(columns, "latent")


class VarianceSums:
    """Adds up `Variances` over tokens.

    A batch holds all layers of a token, so sums over tokens are enough.
    """

    def __init__(
        self, sae: SAE[Any], reference_batch_tokens: int | None = None
    ) -> None:
        """Start without tokens.

        Args:
            sae: The SAE that will be analysed.
            reference_batch_tokens: The reference estimates are means over batches of
                this many tokens, as in the paper's code, without an incomplete last
                batch unless it is the only one. None: one estimate from all tokens.
        """
        self._hook_names = hook_names_of(sae)
        n_layers = len(self._hook_names)
        self._exact = _ExactSums.zeros(n_layers, sae.cfg.d_sae, sums_device(sae))
        self._reference = _ReferenceSums(self._exact, reference_batch_tokens)
        self._points: list[list[float]] = []

    def update(self, batch: TokenBatch) -> None:
        """Add a batch of tokens."""
        start, n_tokens = 0, len(batch.x)
        while start < n_tokens:
            seen = self._exact.n_tokens
            n_until_point = 2 ** seen.bit_length() - seen
            n = min(n_until_point, self._reference.n_tokens_left, n_tokens - start)
            part = batch.active.of_tokens(start, start + n)
            self._exact.add(part)
            self._reference.add(part)
            if n == n_until_point:
                self._points.append(self._point())
            start += n

    def _point(self) -> list[float]:
        exact, reference = self._exact.aggregate(), self._reference.aggregate()
        return [float(self._exact.n_tokens), *exact, *reference]

    def compute(self) -> Variances:
        """The variances over all tokens so far.

        Raises:
            ValueError: If no latent was active at any of them.
        """
        if not self._exact.totals.any():
            raise ValueError(
                f"No latent was active at any of the {self._exact.n_tokens} tokens, so "
                "there is no variance over layers. Check the SAE, or give other tokens."
            )
        total, mean_layer, var_layer, within, between = (
            tensor.cpu() for tensor in self._exact.by_latent()
        )
        points = list(self._points)
        if not points or points[-1][0] != self._exact.n_tokens:
            points.append(self._point())
        return Variances(
            self._hook_names,
            total,
            mean_layer,
            var_layer,
            within,
            between,
            torch.tensor(points, dtype=torch.float64),
        )


def variances(
    sae: SAE[Any],
    model: Any,
    tokens: Tokens,
    *,
    reference_batch_tokens: int | None = None,
    **options: Unpack[PassOptions],
) -> Variances:
    """The variance over layers within a token, within a latent and in total.

    Args:
        reference_batch_tokens: See `VarianceSums`.
    """
    sums = VarianceSums(sae, reference_batch_tokens)
    return analyze(sae, model, tokens, sums, **options)[0]


@dataclass
class _ExactSums:
    """Sums over tokens for the exact decomposition."""

    n_tokens: int
    totals: Float[Tensor, "layer d_sae"]
    """Activations."""
    spread: Float[Tensor, " d_sae"]
    """Each token's activation times its variance over layers."""
    square: Float[Tensor, " d_sae"]
    """Each token's activation times the square of its mean layer, which is relative to
    the middle layer to limit cancellation."""

    @classmethod
    def zeros(cls, n_layers: int, d_sae: int, device: torch.device) -> "_ExactSums":
        zeros = torch.zeros(n_layers + 2, d_sae, dtype=torch.float64, device=device)
        return cls(0, zeros[:-2], zeros[-2], zeros[-1])

    def add(self, active: ActiveLatents) -> None:
        pairs = active.by_token
        mean = pairs.mean_layer - self._middle
        self.n_tokens += active.n_tokens
        self.totals.view(-1).index_add_(0, active.cell, active.value)
        self.spread.index_add_(0, pairs.latent, pairs.spread)
        self.square.index_add_(0, pairs.latent, pairs.total * mean.square())

    @property
    def _middle(self) -> float:
        return (len(self.totals) - 1) / 2

    def by_latent(self) -> tuple[Tensor, ...]:
        """Total, mean layer and variances of each latent, as in `Variances`."""
        total = self.totals.sum(0)
        probs = self.totals / total
        mean = layer_mean(probs)
        between = self.square / total - (mean - self._middle).square()
        within = self.spread / total
        return total, mean, layer_variance(probs), within, between.clamp(min=0)

    def aggregate(self) -> list[float]:
        """The columns of `history` before the ratios."""
        total, _, var_layer, within, _ = self.by_latent()
        weight = total / total.sum()
        var_l = layer_variance(self.totals.sum(1) / total.sum())
        # The variances are NaN for latents that are never active, whose weight is 0.
        means = [(weight * v.nan_to_num()).sum() for v in (var_layer, within)]
        return torch.stack([var_l, *means]).tolist()


class _ReferenceSums:
    """Sums over tokens for the estimates of the paper's code.

    References:
        `mlsae/analysis/variances.py` of github.com/tim-lawson/mlsae.
    """

    def __init__(self, like: _ExactSums, batch_tokens: int | None) -> None:
        self._batch_tokens = batch_tokens
        self._probs = torch.zeros_like(like.totals)
        self._within = torch.zeros_like(like.spread)
        self._n_tokens = 0
        self._estimates = torch.zeros(5, dtype=torch.float64)
        self._n_batches = 0

    @property
    def n_tokens_left(self) -> int:
        """Tokens until the batch is full."""
        return (self._batch_tokens or sys.maxsize) - self._n_tokens

    def add(self, active: ActiveLatents) -> None:
        pairs = active.by_token
        probs = active.value / pairs.total[pairs.pair]
        self._probs.view(-1).index_add_(0, active.cell, probs)
        self._within.index_add_(0, pairs.latent, pairs.spread / pairs.total)
        self._n_tokens += active.n_tokens
        if self._n_tokens == self._batch_tokens:
            self._estimates += self._estimate()
            self._n_batches += 1
            self._n_tokens = 0
            self._probs.zero_()
            self._within.zero_()

    def _estimate(self) -> Float[Tensor, "5"]:
        probs = self._probs / self._n_tokens
        var_l = _reference_variance(probs.mean(1))
        exp_var_l_f = _reference_variance(probs).mean()
        exp_var_l_tf = self._within.mean() / self._n_tokens
        ratios = exp_var_l_f / var_l, exp_var_l_tf / exp_var_l_f
        return torch.stack([var_l, exp_var_l_f, exp_var_l_tf, *ratios]).cpu()

    def aggregate(self) -> list[float]:
        """The columns of `history` that begin with `reference_`."""
        if self._n_batches:
            return (self._estimates / self._n_batches).tolist()
        return self._estimate().tolist()


def _reference_variance(
    weights: Float[Tensor, "layer ..."],
) -> Float[Tensor, "..."]:
    """`sum_l l^2 w_l - (sum_l l w_l)^2`, whatever the sum of the weights."""
    return layer_mean(weights * layer_index(weights)) - layer_mean(weights).square()
