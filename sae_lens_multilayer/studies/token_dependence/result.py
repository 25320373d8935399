"""The result of the study of what the layer of a latent depends on."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_multilayer.analysis.nulls import NULL_TITLES
from sae_lens_multilayer.pictures.description import (
    Axis,
    Panel,
    Picture,
    Series,
    layer_axis,
)
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.studies.intervals import QUANTILES, interval, intervals

_LEAST_TOKENS = 10


@dataclass
class TokenDependence(Result):
    """The layers of latents as a mean of each latent and a shift of each token.

    `y[j,t] = E[L | j, t]` is fitted by `mu_j + tau_t + e`, weighted by activation, so
    that latents and tokens have the weights of `Variances`. The shift tau_t, in layers,
    is common to all latents of a token. A linear regression of tau_t on what is known
    of the token gives the share of its variance that each predictor explains.
    """

    hook_names: list[str]
    null: str
    """The null that was analysed, or ""."""
    n_latents: int
    """Latents that are active at any token."""
    predictor_names: list[str]
    prompts: Int[Tensor, " token"]
    positions: Int[Tensor, " token"]
    token_ids: Int[Tensor, " token"]
    weights: Float[Tensor, " token"]
    """Sum of the activations of all latents and layers."""
    token_means: Float[Tensor, " token"]
    """`E[L | t]`: mean layer of all activation of a token."""
    shifts: Float[Tensor, " token"]
    """tau_t; the weighted mean is 0."""
    half_shifts: Float[Tensor, "2 token"]
    """tau_t from either half of the latents."""
    squares: Float[Tensor, "3 token"]
    """Sum over latents of `w (y - mean of the latent)^2`: of y, after subtracting
    tau_t, and after subtracting tau_t of the half without the latent."""
    predictors: Float[Tensor, "predictor token"]
    """See `TokenPredictors`; identities are mean shifts of the other tokens with the
    same (previous) id. NaN for tokens that are left out of the regression: those
    without a previous token."""
    shares: Float[Tensor, " predictor"]
    """Share of `Var(tau)` (LMG); the sum is the R^2 of all predictors."""
    resampled_shares: Float[Tensor, "resample predictor"]
    """Shares with resampled prompts; identities keep their values."""
    permuted_shares: Float[Tensor, "resample predictor"]
    """Shares after permuting tau within prompts."""

    @property
    def r2_cross_validated(self) -> float:
        """Share of `E_J[Var_T(E[L | J, T])]` that the shift from the other half of the
        latents explains; below 0 if the shift predicts worse than no shift."""
        return float(_metrics(self._prompt_sums().sum(0))["r2_cross_validated"])

    @property
    def summary(self) -> pd.DataFrame:
        """Value and 95% interval (resampled prompts) of each number.

        `between_tokens` is `E_J[Var_T(E[L | J, T])]` in layers squared, which a shift
        can explain; `shift` is the variance of tau, `token_mean` that of `E[L | T]`.
        `composition` is the correlation of tau with the mean mu of the token's latents.
        `r2` is the share of `between_tokens` that tau explains, `r2_cross_validated`
        that of the tau of the other half of the latents, and `r2_without_noise` the
        covariance of both halves' tau over `between_tokens`, with errors that are
        independent. `reliability` is the halves' correlation, and `r2_predictors` the
        share of `Var(tau)` that the predictors explain together. Intervals do not
        include the uncertainty of the means of latents.
        """
        table = intervals(self._prompt_sums(), _metrics)
        low, high = interval(self.resampled_shares.sum(1).numpy())
        table.loc["r2_predictors"] = [self.shares.sum().item(), low, high]
        return table

    def _prompt_sums(self) -> Float[np.ndarray, "prompt 14"]:
        """Sums over the tokens of each prompt, for `_metrics`."""
        weight, shift = self.weights.numpy(), self.shifts.numpy()
        first, second = self.half_shifts.numpy()
        mean = self.token_means.numpy() - shift
        columns = [*self.squares.numpy(), weight]
        for a, b in ((first, second), (shift, mean)):
            columns += [weight * v for v in (a, b, a * a, b * b, a * b)]
        _, prompt = np.unique(self.prompts.numpy(), return_inverse=True)
        return np.stack([np.bincount(prompt, c) for c in columns], axis=1)

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each predictor, the largest share first.

        `share` of the variance of the shifts, its 95% interval `low` to `high`, the
        mean `by_chance` over permutations within prompts, and `p`, the part of the
        permutations with at least this share (one is added to both counts).
        """
        low, high = np.quantile(self.resampled_shares.numpy(), QUANTILES, axis=0)
        permuted = self.permuted_shares
        n_above = (permuted >= self.shares).sum(0)
        columns = {
            "share": self.shares,
            "low": low,
            "high": high,
            "by_chance": permuted.mean(0),
            "p": (1 + n_above) / (1 + len(permuted)),
        }
        index = pd.Index(self.predictor_names, name="predictor")
        table = pd.DataFrame({n: np.asarray(c) for n, c in columns.items()}, index)
        return table.sort_values("share", ascending=False)

    def token_table(self) -> pd.DataFrame:
        """One row for each token: its shift and predictors."""
        columns = {
            "prompt": self.prompts,
            "position": self.positions,
            "token_id": self.token_ids,
            "weight": self.weights,
            "shift": self.shifts,
        }
        table = pd.DataFrame({n: c.numpy() for n, c in columns.items()})
        predictors = zip(self.predictor_names, self.predictors.numpy(), strict=True)
        return table.assign(**{f"x_{name}": values for name, values in predictors})

    def numbers(self) -> dict[str, float]:
        return {"shared_shift_r2": self.r2_cross_validated}

    def pictures(self, **context: Any) -> dict[str, Picture]:
        summary = self.summary
        row = summary.loc["r2_cross_validated"]
        caption = (
            f"A shift of each token, fitted to half of the {self.n_latents:,} latents, "
            f"explains {row.value:.1%} [{row.low:.1%}, {row.high:.1%}] of the variance "
            "between tokens of the other half's layers. The predictors explain "
            f"{summary.value['r2_predictors']:.1%} of the variance of the shift."
        )
        panels = [self._share_panel(), self._position_panel()]
        if "settle_layer" in self.predictor_names:
            panels.append(self._settle_panel())
        title = f"What the layer depends on{NULL_TITLES[self.null]}"
        return {"": Picture(title, panels, caption)}

    def _share_panel(self) -> Panel:
        table = self.to_dataframe()
        share, low, high, by_chance = table.to_numpy().T[:4]
        names, x = [n.replace("_", " ") for n in table.index], range(len(table))
        return Panel(
            Axis("predictor", names),
            Axis("share of the shift's variance", include_zero=True),
            [
                Series("share", x, share, "bars"),
                Series("95% interval", x, low, "intervals", high),
                Series("by chance", x, by_chance, "points"),
            ],
        )

    def _position_panel(self) -> Panel:
        last = int(self.positions.max())
        edges = np.unique(np.geomspace(1, last + 2, 13).astype(int))
        position = self.positions.numpy()
        bins = np.digitize(position + 1, edges)
        means = {b: position[bins == b].mean() for b in np.unique(bins)}
        middle = np.array([means[b] for b in bins])
        return Panel(
            Axis("position in the prompt"), Axis("shift (layers)"), self._means(middle)
        )

    def _settle_panel(self) -> Panel:
        settled = self.predictors[self.predictor_names.index("settle_layer")]
        label = "layer from which the most likely next token stays"
        layers = layer_axis(self.hook_names, label)
        return Panel(layers, Axis("shift (layers)"), self._means(settled.numpy()))

    def _means(self, x: Float[np.ndarray, " token"]) -> list[Series]:
        """Mean shift at each x with at least `_LEAST_TOKENS`, with an error band."""
        values, counts = np.unique(x[np.isfinite(x)], return_counts=True)
        enough = values[counts >= min(_LEAST_TOKENS, counts.max())]
        shifts = [self.shifts.numpy()[x == value] for value in enough]
        mean = np.array([s.mean() for s in shifts])
        error = np.array([2 * s.std() / len(s) ** 0.5 for s in shifts])
        band = Series("± 2 standard errors", enough, mean - error, "band", mean + error)
        band.colour = 0
        return [band, Series("mean", enough, mean, colour=0)]


def _metrics(sums: Float[np.ndarray, "*resample 14"]) -> dict[str, Any]:
    """The numbers of the `summary`, from sums over prompts."""
    between, left, left_of_halves, weight = np.moveaxis(sums[..., :4], -1, 0)
    halves, own = sums[..., 4:9], sums[..., 9:]
    (first, second, both), (shift, mean, product) = (
        _covariance(np.moveaxis(part, -1, 0) / weight) for part in (halves, own)
    )
    return {
        "between_tokens": between / weight,
        "shift": shift,
        "token_mean": shift + mean + 2 * product,
        "composition": product / np.sqrt(shift * mean),
        "r2": 1 - left / between,
        "r2_cross_validated": 1 - left_of_halves / between,
        "r2_without_noise": both * weight / between,
        "reliability": both / np.sqrt(first * second),
    }


def _covariance(means: np.ndarray) -> tuple[Any, ...]:
    """Variances of a and b and their covariance, from means of a, b, a^2, b^2, a b."""
    a, b, aa, bb, ab = means
    return aa - a * a, bb - b * b, ab - a * b
