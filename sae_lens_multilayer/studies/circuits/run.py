"""The study of circuits: tasks, ablations and SAEs with labels, resumable."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from sae_lens.config import HfDataset
from sae_lens.training._interruption import InterruptedException
from typing_extensions import override

from sae_lens_multilayer.files import check_writable, read_json, write_whole
from sae_lens_multilayer.pictures import draw, save_figure
from sae_lens_multilayer.record import RECORD_FILENAME, Record, hash_of_json
from sae_lens_multilayer.studies.circuits.graph import attribution_graph
from sae_lens_multilayer.studies.circuits.graph_files import GraphFolder
from sae_lens_multilayer.studies.circuits.inputs import StudyInputs, UsedK
from sae_lens_multilayer.studies.circuits.result import Circuits
from sae_lens_multilayer.studies.circuits.seeds import compare_seeds
from sae_lens_multilayer.studies.circuits.settings import (
    CircuitPoint,
    CircuitSettings,
)
from sae_lens_multilayer.studies.circuits.streams import Ablation
from sae_lens_multilayer.studies.circuits.study import Ranking, circuits
from sae_lens_multilayer.studies.circuits.table import CircuitTable
from sae_lens_multilayer.sweeps.cost import measured_in, read_cost
from sae_lens_multilayer.sweeps.resumable import ResumablePoints, check_all_done

GRAPHS_FOLDER = "graphs"
_RESULT, _COST_FILE, _USED_FILE = "circuits", "cost.json", "sae.json"

logger = logging.getLogger(__name__)


def circuits_study(
    settings: CircuitSettings,
    folder: str | Path,
    *,
    override_model: Any | None = None,
    override_dataset: HfDataset | None = None,
) -> CircuitTable:
    """Find circuits for each task, ablation, SAE and seed, and compare labels.

    Each choice has a folder with its `Circuits`; beside them are `circuits.csv` (a row
    for each), `summary.csv` (means and intervals), `counts.csv` (f by number of nodes),
    `jaccard.csv`, the figures and, in `graphs`, attribution graphs with the list of
    them that circuit-tracer's viewer reads. A second call resumes the study; graphs
    that have failed are logged and retried then.

    Args:
        folder: Folder of the study; another study's is an error.
        override_model, override_dataset: Used instead of the named ones.

    Raises:
        ValueError: If the SAEs lack a hook, the tokenizer lacks what a task needs, or a
            folder was made with other settings, SAEs or another model.
        PointsFailedError: If some choices have failed, after all others.
    """
    folder = Path(folder).expanduser()
    inputs = StudyInputs(settings, folder, override_model, override_dataset)
    return _Study(settings, folder, inputs).run()


def run_settings(settings: dict[str, Any], folder: Path) -> list[pd.DataFrame]:
    """Run the study of a settings file (see `CircuitSettings`); tables to print."""
    result = circuits_study(CircuitSettings.from_settings(settings), folder)
    return [result.short_table(), result.jaccard_table()]


class _Study(ResumablePoints[CircuitPoint]):
    kind, point_kind = "circuits study", "circuits"

    def __init__(
        self, settings: CircuitSettings, folder: Path, inputs: StudyInputs
    ) -> None:
        self.settings, self.folder, self.inputs = settings, folder, inputs
        self.points = [
            CircuitPoint(label, index, sae, task, seed, ablation)
            for task in settings.tasks
            for seed in settings.seeds
            for ablation in settings.ablations
            for label, saes in settings.folders.items()
            for index, sae in enumerate(saes)
        ]
        if (folder / RECORD_FILENAME).exists():
            Record.read(folder, self.kind)
        check_writable(folder / "new", "folder")
        self._check_folders()

    def _check_folders(self) -> None:
        for point in self.points:
            self.check_point_folder(point)

    def run(self) -> CircuitTable:
        """Run what is not done; write the result, figures and graphs."""
        if not all(map(self.is_done, self.points)):
            for point in self.points:
                self.inputs.task(point)  # wrong tokenizers fail before anything is run
            self._check_folders()  # now that the model is loaded
        table = self.run_points(self.points, self.points)
        check_all_done(table, "These circuits have failed")
        found = {p: Circuits.load(self._path(p)) for p in self.points}
        result = self._result(found)
        for name, picture in result.pictures().items():
            save_figure(draw(picture), self.folder / f"{name}.png")
        result.to_dataframe().to_csv(self.folder / "circuits.csv", index=False)
        result.summary().to_csv(self.folder / "summary.csv", index=False)
        result.counts_table().to_csv(self.folder / "counts.csv", index=False)
        result.jaccard_table().to_csv(self.folder / "jaccard.csv", index=False)
        if self.settings.n_graph_nodes:
            self._write_graphs()
        return result

    def _result(self, found: dict[CircuitPoint, Circuits]) -> CircuitTable:
        rows = [{**p.keys, **self._row_of(p, one)} for p, one in found.items()]
        curves, by_count = (
            [
                {**p.keys, **row}
                for p, one in found.items()
                for row in table(one).to_dict("records")
            ]
            for table in (Circuits.to_dataframe, Circuits.counts_table)
        )
        jaccards = compare_seeds(found, self.settings.jaccard_share)
        return CircuitTable(rows, curves, by_count, jaccards)

    # Points

    @override
    def point_settings(self, point: CircuitPoint) -> dict[str, Any]:
        values = asdict(self.settings)
        free = "saes", "tasks", "seeds", "ablations", "jaccard_share", "n_graph_nodes"
        for name in (*free, "batch_size_prompts", "max_prompts", "device"):
            values.pop(name)
        return {**values, **asdict(point), "reference": self.settings.reference}

    @override
    def point_fingerprints(self, point: CircuitPoint) -> dict[str, Any]:
        return self.inputs.fingerprints(point)

    def _path(self, point: CircuitPoint) -> Path:
        return self.folder / point.name / _RESULT

    def _used_file(self, point: CircuitPoint) -> Path:
        return self.folder / point.name / _USED_FILE

    @override
    def is_done(self, point: CircuitPoint) -> bool:
        return self._path(point).is_dir()

    @override
    def run_point(self, point: CircuitPoint) -> None:
        settings, inputs = self.settings, self.inputs
        with measured_in(self.folder / point.name / _COST_FILE):
            sae, used = inputs.sae(point.sae)
            write_whole(self._used_file(point), json.dumps(asdict(used), indent=1))
            found = circuits(
                sae,
                inputs.model,
                inputs.task(point),
                layers=inputs.layers,
                ablation=cast(Ablation, point.ablation),  # checked by the settings
                shares=settings.shares,
                counts=settings.counts,
                ranking=cast(Ranking, settings.ranking),
                random_control=settings.random_control,
                n_bootstrap=settings.n_bootstrap,
                batch_size_prompts=settings.batch_size_prompts,
                max_prompts=settings.max_prompts,
                found_gradients=inputs.gradients(point),
            )
        found.save(self._path(point))

    @override
    def values(self, point: CircuitPoint) -> dict[str, Any]:
        cost = vars(read_cost(self.folder / point.name / _COST_FILE))
        row: dict[str, Any] = {}
        if self.is_done(point):
            row = self._row_of(point, Circuits.load(self._path(point)))
        return {**point.keys, **row, **cost}

    def _row_of(self, point: CircuitPoint, found: Circuits) -> dict[str, Any]:
        used = UsedK(**read_json(self._used_file(point)))
        gap = np.nan if used.asked_fvu is None else used.fvu - used.asked_fvu
        values = {"k": found.k, "fvu": used.fvu, "fvu_gap": gap}
        return {**values, **found.summary.to_dict()}

    # Graphs

    def _write_graphs(self) -> None:
        """Write a graph of the first SAE of each label and of each task.

        Those that exist for the same inputs and settings are skipped. An error is
        logged and ends only that graph; a later call retries it.
        """
        graphs = GraphFolder(self.folder / GRAPHS_FOLDER)
        missing = {
            slug: (point, made_of)
            for slug, (point, made_of) in self._graphs().items()
            if not graphs.has(slug, made_of)
        }
        if missing:
            _ = self.inputs.model  # which no circuit needs if all are done
            self._check_folders()
        for slug, (point, made_of) in missing.items():
            try:
                graphs.add(self._graph(point, slug), made_of)
            except InterruptedException:
                raise
            except Exception:
                logger.exception(
                    "The attribution graph %s has failed; the circuits are saved, and "
                    "another call of the study retries the graph.",
                    slug,
                )

    def _graphs(self) -> dict[str, tuple[CircuitPoint, str]]:
        """The point of each graph by its name, and the hash of what it is made of."""
        settings, found = self.settings, dict[str, tuple[CircuitPoint, str]]()
        first = settings.seeds[0], settings.ablations[0]
        for point in self.points:
            if point.index == 0 and (point.seed, point.ablation) == first:
                record = Record.read(self.folder / point.name)
                inputs = record.settings | record.fingerprints
                made_of = hash_of_json([settings.n_graph_nodes, inputs])
                found[f"{point.label}_{point.task}"] = point, made_of
        return found

    def _graph(self, point: CircuitPoint, slug: str) -> dict[str, Any]:
        inputs = self.inputs
        sae, task, model = inputs.sae(point.sae)[0], inputs.task(point), inputs.model
        sizes: dict[str, Any] = {"n_nodes": self.settings.n_graph_nodes}
        return attribution_graph(
            sae, model, task, slug=slug, layers=inputs.layers, **sizes
        )
