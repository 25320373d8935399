"""Intervals: Student's t over seeds, and by resampling what was measured on."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

CONFIDENCE = 0.95
QUANTILES = (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2
"""Of resampled values, the ends of their interval."""
_N_RESAMPLES = 1000


def means_with_intervals(
    table: pd.DataFrame, keys: Sequence[str], columns: Sequence[str]
) -> pd.DataFrame:
    """Mean of each column over the rows with the same keys, and half of its interval.

    The 95% interval is Student's t; `metric_half` is NaN for one row. The keys are
    columns of the result, in the order in which they first occur.
    """
    groups: Any = table.groupby(list(keys), sort=False, dropna=False)[list(columns)]
    n = groups.count()
    factor = pd.DataFrame(
        stats.t.ppf(QUANTILES[1], (n - 1).clip(lower=1)),
        index=n.index,
        columns=n.columns,
    )
    half = (groups.std() / np.sqrt(n) * factor).add_suffix("_half")
    return pd.concat([groups.mean(), half], axis=1).reset_index()


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The central 95% of resampled values; NaN without values."""
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return np.nan, np.nan
    low, high = np.quantile(finite, QUANTILES)
    return float(low), float(high)


def intervals(
    sums: Float[np.ndarray, "unit column"],
    metrics: Callable[[np.ndarray], Mapping[str, Any]],
) -> pd.DataFrame:
    """Numbers with 95% intervals over resampled units, such as prompts or latents.

    Args:
        sums: Sums over what was measured at each unit.
        metrics: The numbers by name, from sums over units [..., column].

    Returns:
        A row for each number: `value`, `low` and `high`.
    """
    rng, n = np.random.default_rng(0), len(sums)
    times = [
        np.bincount(row, minlength=n) for row in rng.integers(0, n, (_N_RESAMPLES, n))
    ]
    with np.errstate(divide="ignore", invalid="ignore"):
        resampled = metrics(np.stack(times) @ sums)
        rows = {
            name: (float(value), *interval(resampled[name]))
            for name, value in metrics(sums.sum(0)).items()
        }
    return pd.DataFrame.from_dict(rows, "index", columns=["value", "low", "high"])


def ratio_intervals(
    parts: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> pd.DataFrame:
    """`intervals` of ratios of sums over units; NaN counts as nothing measured.

    Args:
        parts: Numerator and denominator of each unit, by the name of the ratio.
    """
    pairs = np.array(list(parts.values()), dtype=float)
    pairs = np.where(np.isfinite(pairs).all(1, keepdims=True), pairs, 0.0)

    def ratios(sums: np.ndarray) -> dict[str, Any]:
        both = np.moveaxis(sums, -1, 0).reshape(len(parts), 2, *sums.shape[:-1])
        return {name: a / b for name, (a, b) in zip(parts, both, strict=True)}

    return intervals(pairs.reshape(2 * len(parts), -1).T, ratios)
