"""Shares of a variance that predictors explain (LMG), for tokens within prompts."""

from collections.abc import Iterator
from math import comb

import numpy as np
from jaxtyping import Float, Int

Values = Float[np.ndarray, " token"]

_RIDGE = 1e-9
"""Added to the correlation matrix, so that predictors may be collinear."""


def lmg_shares(
    predictors: Float[np.ndarray, "predictor token"], y: Values, weight: Values
) -> Float[np.ndarray, " predictor"]:
    """The part of R^2 that each predictor adds, averaged over all orders of adding.

    Weighted linear regression with an intercept. The shares sum to the R^2 of all
    predictors; a constant predictor has 0. Time grows with 2^(number of predictors).

    References:
        Lindeman, Merenda and Gold (1980); Groemping (2006), doi:10.18637/jss.v017.i01.
    """
    n = len(predictors)
    r2 = _r2_of_subsets(predictors, y, weight)
    subsets = np.arange(2**n)
    sizes = np.array([bin(s).count("1") for s in subsets])
    shares = np.empty(n)
    for i in range(n):
        without = subsets[(subsets >> i) & 1 == 0]
        orders = np.array([1 / (n * comb(n - 1, k)) for k in sizes[without]])
        shares[i] = (orders * (r2[without | 1 << i] - r2[without])).sum()
    return shares


def _r2_of_subsets(
    predictors: Float[np.ndarray, "predictor token"], y: Values, weight: Values
) -> Float[np.ndarray, " subset"]:
    """R^2 of each subset of the predictors; subset s has those of its bits."""
    values = np.vstack([predictors, y])
    values = values - np.average(values, axis=1, weights=weight)[:, None]
    covariance = (values * weight) @ values.T
    scale = np.sqrt(np.diag(covariance))
    scale[scale <= 1e-12 * np.sqrt(weight.sum())] = np.inf  # constant: correlation 0
    correlation = covariance / np.outer(scale, scale)
    between, with_y = correlation[:-1, :-1], correlation[:-1, -1]
    between[np.diag_indices_from(between)] = 1 + _RIDGE
    r2 = np.zeros(2 ** len(predictors))
    for subset in range(1, len(r2)):
        bits = [i for i in range(len(predictors)) if subset >> i & 1]
        own = with_y[bits]
        r2[subset] = own @ np.linalg.solve(between[np.ix_(bits, bits)], own)
    return r2


def leave_one_out_mean(
    group: Int[np.ndarray, " token"], y: Values, weight: Values
) -> Values:
    """Weighted mean of y over the other tokens of the same group; 0 without others."""
    _, group, counts = np.unique(group, return_inverse=True, return_counts=True)
    sums, weights = np.bincount(group, weight * y), np.bincount(group, weight)
    others = weights[group] - weight
    alone = (counts[group] == 1) | (others <= 0)
    means = (sums[group] - weight * y) / np.where(alone, 1.0, others)
    return np.where(alone, 0.0, means)


def permuted_within(
    prompts: Int[np.ndarray, " token"], rng: np.random.Generator
) -> Int[np.ndarray, " token"]:
    """Indices that put in the place of each token a random one of its prompt."""
    order = np.lexsort((rng.random(len(prompts)), prompts))
    places = np.argsort(prompts, kind="stable")
    permutation = np.empty(len(prompts), dtype=np.int64)
    permutation[places] = order
    return permutation


def resampled_prompts(
    prompts: Int[np.ndarray, " token"], n_resamples: int, rng: np.random.Generator
) -> Iterator[Values]:
    """How often each token is drawn when prompts are drawn with replacement."""
    _, prompt = np.unique(prompts, return_inverse=True)
    n_prompts = int(prompt.max()) + 1
    for _ in range(n_resamples):
        drawn = rng.integers(0, n_prompts, n_prompts)
        yield np.bincount(drawn, minlength=n_prompts)[prompt].astype(float)
