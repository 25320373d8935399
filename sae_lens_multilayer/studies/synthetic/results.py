"""The result of the synthetic study: a row for each stream, seed and arm."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from sae_lens_multilayer.pictures.description import Axis, Panel, Picture, Series
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.studies.intervals import means_with_intervals

FIGURES = {
    "recovery": {
        "mcc": "correlation with\nmatched features (mcc)",
        "mcc_cosine": "cosine with\nmatched features",
        "features_covered": "features with a latent\nof correlation over 0.5",
        "matchings_differ": "features with another latent\nin the other matching",
    },
    "latents": {
        "splitting": "splitting of features",
        "layer_splitting": "splitting over layers",
        "sharing": "sharing over layers",
        "polysemanticity": "polysemanticity",
    },
    "profiles": {
        "profile_w1": "W1 of P(l | j) from\nthe truth (layers)",
        "token_profile_w1": "W1 of P(l | j, t) from\nthe truth (layers)",
        "token_layer_slope": "slope of E[L | j, t]\non the truth",
        "token_layer_r2": "its R²",
    },
    "variances": {
        "total_error": "error of Var(L)\n(layers²)",
        "between_latents_error": "between latents",
        "between_tokens_error": "between tokens\nof a latent",
        "within_token_error": "within a token",
    },
}
"""Metrics in each figure, and the labels of their axes."""
METRICS = [
    *(name for columns in FIGURES.values() for name in columns),
    *("empty_vectors", "empty_acts", "tokens_covered"),
    *(name.replace("_error", "_true") for name in FIGURES["variances"]),
]
"""Metrics in the table of means."""


@dataclass
class SyntheticResult(Result):
    """Recovery of the features of synthetic streams, by factors, seed and arm."""

    varied: list[str]
    """Factors that vary, without the seed."""
    rows: list[dict[str, Any]]
    """Factors, `seed`, `arm` and metrics (see `recovery`)."""

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each stream, seed and arm."""
        return pd.DataFrame(self.rows)

    def summary(self) -> pd.DataFrame:
        """Mean over seeds of each metric, and half of its 95% interval.

        The interval is Student's t; NaN for one seed. `metric` and `metric_half` are
        columns; rows are factors and arms.
        """
        table = self.to_dataframe()
        columns = [name for name in METRICS if name in table]
        return means_with_intervals(table, [*self.varied, "arm"], columns)

    def pictures(self, **context: Any) -> dict[str, Picture]:
        """Each metric over the first numeric factor that varies, by arm."""
        table = self.summary()
        numeric = [n for n in self.varied if pd.api.types.is_numeric_dtype(table[n])]
        x = numeric[0] if numeric else None
        n_seeds = len({row["seed"] for row in self.rows})
        choices = _choices(table, [name for name in self.varied if name != x])
        pictures: dict[str, Picture] = {}
        for name, columns in FIGURES.items():
            panels = [
                _panel(table, metric, label, x, choice)
                for metric, label in columns.items()
                if table[metric].notna().any()
                for choice in choices
            ]
            caption = f"Means over {n_seeds} seeds with 95% intervals."
            pictures[name] = Picture(_TITLES[name], panels, caption, len(choices))
        return pictures


_TITLES = {
    "recovery": "Recovery of the features",
    "latents": "One latent for each feature?",
    "profiles": "Layers of a feature, and of its latent",
    "variances": "Error of each part of the variance over layers",
}
_LABELS = {"theta": "rotation per layer (degrees)"}


def _panel(
    table: pd.DataFrame, metric: str, label: str, x: str | None, choice: dict[str, Any]
) -> Panel:
    """A line for each arm with its interval, at one choice of the other factors."""
    rows: Any = table
    for name, value in choice.items():
        rows = rows[rows[name] == value]
    text = "\n".join([label, *(f"({name} {v})" for name, v in choice.items())])
    arms = [*dict.fromkeys(table["arm"])]
    if x is None:
        bars = Series("", range(len(rows)), rows[metric].to_numpy(), kind="bars")
        return Panel(Axis("", [*rows.arm], len(rows)), Axis(text), [bars])
    series: list[Series] = []
    for i, arm in enumerate(arms):
        series += _line(rows[rows.arm == arm].sort_values(x), metric, x, i)
    axis = Axis(_LABELS.get(x, x), ticks=sorted(set(table[x].astype(float))))
    return Panel(axis, Axis(text, include_zero=True), series)


def _choices(table: pd.DataFrame, names: Sequence[str]) -> list[dict[str, Any]]:
    if not names:
        return [{}]
    rows: Any = table[list(names)].drop_duplicates()
    return [{str(n): v for n, v in row.items()} for row in rows.to_dict("records")]


def _line(rows: Any, metric: str, x: str, colour: int) -> list[Series]:
    rows = rows[rows[metric].notna()]
    if rows.empty:
        return []
    at, y = rows[x].to_numpy(dtype=float), rows[metric].to_numpy()
    half = rows[f"{metric}_half"].fillna(0).to_numpy()
    band = Series("", at, y - half, "band", top=y + half, colour=colour)
    arm = str(rows.arm.iloc[0])
    return [band, Series(arm, at, y, colour=colour, style=colour)]
