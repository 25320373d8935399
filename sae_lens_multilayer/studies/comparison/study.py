"""The comparison: contestants trained on the same vectors, measured and compared."""

import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sae_lens.config import HfDataset
from torch import Tensor
from typing_extensions import override

from sae_lens_multilayer.files import check_writable
from sae_lens_multilayer.pictures import draw, save_figure
from sae_lens_multilayer.record import RECORD_FILENAME, Record
from sae_lens_multilayer.studies.comparison.codecs import Codec
from sae_lens_multilayer.studies.comparison.contestants import (
    CONTESTANTS,
    MLSAE,
    Contestant,
    Size,
)
from sae_lens_multilayer.studies.comparison.data import ComparisonData, OwnBench
from sae_lens_multilayer.studies.comparison.measure import (
    measure,
    rates,
)
from sae_lens_multilayer.studies.comparison.result import ComparisonResult
from sae_lens_multilayer.studies.comparison.settings import (
    ComparisonSettings,
    Entry,
    entries,
)
from sae_lens_multilayer.sweeps.cost import read_cost
from sae_lens_multilayer.sweeps.resumable import ResumablePoints, check_all_done
from sae_lens_multilayer.sweeps.sweep import COST_FILE

_RESULT = "result"
_N_QUANTISED = 1_024
"""Most training tokens to whose activations quantisers are fitted."""


def comparison_study(
    settings: ComparisonSettings,
    folder: str | Path,
    *,
    override_model: Any | None = None,
    override_dataset: HfDataset | None = None,
    override_evaluation_dataset: HfDataset | None = None,
) -> ComparisonResult:
    """Train the contestants on the same vectors and compare them on held-out tokens.

    Each contestant has a folder for each seed and matching, with its SAEs and its
    result; beside these are `table.csv`, `result`, tables and figures. A second call
    resumes: what is done is skipped, an interrupted run continues from its newest
    checkpoint, and failed contestants are retried.

    Args:
        settings: The runs, the contestants and the held-out text.
        folder: New, or that of an earlier call with the same settings.
        override_model, override_dataset, override_evaluation_dataset: As in `sweep`.

    Raises:
        ValueError: If a setting is invalid, before a model is loaded.
        PointsFailedError: If contestants have failed, after all others.
    """
    given = override_model, override_dataset, override_evaluation_dataset
    data = ComparisonData(settings, *given)
    return _Study(settings, Path(folder).expanduser(), data).run()


def run_settings(settings: dict[str, Any], folder: Path) -> list[pd.DataFrame]:
    """Run the study of a settings file (see `ComparisonSettings`); tables to print."""
    result = comparison_study(ComparisonSettings.from_settings(settings), folder)
    return result.tables()


