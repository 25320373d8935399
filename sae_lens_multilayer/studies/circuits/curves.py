"""Faithfulness of circuits of growing size: curves, areas, sizes, intervals.

Sizes are shares of all nodes. `f(C) = (m(C) - m(empty)) / (m(M) - m(empty))` with means
over prompts (Marks et al. 2024, arXiv:2403.19647, section 4).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The kept shares of Mueller et al. (2025), arXiv:2504.13151 (MIB)."""
COUNTS = (10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000)
"""Numbers of nodes of the circuits that are compared between SAEs."""
AREAS = ("cpr", "cmd", "cpr_log", "cmd_log")


def faithfulness(
    scores: Float[np.ndarray, "*circuit prompt"],
    full: Float[np.ndarray, " prompt"],
    empty: Float[np.ndarray, " prompt"],
) -> Float[np.ndarray, "*circuit"]:
    """f of each circuit: 0 is that of no node, 1 that of the model; no bounds.

    Raises:
        ValueError: If `full` and `empty` have the same mean.
    """
    span = full.mean() - empty.mean()
    if not abs(span) > 1e-6 * max(1e-6, np.abs(full).max(), np.abs(empty).max()):
        raise ValueError(
            f"m(M) and m(empty) must differ; both are {full.mean():.6g}. The ablation "
            "does not change the metric: use another ablation, task or more layers."
        )
    return np.asarray((scores.mean(-1) - empty.mean()) / span)


def areas(
    shares: Sequence[float], f: Float[np.ndarray, "*sample share"]
) -> dict[str, Float[np.ndarray, "*sample"]]:
    """CPR, the mean of f over kept shares, and CMD, that of |1 - f|.

    Trapezoids between the shares, divided by the length of the axis. `cpr` and `cmd`
    have the share itself as their axis, as MIB, so that half of their weight is on
    circuits with more than half of the nodes; `cpr_log` and `cmd_log` have its
    logarithm, so that each decade of sizes has the same weight. Better: CPR higher, CMD
    lower, at least 0.

    References:
        Mueller et al. (2025), arXiv:2504.13151, section 3.
    """
    x = np.asarray(shares, dtype=float)
    found: dict[str, np.ndarray] = {}
    for end, axis in (("", x), ("_log", np.log(x))):
        found[f"cpr{end}"] = _mean_over(axis, f)
        found[f"cmd{end}"] = _mean_over(axis, np.abs(1 - f))
    return {name: found[name] for name in AREAS}


def _mean_over(
    axis: Float[np.ndarray, " share"], y: Float[np.ndarray, "*sample share"]
) -> Float[np.ndarray, "*sample"]:
    """The integral of y by trapezoids, divided by the length of the axis."""
    middles = (y[..., 1:] + y[..., :-1]) / 2
    total = (middles * np.diff(axis)).sum(-1)
    return np.asarray(total / (axis[-1] - axis[0]))


def size_at(
    shares: Sequence[float], f: Float[np.ndarray, " share"], level: float = 0.8
) -> float:
    """The smallest share with f of at least `level`; NaN if there is none.

    Between shares, f is linear in the logarithm of the share.
    """
    reached = np.flatnonzero(f >= level)
    if not len(reached):
        return np.nan
    i = int(reached[0])
    if i == 0:
        return float(shares[0])
    x = np.log(np.asarray(shares[i - 1 : i + 1], dtype=float))
    part = (level - f[i - 1]) / (f[i] - f[i - 1])
    return float(np.exp(x[0] + part * (x[1] - x[0])))


def resampled_faithfulness(
    scores: Float[np.ndarray, "circuit prompt"],
    full: Float[np.ndarray, " prompt"],
    empty: Float[np.ndarray, " prompt"],
    n_samples: int,
    seed: int,
) -> Float[np.ndarray, "sample circuit"]:
    """f in bootstrap samples of the prompts; the circuits stay the same."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(full), size=(n_samples, len(full)))
    low = empty[chosen].mean(1, keepdims=True)
    span = full[chosen].mean(1, keepdims=True) - low
    with np.errstate(divide="ignore", invalid="ignore"):
        return (scores.T[chosen].mean(1) - low) / span


def check_counts(counts: Any) -> None:
    """Raise ValueError unless counts are whole numbers that grow from 1 or more."""
    is_list = isinstance(counts, Sequence)
    are_whole = is_list and all(type(one) is int and one > 0 for one in counts)
    if not are_whole or not all(a < b for a, b in pairwise(counts)):
        raise ValueError(
            "`counts` must be a list of whole numbers of nodes that grow from 1 or "
            f"more; got {counts!r}."
        )


def check_shares(shares: Any) -> None:
    """Raise ValueError unless shares grow, are in (0, 1], and end with 1."""
    are_numbers = isinstance(shares, Sequence) and all(
        isinstance(one, int | float) for one in shares
    )
    grows = are_numbers and all(a < b for a, b in pairwise(shares))
    if not grows or len(shares) < 2 or shares[0] <= 0 or shares[-1] != 1:
        raise ValueError(
            "`shares` must be a list of two or more numbers that grow from above 0 to "
            f"1; got {shares!r}."
        )
