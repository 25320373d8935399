"""Tables of results, and moments over layers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from sae_lens_multilayer.hooks import layer_labels


def make_table(
    columns: Mapping[str, Shaped[Tensor, " row"]], index: pd.Index | str | None = None
) -> pd.DataFrame:
    """A table of these columns, with an index or the name of the index 0, 1, ...."""
    arrays = {name: column.numpy() for name, column in columns.items()}
    if isinstance(index, pd.Index):
        return pd.DataFrame(arrays, index=index)
    return pd.DataFrame(arrays).rename_axis(index)


def layer_columns(
    prefix: str, hook_names: Sequence[str], values: Shaped[Tensor, "layer row"]
) -> dict[str, Shaped[Tensor, " row"]]:
    """Columns `{prefix}_{layer}` for `make_table`."""
    labels = layer_labels(hook_names)
    return {f"{prefix}_{k}": v for k, v in zip(labels, values, strict=True)}


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown; numbers with a point have four significant digits."""
    rows = [[*map(str, table.columns)], ["---"] * table.shape[1]]
    for row in table.itertuples(index=False):
        texts = [
            str(value) if isinstance(value, int) else as_text(value, 4) for value in row
        ]
        rows.append([t.replace("|", "\\|").replace("\n", " ") for t in texts])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def as_text(value: Any, digits: int = 3) -> str:
    """A number with so many significant digits, or with all before its point.

    NaN is "-", and what is not a number is as `str` gives it.

    Example:
        >>> [as_text(x) for x in (0.12345, 999.7, 1234.5, 32.0, 2e-5, float("nan"))]
        ['0.123', '1,000', '1,234', '32', '2e-05', '-']
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if math.isnan(value):
        return "-"
    short = f"{value:.{digits}g}"
    is_whole = math.isfinite(value) and (
        value == int(value) or abs(float(short)) >= 10**digits
    )
    return f"{value:,.0f}" if is_whole else short


def layer_mean(probs: Float[Tensor, "layer ..."]) -> Float[Tensor, "..."]:
    """Mean of the layer index under a distribution over layers."""
    return (probs * _index(probs)).sum(0)


def layer_variance(probs: Float[Tensor, "layer ..."]) -> Float[Tensor, "..."]:
    """Variance of the layer index under a distribution over layers.

    Example:
        >>> layer_variance(torch.tensor([0.5, 0.0, 0.5]))
        tensor(1.)
    """
    return (probs * (_index(probs) - layer_mean(probs)).square()).sum(0)


def raw_layer_variance(weights: Float[Tensor, "layer ..."]) -> Float[Tensor, "..."]:
    """`sum_l l^2 w_l - (sum_l l w_l)^2`, whatever the sum of the weights."""
    return layer_mean(weights * _index(weights)) - layer_mean(weights).square()


def _index(probs: Tensor) -> Tensor:
    """0, 1, ... along the layer axis, in a shape that broadcasts with `probs`."""
    index = torch.arange(len(probs)).to(probs)
    return index.view(-1, *[1] * (probs.ndim - 1))