class _Study(ResumablePoints[Entry]):
    kind, point_kind = "comparison", "contestant"

    def __init__(
        self, settings: ComparisonSettings, folder: Path, data: ComparisonData
    ) -> None:
        """Validate the folders."""
        self.settings, self.folder, self.data = settings, folder, data
        sae: Any = data.cfg.sae
        self.mlsae = Size(sae.d_sae, sae.k)
        self.points = entries(settings, settings.seeds or [data.cfg.seed])
        if (folder / RECORD_FILENAME).exists():
            Record.read(folder, self.kind)
        check_writable(folder / "new", "folder")
        for point in self.points:
            self.check_point_folder(point)

    def run(self) -> ComparisonResult:
        """Run what is not done; write the result, its tables and figures."""
        table = self.run_points(self.points, self.points)
        check_all_done(table, "These contestants have failed")
        rows = [row for point in self.points for row in self._rows(point)]
        order = list(self.settings.matchings)
        rows.sort(key=lambda row: order.index(row["matching"]))
        result = self._result(rows)
        path = self.folder / _RESULT
        if path.exists():  # of an earlier call, perhaps with fewer points
            shutil.rmtree(path)
        result.save(path)
        result.write(self.folder)
        for name, picture in result.pictures().items():
            save_figure(draw(picture), self.folder / f"{name}.png")
        return result

    def _result(self, rows: list[dict[str, Any]]) -> ComparisonResult:
        budgets = list(self.settings.budgets)
        return ComparisonResult(self.data.hook_names, budgets, rows)

    def _rows(self, point: Entry) -> list[dict[str, Any]]:
        """The row of a point; the MLSAE's once for each matching."""
        rows = ComparisonResult.load(self.folder / point.name / _RESULT).rows
        if point.matching is not None:
            return rows
        return [{**rows[0], "matching": m} for m in self.settings.matchings]

    @override
    def point_settings(self, point: Entry) -> dict[str, Any]:
        settings, cfg = self.settings, self.data.config({"seed": point.seed})
        text = settings.evaluation.text(settings.base)
        measured = settings.evaluation.settings(text)
        own = ("matched_bits_per_value", "budgets", "bits_per_value", "n_fit_tokens")
        of_study = {name: getattr(settings, name) for name in own}
        return {
            **cfg.decisive_settings(),
            **{f"evaluation.{name}": value for name, value in measured.items()},
            **of_study,
            "contestant": point.contestant,
            "matching": point.matching,
        }

    @override
    def is_done(self, point: Entry) -> bool:
        return (self.folder / point.name / _RESULT).is_dir()

    @override
    def run_point(self, point: Entry) -> None:
        size = self._size(point)
        row = self._row_of_size(point, size) or self._train_and_measure(point, size)
        row = {**row, **asdict(point)}
        self._result([row]).save(self.folder / point.name / _RESULT)

    def _row_of_size(self, point: Entry, size: Size) -> dict[str, Any] | None:
        """The row of another matching that gives this contestant the same sizes."""
        for other in self.points:
            alike = replace(other, matching=point.matching) == point
            if alike and other != point and self.is_done(other):
                row = self._rows(other)[0]
                if asdict(size).items() <= row.items():
                    return row
        return None

    def _train_and_measure(self, point: Entry, size: Size) -> dict[str, Any]:
        contestant = CONTESTANTS[point.contestant]
        bench = OwnBench(self.data, self.folder / point.name, point.seed)
        codec = contestant.make(bench, size)
        return {
            **asdict(size),
            **self._costs(contestant, size),
            **self._measure(codec, size, bench.fitted_on),
            **codec.numbers(self.data.model, self.data.prompts),
            **_training_cost(self.folder / point.name),
        }

    def _size(self, point: Entry) -> Size:
        bits = 0.0
        if point.matching == "bits":
            of_mlsae = Entry(point.seed, MLSAE, None)
            if not self.is_done(of_mlsae):
                raise ValueError(f"It needs the bits of {of_mlsae.name}, which failed.")
            bits = self._rows(of_mlsae)[0]["bits"]
        return CONTESTANTS[point.contestant].size(
            point.matching or "operations",
            len(self.data.hook_names),
            self.mlsae,
            bits,
            self.settings.matched_bits_per_value,
        )

    def _costs(self, contestant: Contestant, size: Size) -> dict[str, int]:
        sizes = len(self.data.hook_names), self.data.cfg.sae.d_in, size
        return {
            "n_parameters": contestant.parameters(*sizes),
            "operations": contestant.operations(*sizes),
        }

    @torch.no_grad()
    def _measure(self, codec: Codec, size: Size, fitted_on: Tensor) -> dict[str, Any]:
        settings = self.settings
        found = rates(
            codec,
            fitted_on[:_N_QUANTISED],
            self.data.held_out,
            settings.bits_per_value,
            max(settings.budgets),
        )
        metrics = measure(
            codec,
            size.k,
            self.data.model,
            self.data.hook_names,
            self.data.prompts,
            bits_per_value=settings.matched_bits_per_value,
            batch_size_prompts=settings.evaluation.batch_size_prompts,
            device=self.data.cfg.device,
        )
        return {**metrics, "rates": found}

    @override
    def values(self, point: Entry) -> dict[str, Any]:
        row: dict[str, Any] = asdict(point)
        if self.is_done(point):
            row |= self._result(self._rows(point)[:1]).to_dataframe().iloc[0].to_dict()
        return row


def _training_cost(folder: Path) -> dict[str, float]:
    """Time of all SAEs of a contestant together, and their highest memory."""
    costs = [read_cost(file) for file in sorted(folder.glob(f"*/{COST_FILE}"))]
    return {
        "training_seconds": math.fsum(cost.seconds for cost in costs),
        "training_peak_memory_mib": max([0.0, *(c.peak_memory_mib for c in costs)]),
    }
