"""One SAE for all layers beside one SAE for each: trained, measured, and their cost."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from sae_lens import SAE
from sae_lens.config import HfDataset

from sae_lens_multilayer import hooks
from sae_lens_multilayer.analysis import Comparison, TransferMatrix, transfer_matrix
from sae_lens_multilayer.files import complete_or_absent
from sae_lens_multilayer.lens.carrier import lens_of
from sae_lens_multilayer.models import loading
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.pictures import describe_costs, draw, save_figure
from sae_lens_multilayer.sweeps.evaluation import SweepEvaluation
from sae_lens_multilayer.sweeps.points import Settings, make_points
from sae_lens_multilayer.sweeps.run import Runs
from sae_lens_multilayer.sweeps.workbench import Given

MULTI_LAYER, SINGLE_LAYERS = "multi_layer", "single_layers"

_COSTS_FILE = "costs.csv"


class PointsFailedError(RuntimeError):
    """Some points of a sweep have failed, so that it cannot be compared."""


@dataclass
class SingleLayerRuns:
    """One SAE for all layers beside one SAE for each, on the same tokens."""

    comparison: Comparison
    """FVU, delta CE, KL divergence and more of both, by layer."""
    transfer: TransferMatrix | None
    """FVU of each single-layer SAE at every layer, and of the multi-layer SAE; None
    where the SAEs have a lens, as that of one layer is of no use at another."""
    costs: pd.DataFrame
    """What training each took (`Cost`), and its parameters. The row "single_layers"
    holds the sums, and of memory the highest, as they are trained one after the
    other."""

    def save(self, path: Path) -> None:
        """Write results, tables and pictures to a new folder."""
        figures = {
            "comparison": draw(self.comparison),
            "costs": draw(describe_costs(self.costs)),
        }
        with complete_or_absent(path) as folder:
            self.comparison.save(folder / "comparison")
            self.comparison.to_dataframe().to_csv(folder / "comparison.csv")
            if self.transfer is not None:
                self.transfer.save(folder / "transfer_matrix")
                self.transfer.to_dataframe().to_csv(folder / "transfer_matrix.csv")
                figures["transfer_matrix"] = draw(self.transfer)
            self.costs.to_csv(folder / _COSTS_FILE)
            for name, figure in figures.items():
                save_figure(figure, folder / f"{name}.png")

    @classmethod
    def load(cls, path: Path) -> "SingleLayerRuns":
        """Read what `save` wrote."""
        transfer = path / "transfer_matrix"
        return cls(
            Comparison.load(path / "comparison"),
            TransferMatrix.load(transfer) if transfer.exists() else None,
            pd.read_csv(path / _COSTS_FILE, index_col="sae"),
        )


def train_and_compare(
    base: Settings,
    folder: str | Path,
    *,
    evaluation: SweepEvaluation | None = None,
    override_model: Any | None = None,
    override_dataset: HfDataset | None = None,
    override_evaluation_dataset: HfDataset | None = None,
) -> SingleLayerRuns:
    """Train one SAE for all layers, and one for each, and compare them.

    It is a sweep over the layers: all settings are the same, the tokens too. The SAEs
    are at `multi_layer/sae` and, of each layer, at `layer_3/sae` and so on; results,
    tables and pictures are in `comparison`. Called again, it goes on as a sweep does.

    Args:
        base: Settings of the runs, as in `sweep`; `layers` says which are compared.
        folder: Where everything goes.
        evaluation: On which held-out text they are measured. Its analyses are not run.
        override_model, override_dataset, override_evaluation_dataset: As in `sweep`.

    Raises:
        ValueError: As `sweep`, or if there are fewer than two layers.
        PointsFailedError: If a training run has failed; the others are done.
        InterruptedException: As `sweep`.
    """
    evaluation = replace(evaluation or SweepEvaluation(), analyses=())
    given = Given(override_model, override_dataset, override_evaluation_dataset)
    runs = Runs(base, _points(base, override_model), folder, evaluation, given)
    table = runs.run()
    failed = table[table.status != "done"]
    if len(failed):
        reasons = "; ".join(f"{name}: {row.error}" for name, row in failed.iterrows())
        raise PointsFailedError(f"These could not be trained and measured: {reasons}")
    path = runs.folder / "comparison"
    newest = max(runs.folder_of(point).done_at for point in runs.points)
    if path.exists() and path.stat().st_mtime >= newest:
        return SingleLayerRuns.load(path)
    # What is there is of points that were done again since.
    shutil.rmtree(path, ignore_errors=True)
    found = _compare(runs, table, evaluation)
    found.save(path)
    return found


def _points(base: Settings, model: Any | None) -> list[dict[str, Any]]:
    """All layers, and each by itself."""
    shape = None if model is None else as_model(model).shape
    cfg = make_points(base, [{"name": MULTI_LAYER}], shape)[0].cfg
    if shape is None:
        shape = loading.named_shape(cfg)
    if shape is not None:
        names = cfg.resolve_hook_names(shape.n_layers)
    elif cfg.layers is not None or cfg.hook_names is not None:
        names = cfg.resolve_hook_names(max(cfg.layers or [0]) + 1)
    else:
        raise ValueError(
            f"It is not known how many layers {cfg.model_name!r} has: give `layers`."
        )
    if len(names) < 2:
        raise ValueError(f"There must be two or more layers to compare; got {names}.")
    return [
        {"name": MULTI_LAYER},
        *(
            {"name": label, "layers": None, "hook_names": [name]}
            for label, name in zip(hooks.layer_labels(names), names, strict=True)
        ),
    ]


def _compare(
    runs: Runs, table: pd.DataFrame, evaluation: SweepEvaluation
) -> SingleLayerRuns:
    multi_layer, *single_layers = [runs.folder_of(point) for point in runs.points]
    comparison = Comparison.of_tables(
        multi_layer.metrics, pd.concat([folder.metrics for folder in single_layers])
    )
    device = runs.points[0].cfg.device
    multi, *singles = [
        SAE.load_from_disk(runs.folder_of(point).sae, device=device)
        for point in runs.points
    ]
    transfer = None
    if lens_of(multi) is None:
        model, data = runs.bench.load(runs.points[0])
        transfer = transfer_matrix(
            singles,
            model,
            data,
            multi_layer=multi,
            batch_size_prompts=evaluation.batch_size_prompts,
            exclude_positions=evaluation.exclude_positions,
        )
    return SingleLayerRuns(comparison, transfer, _costs(table, [multi, *singles]))


def _costs(table: pd.DataFrame, saes: Sequence[SAE[Any]]) -> pd.DataFrame:
    costs = table[[name for name in table if str(name).startswith("training_")]].copy()
    costs["n_parameters"] = [sum(p.numel() for p in sae.parameters()) for sae in saes]
    singles = costs.drop(MULTI_LAYER)
    highest = singles.max(skipna=False)
    for name in ("training_seconds", "training_cpu_seconds", "n_parameters"):
        highest[name] = singles[name].sum(skipna=False)
    costs.loc[SINGLE_LAYERS] = highest
    return costs.rename_axis("sae").astype({"n_parameters": int})
