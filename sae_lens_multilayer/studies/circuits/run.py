"""The study of circuits: tasks, ablations and SAEs with labels, resumable."""

import json
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from sae_lens import SAE
from sae_lens.config import HfDataset
from torch import Tensor
from typing_extensions import override

from sae_lens_multilayer.files import check_writable, read_json, write_whole
from sae_lens_multilayer.models import loading
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.pictures import draw, save_figure
from sae_lens_multilayer.record import RECORD_FILENAME, Record, hash_of_json
from sae_lens_multilayer.studies.circuits.graph import attribution_graph, save_graph
from sae_lens_multilayer.studies.circuits.result import Circuits
from sae_lens_multilayer.studies.circuits.same_fvu import (
    match_fvu,
    mean_fvu,
    vectors_of_text,
)
from sae_lens_multilayer.studies.circuits.seeds import compare_seeds
from sae_lens_multilayer.studies.circuits.settings import (
    CircuitPoint,
    CircuitSettings,
)
from sae_lens_multilayer.studies.circuits.streams import (
    Ablation,
    Gradients,
    Streams,
    gradients,
)
from sae_lens_multilayer.studies.circuits.study import chosen_hooks, circuits
from sae_lens_multilayer.studies.circuits.table import CircuitTable
from sae_lens_multilayer.studies.circuits.tasks import Task, make_task
from sae_lens_multilayer.sweeps.cost import measured_in, read_cost
from sae_lens_multilayer.sweeps.resumable import ResumablePoints, check_all_done
from sae_lens_multilayer.text.prompts import Text

_RESULT, _COST_FILE, _SAES_FILE = "circuits", "cost.json", "saes.json"


def circuits_study(
    settings: CircuitSettings,
    folder: str | Path,
    *,
    override_model: Any | None = None,
    override_dataset: HfDataset | None = None,
) -> CircuitTable:
    """Find circuits for each task, ablation, SAE and seed, and compare labels.

    Each choice has a folder with its `Circuits`; beside them are `circuits.csv` (a row
    for each), `summary.csv` (means and intervals), `jaccard.csv`, the figures and the
    attribution graphs. A second call resumes the study.

    Args:
        folder: Folder of the study; another study's is an error.
        override_model, override_dataset: Used instead of the named ones.

    Raises:
        ValueError: If the SAEs lack a hook, the tokenizer lacks what a task needs, or a
            folder was made with other settings.
        PointsFailedError: If some choices have failed, after all others.
    """
    study = _Study(settings, Path(folder).expanduser(), override_model)
    study.dataset = override_dataset
    return study.run()


def run_settings(settings: dict[str, Any], folder: Path) -> list[pd.DataFrame]:
    """Run the study of a settings file (see `CircuitSettings`); tables to print."""
    result = circuits_study(CircuitSettings.from_settings(settings), folder)
    return [result.short_table(), result.jaccard_table()]


