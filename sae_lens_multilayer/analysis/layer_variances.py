"""Decomposes the variance over layers into parts within tokens and within latents."""

import sys
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from sae_lens_multilayer.analysis.active import ActiveLatents, sums_device
from sae_lens_multilayer.analysis.batch import TokenBatch
from sae_lens_multilayer.analysis.stream import single_analysis
from sae_lens_multilayer.analysis.tables import (
    layer_mean,
    layer_variance,
    make_table,
    raw_layer_variance,
)
from sae_lens_multilayer.pictures.description import Axis, Panel, Picture, Series
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.sae.views import hook_names_of

_COLUMNS = (
    "n_tokens",
    "var_l",
    "exp_var_l_j",
    "exp_var_l_jt",
    "reference_var_l",
    "reference_exp_var_l_f",
    "reference_exp_var_l_tf",
    "reference_rel_var_f",
    "reference_rel_var_t",
)


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
        names = ("mean_layer", "var_layer", "within_token", "between_tokens")
        columns = {"total": self.total_acts, **{n: getattr(self, n) for n in names}}
        columns["token_ratio"] = self.within_token / self.var_layer
        return make_table(columns, "latent")

    def numbers(self) -> dict[str, float]:
        return dict(self.summary[["latent_ratio", "token_ratio"]])

    def pictures(self, **context: Any) -> dict[str, Picture]:
        history, summary = self.history, self.summary

        def line(column: str, label: str, colour: int, style: int = 0) -> Series:
            x, y = history.n_tokens.to_numpy(), history[column].to_numpy()
            return Series(label, x, y, colour=colour, style=style)

        parts = [
            line("var_l", "Var(L): all", 0),
            line("exp_var_l_j", "E[Var(L | J)]: of a latent", 1),
            line("exp_var_l_jt", "E[Var(L | J, T)]: of a latent at a token", 2),
        ]
        ratios = [
            line("latent_ratio", "of a latent / all", 0),
            line("token_ratio", "at a token / of a latent", 1),
            line("reference_rel_var_f", "of a latent / all (paper)", 0, 1),
            line("reference_rel_var_t", "at a token / of a latent (paper)", 1, 1),
        ]
        caption = (
            f"Of the variance over layers of all activation, {summary.latent_ratio:.1%}"
            f" is within latents; of that, {summary.token_ratio:.1%} is within single "
            "tokens. The paper's code estimates these ratios differently."
        )
        tokens = Axis("tokens seen", log=True)
        panels = [
            Panel(tokens, Axis("variance (layers squared)", include_zero=True), parts),
            Panel(tokens, Axis("ratio of variances", include_zero=True), ratios),
        ]
        title = "Variance of the layer of an activation"
        return {"": Picture(title, panels, caption)}


