"""Prints tables with three significant digits and units."""

from typing import Any

from sae_lens_multilayer.analysis.tables import as_text

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


def with_unit(column: str) -> str:
    """The name of a column with its unit."""
    return f"{column} (nats)" if column in _IN_NATS else column
