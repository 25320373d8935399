"""Means over seeds with their intervals."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

CONFIDENCE = 0.95


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
        stats.t.ppf((1 + CONFIDENCE) / 2, (n - 1).clip(lower=1)),
        index=n.index,
        columns=n.columns,
    )
    half = (groups.std() / np.sqrt(n) * factor).add_suffix("_half")
    return pd.concat([groups.mean(), half], axis=1).reset_index()
