"""Runs a sweep: each point is trained, evaluated and analysed, and is a table row."""

import gc
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from sae_lens import SAE
from sae_lens.config import HfDataset
from typing_extensions import override

from sae_lens_multilayer.analysis.suite import load_results, save_results
from sae_lens_multilayer.config import LATEST, MultiLayerConfig
from sae_lens_multilayer.files import check_writable, complete_or_absent, free_path
from sae_lens_multilayer.models import loading
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.models.model import ModelShape
from sae_lens_multilayer.pictures import describe_sweep, draw, save_figure
from sae_lens_multilayer.record import RECORD_FILENAME, Record
from sae_lens_multilayer.store.source import Source
from sae_lens_multilayer.sweeps.cost import measured_in, read_cost
from sae_lens_multilayer.sweeps.evaluation import SweepEvaluation, measure, numbers_of
from sae_lens_multilayer.sweeps.points import (
    SIZES,
    Point,
    Settings,
    make_points,
    varied_settings,
)
from sae_lens_multilayer.sweeps.resumable import TABLE_FILE, ResumablePoints
from sae_lens_multilayer.text.prompts import Prompts, Text, check_positions
from sae_lens_multilayer.training.lens_of_run import lens_of_run
from sae_lens_multilayer.training.run import hooks_of_run
from sae_lens_multilayer.training.runner import MultiLayerSAETrainingRunner

logger = logging.getLogger(__name__)

_FIGURE_FILE = "sweep.png"
COST_FILE = "cost.json"

_ANALYSIS_KIND = "sweep analysis"


def sweep(
    base: Settings,
    points: Sequence[Settings],
    folder: str | Path,
    *,
    evaluation: SweepEvaluation | None = None,
    override_model: Any | None = None,
    override_dataset: HfDataset | None = None,
    override_evaluation_dataset: HfDataset | None = None,
) -> pd.DataFrame:
    """Train, evaluate and analyse an SAE for each of many choices of settings.

    Each point has a folder, named by its settings, with its SAE (`sae`), its
    checkpoints and its `analysis`; beside these folders are `table.csv` and
    `sweep.png`. A point that fails does not end the sweep. A second call resumes it:
    points that are done are skipped, an interrupted run is resumed from its newest
    checkpoint (see `n_checkpoints`), and failed points are retried.

    Args:
        base: Settings of all points: fields of `MultiLayerConfig` and, in `sae` or
            beside them, of the SAE's config. `expansion_factor` may replace `d_sae`;
            `d_in` is the model's width if omitted.
        points: Settings of each point that differ from the base, such as `grid`
            returns, and optionally `name`, the name of its folder.
        override_model: Used by all points instead of loading `model_name`.
        override_dataset: Trained on by all points instead of `dataset_path`. A resumed
            sweep must receive the same one, which is not checked.
        override_evaluation_dataset: Held-out text or tokens, instead of
            `evaluation.dataset_path`.

    Returns:
        A row for each point, in order: the settings that vary, sizes, `status`
        ("done", "failed" or "waiting"), means over layers of the metrics of `evaluate`,
        numbers of the analyses, the cost of training (`Cost`), and `error`.

    Raises:
        ValueError: If a setting of any point is invalid or differs from the one in the
            point's folder; before a model is loaded.
        InterruptedException: After SIGINT or SIGTERM while training; a checkpoint has
            been saved.
    """
    runs = Sweep(
        base,
        points,
        folder,
        evaluation or SweepEvaluation(),
        override_model,
        override_dataset,
        override_evaluation_dataset,
    )
    path = runs.folder / _FIGURE_FILE
    is_resumed = (runs.folder / RECORD_FILENAME).exists()
    table = runs.run()
    if (table.status == "done").any():
        picture = describe_sweep(table, varied_settings(runs.points))
        # A picture from before the sweep began is not of this sweep.
        save_figure(draw(picture), path if is_resumed else free_path(path))
    return table


def train_in(
    folder: Path,
    cfg: MultiLayerConfig[Any],
    model: Any | None = None,
    dataset: HfDataset | None = None,
    source: Source | None = None,
) -> None:
    """Train an SAE in a folder, or continue from its newest checkpoint there.

    The SAE is in `sae`, its checkpoints in `checkpoints`, the cost in `cost.json`.
    """
    own = cfg.replaced(
        output_path=str(folder / "sae"),
        checkpoint_path=str(folder / "checkpoints"),
        resume_from_checkpoint=LATEST,
    )
    with measured_in(folder / COST_FILE):
        MultiLayerSAETrainingRunner(
            own, dataset, override_model=model, override_source=source
        ).run()


