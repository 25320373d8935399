"""The result of the study: a row for each SAE, task, seed and ablation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sae_lens_multilayer.pictures.description import Axis, Panel, Picture, Series
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.studies.circuits.curves import areas
from sae_lens_multilayer.studies.intervals import means_with_intervals

_GROUPS = ["task", "ablation", "label"]
_KEYS = [*_GROUPS, "index", "seed"]
_SHOWN = {
    "cpr_log": "CPR (log shares)",
    "cpr_nodes": "CPR (log numbers\nof nodes)",
    "size": "share of nodes\nwith f = 0.8",
    "f_latents_only": "f of all latents\nwithout errors",
    "error_share": "error nodes' share\nof all |effect|",
    "nodes_per_latent_at_size": "nodes per\ndistinct latent",
}
"""Measures in the figure of labels, and the labels of their axes."""


@dataclass
class CircuitTable(Result):
    """Measures of the circuits of several SAEs, by label."""

    rows: list[dict[str, Any]]
    """Label, index of the SAE, task, seed, ablation, `k`, `fvu`, `fvu_gap`, and
    `Circuits.summary` of each. `fvu_gap` is the FVU less that asked, of the first SAE:
    labels with another gap are not compared at equal reconstruction."""
    curves: list[dict[str, Any]]
    """`Circuits.to_dataframe` of each."""
    by_count: list[dict[str, Any]]
    """`Circuits.counts_table` of each."""
    jaccards: list[dict[str, Any]]
    """Jaccard index of the nodes of two circuits that differ in one seed."""

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each SAE, task, seed and ablation.

        `cpr_nodes` is the mean of f over the logarithm of the number of nodes, up to
        the largest number that all SAEs of the task and ablation have: CPR at equal
        numbers of nodes, where `cpr` and `cpr_log` compare equal shares. NaN if they
        have fewer than two numbers in common.
        """
        table = pd.DataFrame(self.rows)
        return table.assign(cpr_nodes=self._cpr_nodes().to_numpy())

    def _cpr_nodes(self) -> pd.Series:
        own: Any = pd.DataFrame(self.rows)
        keys = pd.MultiIndex.from_frame(own[_KEYS])
        if not self.by_count:
            return pd.Series(np.nan, keys)
        table: Any = pd.DataFrame(self.by_count)
        f = table.pivot(index=_KEYS, columns="n_nodes", values="f").reindex(keys)
        groups = f.groupby(level=_GROUPS[:2], sort=False)
        found: Any = pd.concat([_mean_f(group) for _, group in groups])
        return found.reindex(keys)

    def counts_table(self) -> pd.DataFrame:
        """Means of f by task, ablation, label and number of nodes, as `summary`.

        `n_saes` is the number of SAEs that have as many nodes.
        """
        if not self.by_count:
            return pd.DataFrame(columns=[*_GROUPS, "n_nodes", "n_saes", "f", "f_half"])
        return _means(pd.DataFrame(self.by_count), [*_GROUPS, "n_nodes"])

    def summary(self) -> pd.DataFrame:
        """Means over SAEs by task, ablation and label, of means over seeds of prompts.

        A column `*_half` is half of the 95% interval of the mean (Student's t over the
        `n_saes` SAEs); NaN for one SAE.
        """
        return _means(self.to_dataframe(), _GROUPS)

    def short_table(self) -> pd.DataFrame:
        """The main columns of `summary`, with half of the interval of each measure."""
        table: Any = self.summary()
        measures = [n for name in _SHOWN for n in (name, f"{name}_half")]
        shown = ["n_saes", "n_nodes", "k", "fvu", "fvu_gap", "m_full", "m_empty"]
        shown += ["cpr", "cmd"]
        return table[[*_GROUPS, *shown, "cpr_log_random", *measures]]

    def jaccard_table(self) -> pd.DataFrame:
        """Mean Jaccard index by task, ablation and label, between SAEs and prompts."""
        if not self.jaccards:
            return pd.DataFrame(columns=[*_GROUPS, "between", "jaccard"])
        table: Any = pd.DataFrame(self.jaccards)
        groups: Any = table.groupby([*_GROUPS, "between"], sort=False)
        return groups["jaccard"].mean().reset_index()

    def pictures(self, **context: Any) -> dict[str, Picture]:
        """Curves of f by task and ablation, and the main measures by label."""
        caption = "Means over SAEs, with 95% intervals."
        table = self.summary()
        choices: Any = table[["task", "ablation"]].drop_duplicates()
        n_columns = len(choices.ablation.unique())
        by_share = _means(pd.DataFrame(self.curves), [*_GROUPS, "share"])
        by_size = {"share": by_share, "n_nodes": self.counts_table()}
        panels = {
            size: [_curve_panel(one, row, size) for row in choices.to_dict("records")]
            for size, one in by_size.items()
        }
        bars = [_bar_panel(table, name, label) for name, label in _SHOWN.items()]
        return {
            "faithfulness": Picture(
                "Faithfulness of circuits", panels["share"], caption, n_columns
            ),
            "faithfulness_by_nodes": Picture(
                "Faithfulness of circuits with equal numbers of nodes",
                panels["n_nodes"],
                caption,
                n_columns,
            ),
            "measures": Picture("Circuits by label", bars, caption, 3),
        }


