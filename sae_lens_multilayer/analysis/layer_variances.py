"""How much of the variance over layers is within a token, within a latent, in all."""

import sys
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor
from typing_extensions import Unpack

from sae_lens_multilayer.analysis.active import ActiveLatents, sums_device
from sae_lens_multilayer.analysis.results import Result
from sae_lens_multilayer.analysis.stream import PassOptions, TokenBatch, analyze
from sae_lens_multilayer.sae.views import hook_names_of

EXACT = ("var_l", "exp_var_l_j", "exp_var_l_jt")
REFERENCE = ("reference_var_l", "reference_exp_var_l_f", "reference_exp_var_l_tf")
REFERENCE_RATIOS = ("reference_rel_var_f", "reference_rel_var_t")
COLUMNS = ("n_tokens", *EXACT, *REFERENCE, *REFERENCE_RATIOS)


@dataclass
class Variances(Result):
    """The law of total variance of the layer L of an activation, in layers squared.

    An activation of latent J at token T and layer L is drawn with a probability
    proportional to its size, over the tokens seen:

        Var(L | j) = E_T[Var(L | j, T)] + Var_T(E[L | j, T])
        Var(L)     = E_J[Var(L | J)]    + Var_J(E[L | J])

    so that tokens count by their share of the latent's activation, latents by their
    share of all activation, and both laws hold exactly.

    References:
        Design of this package, section 7; Lawson et al. (2025), arXiv:2409.04185,
        section 4.
    """

    hook_names: list[str]
    total_acts: Float[Tensor, " d_sae"]
    """Sum of each latent's activations."""
    mean_layer: Float[Tensor, " d_sae"]
    """`E[L | j]`; NaN, as all of the latent's variances, if it was never active."""
    var_layer: Float[Tensor, " d_sae"]
    """`Var(L | j)`, from the latent's distribution over layers."""
    within_token: Float[Tensor, " d_sae"]
    """`E_T[Var(L | j, T)]`."""
    between_tokens: Float[Tensor, " d_sae"]
    """`Var_T(E[L | j, T])`."""
    points: Float[Tensor, "point column"]
    """`history` without the names of its columns."""

    @property
    def history(self) -> pd.DataFrame:
        """The variances over all latents after 1, 2, 4, ... and all tokens.

        `var_l`, `exp_var_l_j` and `exp_var_l_jt` are `Var(L)`, `E[Var(L | J)]` and
        `E[Var(L | J, T)]`. `latent_ratio` is the second over the first: 1 if all
        latents have the same mean layer, 0 if each keeps to one layer. `token_ratio`
        is the third over the second: 1 if a latent's layers are the same for all
        tokens, 0 if it is active at one layer of each token. Where the divisor is 0, a
        ratio has no value and is NaN.

        `reference_var_l`, `reference_exp_var_l_f`, `reference_exp_var_l_tf` and their
        ratios `reference_rel_var_f`, `reference_rel_var_t` are the estimates of the
        paper's code. These are means of `P(l | j, t)` over all tokens and latents,
        where those without activation have `P = 0`; they do not sum to 1, and the law
        does not hold.
        """
        table = pd.DataFrame(self.points.numpy(), columns=pd.Index(COLUMNS))
        table.insert(4, "latent_ratio", table.exp_var_l_j / table.var_l)
        table.insert(5, "token_ratio", table.exp_var_l_jt / table.exp_var_l_j)
        return table.astype({"n_tokens": int})

    @property
    def summary(self) -> pd.Series:
        """The last row of `history`: all tokens."""
        return self.history.iloc[-1]

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each latent; `token_ratio` is within_token over var_layer."""
        table = pd.DataFrame(
            {
                "total": self.total_acts.numpy(),
                "mean_layer": self.mean_layer.numpy(),
                "var_layer": self.var_layer.numpy(),
                "within_token": self.within_token.numpy(),
                "between_tokens": self.between_tokens.numpy(),
                "token_ratio": (self.within_token / self.var_layer).numpy(),
            }
        )
        return table.rename_axis("latent")


class VarianceSums:
    """Adds up `Variances` over tokens.

    All layers of a token come together, so its own variance is complete at once and
    sums are enough.
    """

    def __init__(
        self, sae: SAE[Any], reference_batch_tokens: int | None = None
    ) -> None:
        """Start at no token.

        Args:
            sae: The SAE that will be analysed.
            reference_batch_tokens: The paper's code takes its estimates from batches of
                this many tokens and averages them; tokens after the last whole batch
                are left out of its estimates, if there was one. None: one estimate from
                all tokens.

        Raises:
            ValueError: If a batch would have no token.
        """
        if reference_batch_tokens is not None and reference_batch_tokens < 1:
            raise ValueError(
                "`reference_batch_tokens` must be at least 1, or None for one batch of "
                f"all tokens; got {reference_batch_tokens}."
            )
        self._hook_names = hook_names_of(sae)
        n_layers = len(self._hook_names)
        self._exact = _ExactSums.zeros(n_layers, sae.cfg.d_sae, sums_device(sae))
        self._reference = _ReferenceSums(self._exact, reference_batch_tokens)
        self._points: list[list[float]] = []

    def update(self, batch: TokenBatch) -> None:
        """Add a batch of tokens."""
        start, n_tokens = 0, len(batch.x)
        while start < n_tokens:
            n_until_point = (
                2 ** self._exact.n_tokens.bit_length() - self._exact.n_tokens
            )
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
    tokens: Int[Tensor, "prompt pos"] | ActivationsStore,
    *,
    reference_batch_tokens: int | None = None,
    **options: Unpack[PassOptions],
) -> Variances:
    """How much of the variance over layers is within a token and within a latent.

    Args:
        sae, model, tokens: As in `analyze`.
        reference_batch_tokens: See `VarianceSums`.
        options: See `PassOptions`.
    """
    sums = VarianceSums(sae, reference_batch_tokens)
    return analyze(sae, model, tokens, sums, **options)[0]


@dataclass
class _ExactSums:
    """What the exact decomposition needs of the tokens.

    Layers are counted from the middle of the axis, so that little cancels.
    """

    n_tokens: int
    totals: Float[Tensor, "layer d_sae"]
    """Activations."""
    spread: Float[Tensor, " d_sae"]
    """Each token's activation times its variance over layers."""
    square: Float[Tensor, " d_sae"]
    """Each token's activation times the square of its mean layer."""

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
        """Totals, mean layers and variances of each latent."""
        total = self.totals.sum(0)
        layers = torch.arange(len(self.totals)).to(self.totals).unsqueeze(1)
        mean = (self.totals * (layers - self._middle)).sum(0) / total
        deviation = (layers - self._middle - mean).square()
        between = (self.square / total - mean.square()).clamp(min=0)
        return (
            total,
            mean + self._middle,
            (self.totals * deviation).sum(0) / total,
            self.spread / total,
            between,
        )

    def aggregate(self) -> list[float]:
        """The columns `EXACT`."""
        total, _, var_layer, within, _ = self.by_latent()
        weight = total / total.sum()
        var_l = variance_over_layers(self.totals.sum(1) / total.sum())
        # Latents that are never active have no variance, and no weight.
        given_latent, given_both = (
            weight * v.nan_to_num() for v in (var_layer, within)
        )
        return torch.stack([var_l, given_latent.sum(), given_both.sum()]).tolist()


class _ReferenceSums:
    """What the estimator of the paper's code needs of the tokens.

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
        var_l = variance_over_layers(probs.mean(1))
        exp_var_l_f = variance_over_layers(probs).mean()
        exp_var_l_tf = self._within.mean() / self._n_tokens
        ratios = exp_var_l_f / var_l, exp_var_l_tf / exp_var_l_f
        return torch.stack([var_l, exp_var_l_f, exp_var_l_tf, *ratios]).cpu()

    def aggregate(self) -> list[float]:
        """The columns `REFERENCE` and `REFERENCE_RATIOS`."""
        if self._n_batches:
            return (self._estimates / self._n_batches).tolist()
        return self._estimate().tolist()


def variance_over_layers(
    weights: Float[Tensor, "layer ..."],
) -> Float[Tensor, "..."]:
    """`sum_l l^2 w_l - (sum_l l w_l)^2`: the variance if the weights sum to 1.

    Example:
        >>> variance_over_layers(torch.tensor([0.5, 0.0, 0.5]))
        tensor(1.)
    """
    layers = torch.arange(len(weights)).to(weights)
    layers = layers.view(-1, *[1] * (weights.ndim - 1))
    return (layers.square() * weights).sum(0) - (layers * weights).sum(0).square()
