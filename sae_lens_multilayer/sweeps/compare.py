"""One SAE for all layers compared with one SAE for each: training, metrics and cost."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from sae_lens.config import HfDataset

from sae_lens_multilayer import hooks
from sae_lens_multilayer.analysis.transfer import (
    Comparison,
    TransferMatrix,
    transfer_matrix,
)
from sae_lens_multilayer.evaluation.metrics import SpliceMetrics
from sae_lens_multilayer.files import beside, complete_or_absent, save_somewhere
from sae_lens_multilayer.lens.carrier import lens_of
from sae_lens_multilayer.models import loading
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.pictures import describe_costs, draw, save_figure
from sae_lens_multilayer.sweeps.evaluation import SweepEvaluation
from sae_lens_multilayer.sweeps.points import Settings, make_points
from sae_lens_multilayer.sweeps.resumable import check_all_done
from sae_lens_multilayer.sweeps.sweep import Sweep

logger = logging.getLogger(__name__)

MULTI_LAYER, SINGLE_LAYERS = "multi_layer", "single_layers"
_COSTS_FILE = "costs.csv"


@dataclass
class SingleLayerRuns:
    """One SAE for all layers and one for each, measured on the same tokens."""

    comparison: Comparison
    """FVU, delta CE, KL divergence and more of both, by layer."""
    transfer: TransferMatrix | None
    """FVU of each single-layer SAE at every layer, and of the multi-layer SAE; None if
    the SAEs have a lens, as a lens of one layer has no translator for another."""
    costs: pd.DataFrame
    """Cost of training each (`Cost`), and its parameters. The row "single_layers" has
    the sums, but of memory the highest, as these are trained one after the other."""

    def save(self, path: Path) -> None:
        """Write results, tables and pictures to a new folder."""
        results = {"comparison": self.comparison, "transfer_matrix": self.transfer}
        with complete_or_absent(path) as folder:
            for name, result in results.items():
                if result is not None:
                    result.save(folder / name)
                    result.to_dataframe().to_csv(folder / f"{name}.csv")
                    save_figure(draw(result), folder / f"{name}.png")
            self.costs.to_csv(folder / _COSTS_FILE)
            save_figure(draw(describe_costs(self.costs)), folder / "costs.png")

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

    This is a sweep over the layers with otherwise equal settings and tokens. The SAEs
    are at `multi_layer/sae` and, for each layer, at `layer_3/sae` and so on; results,
    tables and pictures are in `comparison`. A second call resumes as a sweep does.

    Args:
        base: Settings of the runs, as in `sweep`; `layers` are those compared.
        evaluation: Held-out text to measure on. Its analyses are not run.
    """
    runs = Sweep(
        base,
        _points(base, override_model),
        folder,
        replace(evaluation or SweepEvaluation(), analyses=()),
        override_model,
        override_dataset,
        override_evaluation_dataset,
    )
    table = runs.run()
    check_all_done(table, "These could not be trained and measured")
    path = runs.folder / "comparison"
    newest = max(runs.analysis_of(point).stat().st_mtime for point in runs.points)
    if path.exists() and path.stat().st_mtime >= newest:
        return SingleLayerRuns.load(path)
    found = _compare(runs, table)
    if path.exists():  # it is older than the points
        logger.info("The earlier one is moved to %s.", path.rename(beside(path)))
    save_somewhere(path, found.save)
    return found


def _points(base: Settings, model: Any | None) -> list[dict[str, Any]]:
    """A point with all layers, and one for each layer."""
    shape = None if model is None else as_model(model).shape
    cfg = make_points(base, [{"name": MULTI_LAYER}], shape)[0].cfg
    shape = shape or loading.shape_by_name(*cfg.named_model)
    n_layers = max(cfg.layers or [0]) + 1 if shape is None else shape.n_layers
    names = cfg.resolve_hook_names(n_layers)
    if len(names) < 2:
        raise ValueError(f"Give two or more layers to compare; got {names}.")
    singles = [
        {"name": label, "layers": None, "hook_names": [name]}
        for label, name in zip(hooks.layer_labels(names), names, strict=True)
    ]
    return [{"name": MULTI_LAYER}, *singles]


def _compare(runs: Sweep, table: pd.DataFrame) -> SingleLayerRuns:
    multi_metrics, *metrics = [
        SpliceMetrics.load(runs.analysis_of(point) / "evaluation").to_dataframe()
        for point in runs.points
    ]
    multi, *singles = map(runs.sae_of, runs.points)
    transfer = None
    if lens_of(multi) is None:
        model, prompts = runs.load(runs.points[0])
        transfer = transfer_matrix(
            singles,
            model,
            prompts,
            multi_layer=multi,
            batch_size_prompts=runs.evaluation.batch_size_prompts,
            exclude_positions=runs.evaluation.exclude_positions,
        )
    n_parameters = [
        sum(p.numel() for p in sae.parameters()) for sae in [multi, *singles]
    ]
    return SingleLayerRuns(
        Comparison.of_tables(multi_metrics, pd.concat(metrics)),
        transfer,
        _costs(table, n_parameters),
    )


def _costs(table: pd.DataFrame, n_parameters: list[int]) -> pd.DataFrame:
    costs = table[[name for name in table if str(name).startswith("training_")]].copy()
    costs["n_parameters"] = n_parameters
    singles = costs.drop(MULTI_LAYER)
    total = singles.max(skipna=False)
    for name in ("training_seconds", "training_cpu_seconds", "n_parameters"):
        total[name] = singles[name].sum(skipna=False)
    costs.loc[SINGLE_LAYERS] = total
    return costs.rename_axis("sae").astype({"n_parameters": int})