def _means(table: pd.DataFrame, groups: Sequence[str]) -> pd.DataFrame:
    numeric = [
        name
        for name in table.select_dtypes("number")
        if name not in (*groups, "index", "seed")
    ]
    # Rows of one SAE are not independent.
    by_sae: Any = table.groupby([*groups, "index"], sort=False)[numeric]
    of_saes = by_sae.mean().reset_index()
    means = means_with_intervals(of_saes, groups, numeric)
    sizes: Any = of_saes.groupby(list(groups), sort=False).size()
    means.insert(len(groups), "n_saes", sizes.to_numpy())
    return means


def _mean_f(by_count: pd.DataFrame) -> pd.Series:
    """Mean of f over the logarithm of the numbers of nodes that all rows have."""
    common: Any = by_count.dropna(axis=1)
    mean: Any = np.nan
    if common.shape[1] > 1:
        mean = areas([*map(float, common.columns)], common.to_numpy())["cpr_log"]
    return pd.Series(mean, by_count.index)


def _curve_panel(means: pd.DataFrame, chosen: dict[Any, Any], size: str) -> Panel:
    """f by "share" or by "n_nodes"."""
    rows: Any = means
    for name, value in chosen.items():
        rows = rows[rows[name] == value]
    series: list[Series] = []
    for i, label in enumerate(dict.fromkeys(rows.label)):
        own = rows[rows.label == label]
        x, f = own[size].to_numpy(), own.f.to_numpy()
        half = own.f_half.fillna(0).to_numpy()
        series += [
            Series("", x, f - half, "band", top=f + half, colour=i),
            Series(str(label), x, f, colour=i, style=i),
        ]
        random = own.get("f_random", pd.Series(np.nan, own.index)).to_numpy()
        if i == 0 and np.isfinite(random).all():
            name = f"random nodes ({label})"
            series.append(Series(name, x, random, colour=7, style=3))
    text = f"f: {chosen['task'].replace('_', ' ')},\n{chosen['ablation']} ablation"
    label = {"share": "share of the nodes", "n_nodes": "number of nodes"}[size]
    axis = Axis(label, log=True)
    return Panel(axis, Axis(text, include_zero=True), series)


def _bar_panel(table: pd.DataFrame, name: str, text: str) -> Panel:
    """A bar with its interval for each label, by task and ablation."""
    rows: Any = table
    kinds = [f"{t}\n{a}" for t, a in zip(rows.task, rows.ablation, strict=True)]
    places = list(dict.fromkeys(kinds))
    at = np.array([places.index(kind) for kind in kinds], dtype=float)
    labels = list(dict.fromkeys(rows.label))
    width = 0.8 / len(labels)
    series: list[Series] = []
    for i, label in enumerate(labels):
        own = (rows.label == label).to_numpy()
        x = at[own] + width * (i - (len(labels) - 1) / 2)
        y, half = rows[name].to_numpy()[own], rows[f"{name}_half"].fillna(0)[own]
        low, high = y - half.to_numpy(), y + half.to_numpy()
        series += [
            Series(str(label), x, y, "bars", width=0.9 * width, colour=i),
            Series("", x, low, "intervals", top=high),
        ]
    axis = Axis("", [place.replace("_", " ") for place in places], len(places))
    return Panel(axis, Axis(text, include_zero=True), series)
