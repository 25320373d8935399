"""The result of a comparison: a row for each contestant, matching and seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sae_lens_multilayer.analysis.tables import as_text
from sae_lens_multilayer.files import write_whole
from sae_lens_multilayer.hooks import layer_labels
from sae_lens_multilayer.pictures.description import (
    FVU_LABEL,
    Axis,
    Panel,
    Picture,
    Series,
    layer_axis,
)
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.studies.comparison.contestants import CONTESTANTS
from sae_lens_multilayer.studies.comparison.measure import at_budget
from sae_lens_multilayer.studies.intervals import means_with_intervals

KEYS = ("matching", "contestant")
SCALARS = (
    "d_sae",
    "k",
    "n_parameters",
    "operations",
    "bits",
    "n_distinct",
    "delta_ce_all",
    "kl_div_all",
    "fvu_chosen",
    "layers_chosen",
    "functional_layers",
    "largest_fall",
    "training_seconds",
    "training_peak_memory_mib",
)
"""Columns with one number for all layers."""
BY_LAYER = ("fvu", "fvu_scalar", "delta_ce", "kl_div")
"""Columns with a number for each layer."""
DRAWN = {"fvu": FVU_LABEL, "delta_ce": "ΔCE (nats)"}
_BARS = {
    "delta_ce_all": "ΔCE, all layers\nat once (nats)",
    "n_parameters": "parameters",
    "operations": "encoder operations\nper token",
}
_N_RATES = 24
"""Points of a curve of rate and distortion."""


@dataclass
class ComparisonResult(Result):
    """Contestants compared at all layers, by matching and seed."""

    hook_names: list[str]
    budgets: list[int | float]
    """Bits per token at which FVU is reported."""
    rows: list[dict[str, Any]]
    """A row for each contestant, matching and seed: sizes and costs; `bits` per token
    at the trained k; `n_distinct` latents of the MLSAE active at a token (U); FVU,
    delta CE and KL by layer, and with all layers at once (see `measure`); `fvu_chosen`
    and `layers_chosen` of a routed SAE; `rates`."""

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each contestant, matching and seed; means over layers."""
        return pd.DataFrame([self._means(row) for row in self.rows])

    def _means(self, row: Mapping[str, Any]) -> dict[str, Any]:
        means = {name: float(np.mean(row[name])) for name in BY_LAYER}
        budgets = {
            name: np.nan if values is None else float(np.mean(values))
            for name, values in self._at_budgets(row).items()
        }
        names = ("seed", *KEYS, *SCALARS)
        scalars = {name: row.get(name, np.nan) for name in names}
        return {**scalars, **means, **budgets}

    def _at_budgets(self, row: Mapping[str, Any]) -> dict[str, list[float] | None]:
        at: dict[str, list[float] | None] = {}
        for budget in self.budgets:
            found = at_budget(row["rates"], budget)
            at[f"fvu_{budget:g}_bits"] = None if found is None else found["fvu"]
        return at

    def by_layer(self) -> pd.DataFrame:
        """One row for each contestant, matching, seed and layer."""
        labels, rows = layer_labels(self.hook_names), []
        for row in self.rows:
            columns: dict[str, Any] = {n: row[n] for n in BY_LAYER}
            columns |= self._at_budgets(row)
            keys = {name: row[name] for name in ("seed", *KEYS)}
            rows += [
                {**keys, "layer": label}
                | {n: np.nan if v is None else v[i] for n, v in columns.items()}
                for i, label in enumerate(labels)
            ]
        return pd.DataFrame(rows)

    def summary(self) -> pd.DataFrame:
        """Means over seeds; `metric_half` is half of the 95% interval."""
        table = self.to_dataframe()
        return means_with_intervals(table, KEYS, [*table.columns[3:]])

    def tables(self) -> list[pd.DataFrame]:
        """Sizes and costs, and what came out, to print."""
        table: Any = self.summary().set_index(list(KEYS))
        sizes = ["d_sae", "k", "n_parameters", "operations", "bits", "n_distinct"]
        found = ["fvu", "delta_ce", "delta_ce_all"]
        found += ["fvu_chosen"] if table.fvu_chosen.notna().any() else []
        found += [f"fvu_{budget:g}_bits" for budget in self.budgets]
        return [table[[*sizes, "training_seconds"]], table[found]]

    def write(self, folder: Path) -> None:
        """Write the tables of the result into a folder; earlier ones are replaced."""
        tables = {
            "contestants": self.to_dataframe(),
            "by_layer": self.by_layer(),
            "summary": self.summary(),
        }
        for name, table in tables.items():
            write_whole(folder / f"{name}.csv", table.to_csv(index=False))

    def pictures(self, **context: Any) -> dict[str, Picture]:
        """By layer, rate and distortion, and costs; a column for each matching."""
        n_seeds = len({row["seed"] for row in self.rows})
        caption = f"Means over {n_seeds} seeds with 95% intervals."
        if left_out := sorted(self._worse_than_means()):
            names = ", ".join(CONTESTANTS[name].description for name in left_out)
            caption += f" Not drawn, as their FVU is above 1: {names}."
        matchings = [*dict.fromkeys(row["matching"] for row in self.rows)]
        n = len(matchings)
        layers = [
            self._layers(column, f"{label}\n(equal {matching})", matching)
            for column, label in DRAWN.items()
            for matching in matchings
        ]
        curves = [self._rates(matching) for matching in matchings]
        bars = [
            self._bars(column, f"{label}\n(equal {matching})", matching)
            for column, label in _BARS.items()
            for matching in matchings
        ]
        rate_caption = "Means over layers and seeds. The k at inference varies."
        return {
            "layers": Picture("Reconstruction of each layer", layers, caption, n),
            "rates": Picture("Rate and distortion", curves, rate_caption, n),
            "costs": Picture("All layers at once, and costs", bars, "", n),
        }

    def _worse_than_means(self) -> set[str]:
        """Contestants with a mean FVU above that of the mean vectors, at any matching.

        Next to them, the others could not be told apart.
        """
        table: Any = self.summary()
        return set(table[table.fvu > 1].contestant)

    def _layers(self, column: str, label: str, matching: str) -> Panel:
        table = means_with_intervals(self.by_layer(), [*KEYS, "layer"], [column])
        series: list[Series] = []
        left_out = self._worse_than_means()
        for colour, name in self._contestants(matching):
            if name in left_out:
                continue
            rows: Any = table[(table.matching == matching) & (table.contestant == name)]
            y = rows[column].to_numpy()
            half = rows[f"{column}_half"].fillna(0).to_numpy()
            x = range(len(y))
            series.append(Series("", x, y - half, "band", y + half, colour=colour))
            label_of = CONTESTANTS[name].description
            series.append(Series(label_of, x, y, colour=colour, style=colour))
        y_axis = Axis(label, include_zero=True)
        return Panel(layer_axis(self.hook_names), y_axis, series)

    def _rates(self, matching: str) -> Panel:
        series: list[Series] = []
        for colour, name in self._contestants(matching):
            found = [row["rates"] for row in self._chosen(matching, name)]
            x, y = _curve(found)
            label = CONTESTANTS[name].description
            series.append(Series(label, x, y, colour=colour, style=colour))
        label = f"{FVU_LABEL}\n(equal {matching})"
        return Panel(Axis("bits per token", log=True), Axis(label, log=True), series)

    def _bars(self, column: str, label: str, matching: str) -> Panel:
        table: Any = self.summary()
        rows = table[table.matching == matching]
        names = [CONTESTANTS[name].description for name in rows.contestant]
        values = rows[column].to_numpy()
        texts = [as_text(value) for value in values.tolist()]
        bars = Series("", range(len(rows)), values, "bars", texts=texts)
        return Panel(Axis("", names, len(names)), Axis(label), [bars])

    def _chosen(self, matching: str, name: str) -> list[dict[str, Any]]:
        keys = {"matching": matching, "contestant": name}
        return [row for row in self.rows if keys.items() <= row.items()]

    def _contestants(self, matching: str) -> list[tuple[int, str]]:
        names = [*dict.fromkeys(row["contestant"] for row in self.rows)]
        return [(i, n) for i, n in enumerate(names) if self._chosen(matching, n)]


def _curve(
    found: Sequence[Sequence[Mapping[str, Any]]],
) -> tuple[np.ndarray, np.ndarray]:
    """Bits, and the mean FVU over seeds and layers, where all seeds have one."""
    bits = [row["bits"] for rows in found for row in rows]
    grid = np.geomspace(min(bits), max(bits), _N_RATES)
    at, means = [], []
    for budget in grid:
        ones = [at_budget(rows, budget) for rows in found]
        fvu = [np.mean(one["fvu"]) for one in ones if one is not None]
        if len(fvu) == len(found):
            at.append(budget)
            means.append(float(np.mean(fvu)))
    return np.array(at), np.array(means)