class _Study(ResumablePoints[CircuitPoint]):
    kind, point_kind = "circuits study", "circuits"
    dataset: HfDataset | None = None

    def __init__(self, settings: CircuitSettings, folder: Path, model: Any) -> None:
        self.settings, self.folder, self._given = settings, folder, model
        self.points = [
            CircuitPoint(label, index, sae, task, seed, ablation)
            for task in settings.tasks
            for seed in settings.seeds
            for ablation in settings.ablations
            for label, saes in settings.folders.items()
            for index, sae in enumerate(saes)
        ]
        self._tasks: dict[tuple[str, int], Task] = {}
        self._last: tuple[Path, Gradients] | None = None
        if (folder / RECORD_FILENAME).exists():
            Record.read(folder, self.kind)
        check_writable(folder / "new", "folder")
        for point in self.points:
            self.check_point_folder(point)

    def run(self) -> CircuitTable:
        """Run what is not done; write the result, figures and graphs."""
        if not all(map(self.is_done, self.points)):
            for point in self.points:
                self._task(point)  # wrong tokenizers fail before anything is run
        table = self.run_points(self.points, self.points)
        check_all_done(table, "These circuits have failed")
        found = {p: Circuits.load(self._path(p)) for p in self.points}
        rows = [{**p.keys, **self._row_of(p, one)} for p, one in found.items()]
        curves = [
            {**p.keys, **row}
            for p, one in found.items()
            for row in one.to_dataframe().to_dict("records")
        ]
        result = CircuitTable(
            rows, curves, compare_seeds(found, self.settings.jaccard_share)
        )
        for name, picture in result.pictures().items():
            save_figure(draw(picture), self.folder / f"{name}.png")
        result.to_dataframe().to_csv(self.folder / "circuits.csv", index=False)
        result.summary().to_csv(self.folder / "summary.csv", index=False)
        result.jaccard_table().to_csv(self.folder / "jaccard.csv", index=False)
        return result

    # Points

    @override
    def point_settings(self, point: CircuitPoint) -> dict[str, Any]:
        values = asdict(self.settings)
        free = "saes", "tasks", "seeds", "ablations", "jaccard_share", "n_graph_nodes"
        for name in (*free, "batch_size_prompts", "max_prompts", "device"):
            values.pop(name)
        return {**values, **asdict(point), "reference": self._reference}

    @property
    def _reference(self) -> str:
        return next(iter(self.settings.folders.values()))[0]

    def _path(self, point: CircuitPoint) -> Path:
        return self.folder / point.name / _RESULT

    @override
    def is_done(self, point: CircuitPoint) -> bool:
        return self._path(point).is_dir()

    @override
    def run_point(self, point: CircuitPoint) -> None:
        settings = self.settings
        with measured_in(self.folder / point.name / _COST_FILE):
            found = circuits(
                self._sae(point.sae),
                self.model,
                self._task(point),
                layers=self._layers,
                ablation=cast(Ablation, point.ablation),  # checked by the settings
                shares=settings.shares,
                random_control=settings.random_control,
                n_bootstrap=settings.n_bootstrap,
                batch_size_prompts=settings.batch_size_prompts,
                max_prompts=settings.max_prompts,
                found_gradients=self._gradients(point),
            )
        self._save_graph(point)
        found.save(self._path(point))

    @override
    def values(self, point: CircuitPoint) -> dict[str, Any]:
        cost = vars(read_cost(self.folder / point.name / _COST_FILE))
        row: dict[str, Any] = {}
        if self.is_done(point):
            row = self._row_of(point, Circuits.load(self._path(point)))
        return {**point.keys, **row, **cost}

    def _row_of(self, point: CircuitPoint, found: Circuits) -> dict[str, Any]:
        fvu = self._saes_on_disk().get(point.sae, {}).get("fvu", np.nan)
        return {"k": found.k, "fvu": fvu, **found.summary.to_dict()}

    def _save_graph(self, point: CircuitPoint) -> None:
        path = self.folder / f"graph_{point.label}_{point.task}.json"
        n_nodes = self.settings.n_graph_nodes
        if not n_nodes or point.index or path.exists():
            return
        sae, task = self._sae(point.sae), self._task(point)
        sizes: dict[str, Any] = {"layers": self._layers, "n_nodes": n_nodes}
        save_graph(
            attribution_graph(sae, self.model, task, slug=path.stem, **sizes), path
        )

    # Inputs

    @cached_property
    def _metadata(self) -> Any:
        return SAE.load_from_disk(self._reference, device="cpu").cfg.metadata

    @cached_property
    def model(self) -> Any:
        """The model given, or that of the settings or of the first SAE."""
        if self._given is not None:
            return self._given
        settings, metadata = self.settings, self._metadata
        return loading.load_by_name(
            settings.model_class_name or metadata.model_class_name,
            settings.model_name or metadata.model_name,
            dict(settings.model_kwargs),
            settings.device,
            list(metadata.hook_names),
        )

    @cached_property
    def _layers(self) -> list[str]:
        return chosen_hooks(
            SAE.load_from_disk(self._reference, device="cpu"), self.settings.layers
        )

    def _task(self, point: CircuitPoint) -> Task:
        key = point.task, point.seed
        if key not in self._tasks:
            tokenizer = as_model(self.model).tokenizer
            bos = bool(self._metadata.prepend_bos)
            n_prompts = self.settings.n_prompts
            self._tasks[key] = make_task(
                point.task, tokenizer, n_prompts, point.seed, bos
            )
        return self._tasks[key]

    def _gradients(self, point: CircuitPoint) -> Gradients:
        """Gradients of a task, which all SAEs share; computed once and saved."""
        settings = self.settings
        made_of = hash_of_json([settings.of_prompts, self._layers])[:8]
        name = f"gradients_{point.task}-{point.seed}_{point.ablation}_{made_of}"
        path = self.folder / name
        if self._last is None or self._last[0] != path:
            if not path.exists():
                self._compute_gradients(point).save(path)
            self._last = path, Gradients.load(path)
        return self._last[1]

    def _compute_gradients(self, point: CircuitPoint) -> Gradients:
        lm, task, settings = as_model(self.model), self._task(point), self.settings
        streams = Streams.of(lm, task, self._layers, settings.batch_size_prompts)
        options: Any = {name: getattr(settings, name) for name in ("method", "n_steps")}
        options |= {"batch_size_prompts": settings.batch_size_prompts}
        args = lm, task, self._layers, streams
        return gradients(*args, ablation=cast(Ablation, point.ablation), **options)

    # SAEs with equal FVU

    def _sae(self, path: str) -> SAE[Any]:
        """An SAE with the k of the study."""
        sae = SAE.load_from_disk(path, device=self.settings.device)
        sae.cfg.k = self._with_fvu(path, sae)["k"]
        return sae

    def _saes_on_disk(self) -> dict[str, dict[str, Any]]:
        file = self.folder / _SAES_FILE
        return read_json(file) if file.exists() else {}

    def _with_fvu(self, path: str, sae: Any) -> dict[str, Any]:
        """k and FVU of an SAE in this study, found once and saved."""
        known = self._saes_on_disk()
        if path not in known:
            k, names = sae.cfg.k, self._layers
            if path == self._reference or not self.settings.match_fvu:
                fvu = mean_fvu(sae, self._text, names)
            else:
                reference = self._with_fvu(
                    self._reference, SAE.load_from_disk(self._reference)
                )
                fvu = match_fvu(sae, self._text, names, reference["fvu"])
            known = self._saes_on_disk()
            known[path] = {"k": sae.cfg.k, "fvu": fvu, "k_trained": k}
            write_whole(self.folder / _SAES_FILE, json.dumps(known, indent=1))
        return known[path]

    @cached_property
    def _text(self) -> Tensor:
        """Vectors [layer, token, d_in] of held-out text at positions that count."""
        settings = self.settings
        given = {n: getattr(settings, n) for n in ("dataset_path", "context_size")}
        text = Text.from_settings(self._metadata, **given)
        prompts = text.prompts(self.model, settings.n_tokens, self.dataset)
        lm, size = as_model(self.model), settings.batch_size_prompts
        with torch.no_grad():
            x = vectors_of_text(lm, prompts.ids, self._layers, size)
        counted = prompts.counted.clone()
        counted[:, 0] = False  # an attention sink would be most of the variance
        return x[:, counted]