class Sweep(ResumablePoints[Point]):
    """The points of a sweep, their folders, and the model and prompts they share."""

    kind, point_kind = "sweep", "sweep point"

    def __init__(
        self,
        base: Settings,
        points: Sequence[Settings],
        folder: str | Path,
        evaluation: SweepEvaluation,
        model: Any | None,
        dataset: HfDataset | None,
        held_out: HfDataset | None,
    ) -> None:
        """Validate all settings, folders and data; no model is loaded. See `sweep`."""
        shape = None if model is None else as_model(model).shape
        self.points = make_points(base, points, shape)
        self.folder, self.evaluation = Path(folder).expanduser(), evaluation
        self._text = evaluation.text(base)
        self._given_model, self._dataset, self._held_out = model, dataset, held_out
        self._model, self._loaded_key = model, ""
        self._prompts: Prompts | None = None
        self._check_folder()
        self._check_data()
        self._check_models()

    def analysis_of(self, point: Point) -> Path:
        """Folder of the results of a point: complete or absent."""
        return self.folder / point.name / "analysis"

    def sae_of(self, point: Point) -> SAE[Any]:
        """The trained SAE of a point."""
        path = self.folder / point.name / "sae"
        return SAE.load_from_disk(path, device=point.cfg.device)

    def _check_folder(self) -> None:
        outputs = {TABLE_FILE, _FIGURE_FILE, "comparison"}
        if (self.folder / RECORD_FILENAME).exists():
            Record.read(self.folder, self.kind)
        elif taken := outputs & {path.name for path in self.folder.glob("*")}:
            raise FileExistsError(f"{self.folder}: {taken} would be overwritten.")
        check_writable(self.folder / "new", "folder")
        for point in self.points:
            self._check_point_folder(point)

    def _check_point_folder(self, point: Point) -> None:
        self.check_point_folder(point)
        if self.is_done(point):
            self._check_analysis(point, self._analysis_record())

    def _check_analysis(self, point: Point, wanted: Record) -> None:
        advice = "Use those, or move the 'analysis' of all points away."
        Record.read_same(self.analysis_of(point), wanted, advice)

    def _check_data(self) -> None:
        path = self.evaluation.dataset_path
        if (path is None) == (self._held_out is None):
            raise ValueError(
                "For held-out text, give `dataset_path` of `evaluation` or a dataset, "
                "and not both."
            )
        texts = [] if path is None else [self._text]
        if self._dataset is None:
            texts += [Text.from_config(point.cfg) for point in self.points]
        for index, text in enumerate(texts):
            if text not in texts[:index]:
                text.load_dataset()

    def _check_models(self) -> None:
        given = self._given_model
        if given is not None and len({p.model_key for p in self.points}) > 1:
            raise ValueError("The model must not vary, as one is given.")
        for point in self.points:
            if (shape := self._shape(point)) is not None:
                hook_names = hooks_of_run(point.cfg, shape)
                lens_of_run(point.cfg, hook_names, shape)
                if given is None:
                    loading.check_modules(*point.cfg.named_model, hook_names)

    def _shape(self, point: Point) -> ModelShape | None:
        if self._given_model is None:
            return loading.shape_by_name(*point.cfg.named_model)
        return as_model(self._given_model).shape

    @override
    def is_done(self, point: Point) -> bool:
        return self.analysis_of(point).is_dir()

    def _analysis_record(self, prompts: Prompts | None = None) -> Record:
        tokens = {} if prompts is None else {"tokens": prompts.fingerprint}
        return Record(_ANALYSIS_KIND, self.evaluation.settings(self._text), tokens)

    def load(self, point: Point) -> tuple[Any, Prompts]:
        """The model of a point and its held-out prompts; the last ones are kept."""
        if self._loaded_key != point.model_key:
            self._loaded_key, self._prompts = "", None
            if self._given_model is None:
                self._model = None
                gc.collect()  # before the next one is allocated
                self._model = loading.load_by_name(
                    *point.cfg.named_model,
                    point.cfg.llm_device,
                    self._hook_names(point),
                )
            self._loaded_key = point.model_key
        if self._prompts is None:
            n_tokens = self.evaluation.n_tokens
            prompts = self._text.prompts(self._model, n_tokens, self._held_out)
            excluded = self.evaluation.exclude_positions
            check_positions("exclude_positions", excluded, prompts.ids)
            self._prompts = prompts
        return self._model, self._prompts

    def _hook_names(self, point: Point) -> list[str] | None:
        """The hooks of all points that share a model; None if unknown."""
        if (shape := self._shape(point)) is None:
            return None
        alike = [p for p in self.points if p.model_key == point.model_key]
        names = [n for p in alike for n in p.cfg.resolve_hook_names(shape.n_layers)]
        return list(dict.fromkeys(names))

    def run(self) -> pd.DataFrame:
        """Run the points that are not done; returns the table, also written to disk."""
        keys = [point.model_key for point in self.points]
        in_order = sorted(self.points, key=lambda point: keys.index(point.model_key))
        return self.run_points(self.points, in_order)

    @override
    def point_settings(self, point: Point) -> dict[str, Any]:
        return point.cfg.decisive_settings()

    @override
    def run_point(self, point: Point) -> None:
        model, prompts = self.load(point)
        self._check_tokens(point, prompts)
        if not (self.folder / point.name / "sae").is_dir():
            self._train(point, model)
        self._analyse(point, model, prompts)

    def _train(self, point: Point, model: Any) -> None:
        train_in(self.folder / point.name, point.cfg, model, self._dataset)

    def _analyse(self, point: Point, model: Any, prompts: Prompts) -> None:
        results = measure(self.sae_of(point), model, prompts, self.evaluation)
        with complete_or_absent(self.analysis_of(point)) as new:
            save_results(results, new, model.tokenizer)
            self._analysis_record(prompts).write(new)

    def _check_tokens(self, point: Point, prompts: Prompts) -> None:
        for other in self.points:
            if self.is_done(other) and other.model_key == point.model_key:
                self._check_analysis(other, self._analysis_record(prompts))

    @override
    def values(self, point: Point) -> dict[str, Any]:
        folder = self.folder / point.name
        numbers: dict[str, Any] = {}
        if self.is_done(point):
            numbers = numbers_of(load_results(self.analysis_of(point)))
        cost = vars(read_cost(folder / COST_FILE))
        return {
            **{n: point.setting(n) for n in (*varied_settings(self.points), *SIZES)},
            **numbers,
            **{f"training_{name}": value for name, value in cost.items()},
        }
