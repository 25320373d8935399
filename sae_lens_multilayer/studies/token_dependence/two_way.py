"""Fits `y = mu_j + tau_t + e` to pairs of a latent and a token."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_TOLERANCE = 1e-5
"""Change of a shift, in the units of y, below which the fit has converged."""
_MAX_STEPS = 1000


@dataclass
class Pairs:
    """A value and its weight for each pair of a token and a latent active there."""

    n_tokens: int
    n_latents: int
    token: Int[Tensor, " pair"]
    latent: Int[Tensor, " pair"]
    weight: Float[Tensor, " pair"]
    y: Float[Tensor, " pair"]

    def of(self, chosen: Bool[Tensor, " pair"]) -> "Pairs":
        """Some of the pairs, with the same indices."""
        parts = {
            n: getattr(self, n)[chosen] for n in ("token", "latent", "weight", "y")
        }
        return replace(self, **parts)

    @property
    def token_weight(self) -> Float[Tensor, " token"]:
        """Sum of the weights of each token."""
        return self.sum_by_token(torch.ones_like(self.y))

    def sum_by_token(self, values: Float[Tensor, " pair"]) -> Float[Tensor, " token"]:
        """Weighted sum of values over the latents of each token."""
        return self.token.bincount(self.weight * values, minlength=self.n_tokens)

    def latent_mean(self, values: Float[Tensor, " pair"]) -> Float[Tensor, " latent"]:
        """Weighted mean of values over the tokens of each latent; 0 without any."""
        sums, weights = (
            self.latent.bincount(w, minlength=self.n_latents)
            for w in (self.weight * values, self.weight)
        )
        return (sums / weights).nan_to_num()

    def squares(self, tau: Float[Tensor, " token"]) -> Float[Tensor, " token"]:
        """`sum_j w (y - tau_t - m_j)^2`, with m_j the latent's mean of `y - tau_t`."""
        left = self.y - tau[self.token]
        return self.sum_by_token((left - self.latent_mean(left)[self.latent]).square())


def shared_shift(pairs: Pairs) -> Float[Tensor, " token"]:
    """The tau of the least-squares fit of `y = mu_j + tau_t`, by alternating means.

    Its weighted mean over tokens is 0; tokens without pairs have 0. `mu_j` is
    `pairs.latent_mean(y - tau_t)`.
    """
    weight = pairs.token_weight
    tau = torch.zeros(pairs.n_tokens, dtype=torch.float64)
    for _ in range(_MAX_STEPS):
        mu = pairs.latent_mean(pairs.y - tau[pairs.token])
        sums = pairs.sum_by_token(pairs.y - mu[pairs.latent])
        new = (sums / weight).nan_to_num()
        new = torch.where(weight > 0, new - (new * weight).sum() / weight.sum(), 0.0)
        change = (new - tau).abs().max()
        tau = new
        if change < _TOLERANCE:
            break
    return tau


@dataclass
class HalvesFit:
    """Shifts from each half of the latents, which predict the other half."""

    shifts: Float[Tensor, "2 token"]
    """tau of either half."""
    total: Float[Tensor, " token"]
    """`sum_j w (y - m_j)^2` over all latents, m_j their means."""
    left: Float[Tensor, " token"]
    """The same after subtracting the shift from the half without the latent."""

    @classmethod
    def of(cls, pairs: Pairs, seed: int = 0) -> "HalvesFit":
        """Split the latents at random."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(pairs.n_latents, generator=generator)
        in_first = torch.zeros(pairs.n_latents, dtype=torch.bool)
        in_first[order[: pairs.n_latents // 2]] = True
        chosen = in_first[pairs.latent]
        halves = pairs.of(chosen), pairs.of(~chosen)
        first, second = map(shared_shift, halves)
        return cls(
            torch.stack([first, second]),
            pairs.squares(torch.zeros_like(first)),
            halves[0].squares(second) + halves[1].squares(first),
        )
