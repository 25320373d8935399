"""Prints tables with three significant digits and units."""

import math
from typing import Any

_IN_NATS = {"ce_loss_clean", "ce_loss_spliced", "ce_loss_ablated", "delta_ce"} | {
    *("kl_div", "kl_div_reverse")
}
"""The other columns have their unit in their name, or none."""


def print_table(table: Any) -> None:
    """Print a DataFrame with its index; NaN is "-"."""
    shown = table.map(as_text).rename(columns=with_unit)
    print(shown.to_string())


def print_numbers(numbers: Any) -> None:
    """Print a line for each number of a mapping."""
    for name, value in numbers.items():
        print(f"{with_unit(str(name)):24} {as_text(value)}")


def as_text(value: Any) -> str:
    """A number with three significant digits, or more if it is a whole number.

    Example:
        >>> [as_text(x) for x in (0.12345, 1234.5, 32.0, 2e-5, float("nan"))]
        ['0.123', '1,234', '32', '2e-05', '-']
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if math.isnan(value):
        return "-"
    is_whole = abs(value) >= 1000 or value == int(value) if math.isfinite(value) else 0
    return f"{value:,.0f}" if is_whole else f"{value:.3g}"


def with_unit(column: str) -> str:
    """The name of a column with its unit."""
    return f"{column} (nats)" if column in _IN_NATS else column