class VarianceSums:
    """Adds up `Variances` over tokens; a batch holds all layers of a token.

    Args:
        reference_batch_tokens: The reference estimates are means over batches of this
            many tokens, as in the paper's code, without an incomplete last batch unless
            it is the only one. None: one estimate from all tokens.
    """

    def __init__(
        self, sae: SAE[Any], reference_batch_tokens: int | None = None
    ) -> None:
        self._hook_names = hook_names_of(sae)
        n_layers = len(self._hook_names)
        self._middle = (n_layers - 1) / 2
        self._n_tokens = 0
        sums = torch.zeros(n_layers + 2, sae.cfg.d_sae, dtype=torch.float64)
        sums = sums.to(sums_device(sae))
        # Of activations; of each token's activation times its variance over layers; and
        # times the square of its mean layer, which is relative to the middle layer to
        # limit cancellation.
        self._totals, self._spread, self._square = sums[:-2], sums[-2], sums[-1]
        self._reference = _ReferenceSums(self._totals, reference_batch_tokens)
        self._points: list[list[float]] = []

    def update(self, batch: TokenBatch) -> None:
        start, n_tokens = 0, len(batch.x)
        while start < n_tokens:
            n_until_point = 2 ** self._n_tokens.bit_length() - self._n_tokens
            n = min(n_until_point, self._reference.n_tokens_left, n_tokens - start)
            self._add(batch.active.of_tokens(start, start + n))
            if n == n_until_point:
                self._points.append(self._point())
            start += n

    def compute(self) -> Variances:
        if not self._totals.any():
            raise ValueError(
                f"No latent was active at any of the {self._n_tokens} tokens, so "
                "there is no variance over layers. Check the SAE, or give other tokens."
            )
        points = list(self._points)
        if not points or points[-1][0] != self._n_tokens:
            points.append(self._point())
        history = torch.tensor(points, dtype=torch.float64)
        by_latent = [tensor.cpu() for tensor in self._by_latent()]
        return Variances(self._hook_names, *by_latent, points=history)

    def _add(self, active: ActiveLatents) -> None:
        pairs = active.by_token
        mean = pairs.mean_layer - self._middle
        self._n_tokens += active.n_tokens
        self._totals.view(-1).index_add_(0, active.cell, active.value)
        self._spread.index_add_(0, pairs.latent, pairs.spread)
        self._square.index_add_(0, pairs.latent, pairs.total * mean.square())
        self._reference.add(active)

    def _by_latent(self) -> tuple[Tensor, ...]:
        """Total, mean layer and variances of each latent, as in `Variances`."""
        total = self._totals.sum(0)
        probs = self._totals / total
        mean = layer_mean(probs)
        between = self._square / total - (mean - self._middle).square()
        within = self._spread / total
        return total, mean, layer_variance(probs), within, between.clamp(min=0)

    def _point(self) -> list[float]:
        """The values of `_COLUMNS`."""
        total, _, var_layer, within, _ = self._by_latent()
        weight = total / total.sum()
        var_l = layer_variance(self._totals.sum(1) / total.sum())
        # The variances are NaN for latents that are never active, whose weight is 0.
        means = [(weight * v.nan_to_num()).sum() for v in (var_layer, within)]
        exact: list[float] = torch.stack([var_l, *means]).tolist()
        return [float(self._n_tokens), *exact, *self._reference.mean()]


class _ReferenceSums:
    """Sums over tokens for the estimates of the paper's code.

    References:
        `mlsae/analysis/variances.py` of github.com/tim-lawson/mlsae.
    """

    def __init__(self, like: Tensor, batch_tokens: int | None) -> None:
        self._batch_tokens = batch_tokens or sys.maxsize
        self._probs, self._within = torch.zeros_like(like), torch.zeros_like(like[0])
        self._estimates = torch.zeros(5, dtype=torch.float64)
        self.n_tokens_left, self._n_batches = self._batch_tokens, 0

    def add(self, active: ActiveLatents) -> None:
        pairs = active.by_token
        probs = active.value / pairs.total[pairs.pair]
        self._probs.view(-1).index_add_(0, active.cell, probs)
        self._within.index_add_(0, pairs.latent, pairs.spread / pairs.total)
        self.n_tokens_left -= active.n_tokens
        if self.n_tokens_left == 0:
            self._estimates += self._estimate()
            self._n_batches += 1
            self.n_tokens_left = self._batch_tokens
            self._probs.zero_()
            self._within.zero_()

    def _estimate(self) -> Float[Tensor, "5"]:
        n_tokens = self._batch_tokens - self.n_tokens_left
        probs = self._probs / n_tokens
        var_l = raw_layer_variance(probs.mean(1))
        exp_var_l_f = raw_layer_variance(probs).mean()
        exp_var_l_tf = self._within.mean() / n_tokens
        ratios = exp_var_l_f / var_l, exp_var_l_tf / exp_var_l_f
        return torch.stack([var_l, exp_var_l_f, exp_var_l_tf, *ratios]).cpu()

    def mean(self) -> list[float]:
        """The columns of `history` that begin with `reference_`."""
        n = self._n_batches
        return (self._estimates / n if n else self._estimate()).tolist()


variances = single_analysis(VarianceSums)
"""The variance over layers within a token, within a latent and in total."""
