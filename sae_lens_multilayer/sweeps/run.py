"""Runs the points of a sweep: each is trained, evaluated and analysed."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from sae_lens import SAE
from sae_lens.config import HfDataset
from sae_lens.training._interruption import InterruptedException
from tqdm.auto import tqdm

from sae_lens_multilayer.config import MultiLayerConfig
from sae_lens_multilayer.files import check_writable, locked, write_whole
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.pictures import describe_sweep, draw, save_figure
from sae_lens_multilayer.sweeps.evaluation import (
    SweepEvaluation,
    measure,
)
from sae_lens_multilayer.sweeps.point_folder import PointFolder
from sae_lens_multilayer.sweeps.points import (
    SIZES,
    Point,
    Settings,
    make_points,
    setting_of,
    varied_settings,
)
from sae_lens_multilayer.sweeps.workbench import Given, Workbench, model_of
from sae_lens_multilayer.text.prompts import Prompts
from sae_lens_multilayer.training.runner import MultiLayerSAETrainingRunner

logger = logging.getLogger(__name__)

TABLE_FILE = "table.csv"
FIGURE_FILE = "sweep.png"


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
    checkpoints and its `analysis`; beside them lie `table.csv` and `sweep.png`. Called
    again, it goes on: what is done is left alone, a run that was cut off goes on from
    its newest checkpoint (see `n_checkpoints`), and points that failed are tried again.
    A point that fails does not end the sweep.

    Args:
        base: What all points have in common: fields of `MultiLayerConfig` and, in `sae`
            or beside them, of the SAE's config. `expansion_factor` may stand for
            `d_sae`, and `d_in` is the model's width if left out.
        points: What each sets otherwise, in the same names, such as `grid` makes; also
            `name`, if its folder is not to be named by the settings.
        folder: Where everything goes.
        evaluation: What is measured, and on which text.
        override_model: Used by all points instead of loading `model_name`.
        override_dataset: Trained on by all points instead of `dataset_path`. Nothing
            tells whether it is the same when the sweep goes on.
        override_evaluation_dataset: Held-out text or tokens, instead of
            `evaluation.dataset_path`.

    Returns:
        A row for each point, in their order: the settings that vary, sizes, `status`
        ("done", "failed" or "waiting"), means over layers of what `evaluate` measures,
        numbers of the analyses, what training took (`Cost`), and `error`.

    Raises:
        ValueError: If a setting of any point is unknown or wrong, or other than it was
            when the point was begun; before a model is loaded.
        BlockingIOError: If another process is at work in the folder.
        InterruptedException: After SIGINT or SIGTERM while training; a checkpoint has
            been saved.
    """
    given = Given(override_model, override_dataset, override_evaluation_dataset)
    runs = Runs(base, points, folder, evaluation or SweepEvaluation(), given)
    table = runs.run()
    if (table.status == "done").any():
        picture = describe_sweep(table, varied_settings(runs.points))
        save_figure(draw(picture), runs.folder / FIGURE_FILE)
    return table


class Runs:
    """The points of a sweep, and what they are run with."""

    def __init__(
        self,
        base: Settings,
        points: Sequence[Settings],
        folder: str | Path,
        evaluation: SweepEvaluation,
        given: Given,
    ) -> None:
        """Check all points; no model is loaded. See `sweep`."""
        shape = None if given.model is None else as_model(given.model).shape
        self.points = make_points(base, points, shape)
        self.folder = Path(folder).expanduser()
        self._evaluation = evaluation
        text = evaluation.text(base)
        self._measured_as = evaluation.settings(text)
        check_writable(self.folder / "new", "folder")
        for point in self.points:
            self.folder_of(point).check(point.cfg, self._measured_as)
        self.bench = Workbench(self.points, evaluation, text, given)

    def folder_of(self, point: Point) -> PointFolder:
        """Where a point keeps what it has."""
        return PointFolder(self.folder / point.name)

    def run(self) -> pd.DataFrame:
        """Do what is not done yet; the table, which is also written point by point.

        Raises:
            BlockingIOError: If another process is at it.
        """
        models = list(dict.fromkeys(map(model_of, self.points)))
        in_order = sorted(self.points, key=lambda p: models.index(model_of(p)))
        with locked(self.folder):
            self._write_table()
            for point in tqdm(in_order, desc="Sweep", unit="point"):
                if not self.folder_of(point).is_done:
                    self._run(point)
                    self._write_table()
        return self.table()

    def _run(self, point: Point) -> None:
        folder = self.folder_of(point)
        logger.info("%s", folder.path)
        cfg = folder.begin(point.cfg)
        try:
            model, data = self.bench.load(point)
            self._check_tokens(point, data)
            if not folder.is_trained:
                self._train(folder, cfg, model)
            self._analyse(point, model, data)
        except InterruptedException:
            raise
        except Exception as error:
            # Whatever it was, the other points may do without it.
            folder.save_error(error)
            logger.error("%s has failed: %s", folder.path, folder.error)

    def _train(
        self, folder: PointFolder, cfg: MultiLayerConfig[Any], model: Any
    ) -> None:
        dataset = self.bench.given.dataset
        with folder.training():
            MultiLayerSAETrainingRunner(
                cfg, override_dataset=dataset, override_model=model
            ).run()

    def _analyse(self, point: Point, model: Any, data: Prompts) -> None:
        folder = self.folder_of(point)
        sae = SAE.load_from_disk(folder.sae, device=point.cfg.device)
        metrics, results = measure(sae, model, data, self._evaluation)
        folder.save_analysis(
            metrics, results, self._measured_as, data.fingerprint, model.tokenizer
        )

    def _check_tokens(self, point: Point, data: Prompts) -> None:
        for other in self.points:
            folder = self.folder_of(other)
            if not folder.is_done or model_of(other) != model_of(point):
                continue
            if folder.fingerprint != data.fingerprint:
                raise ValueError(
                    f"The held-out tokens must be those that {other.name} was measured "
                    "on; the text has changed since. Go on with that text, or move the "
                    f"folders {folder.analysis.name!r} of all points away to evaluate "
                    "them again."
                )

    def table(self) -> pd.DataFrame:
        """What is known of each point; see `sweep`."""
        names = varied_settings(self.points)
        rows = [self._row(point, names) for point in self.points]
        table = pd.DataFrame(rows, index=pd.Index([p.name for p in self.points]))
        return table.rename_axis("point")

    def _row(self, point: Point, varied: Sequence[str]) -> dict[str, Any]:
        folder = self.folder_of(point)
        settings = {name: setting_of(point, name) for name in (*varied, *SIZES)}
        status = "failed" if folder.error is not None else "waiting"
        status = "done" if folder.is_done else status
        measured = folder.values() if folder.is_done else {}
        cost = vars(folder.cost())
        took = {f"training_{name}": value for name, value in cost.items()}
        return {
            **settings,
            "status": status,
            **measured,
            **took,
            "error": folder.error,
        }

    def _write_table(self) -> None:
        write_whole(self.folder / TABLE_FILE, self.table().to_csv())
