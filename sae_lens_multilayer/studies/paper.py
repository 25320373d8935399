"""Every table and figure of the paper for a chosen model and sizes, in one study."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
from sae_lens.config import HfDataset

from sae_lens_multilayer.analysis.distributions import DistributionSums
from sae_lens_multilayer.analysis.stream import analyze
from sae_lens_multilayer.analysis.suite import load_results
from sae_lens_multilayer.analysis.tables import markdown
from sae_lens_multilayer.config_files import check_known, mapping
from sae_lens_multilayer.files import write_whole
from sae_lens_multilayer.pictures import draw, save_figure
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.studies.comparison import (
    ComparisonSettings,
    comparison_study,
)
from sae_lens_multilayer.studies.paper_claims import ANALYSES, LENS, PaperStudy
from sae_lens_multilayer.sweeps.evaluation import SweepEvaluation
from sae_lens_multilayer.sweeps.points import Settings
from sae_lens_multilayer.sweeps.resumable import check_all_done
from sae_lens_multilayer.sweeps.sweep import Sweep

PAGE_FILE, CLAIMS_FILE = "paper.md", "claims.csv"
COLUMNS = (
    "expansion_factor",
    "k",
    "fvu",
    "fvu_scalar",
    "mse",
    "delta_ce",
    "kl_div",
    "mean_max_cos_sim",
    "latent_ratio",
    "token_ratio",
)
"""Columns of the page's table; `fvu_scalar` is the paper's FVU."""


@dataclass(frozen=True)
class PaperSettings:
    """What the study trains and measures; a YAML file holds the same names."""

    base: Settings
    """Settings of all runs, as in `sweep`, without `expansion_factor` and `k`."""
    expansion_factors: Sequence[int | float] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    """R = d_sae / d_in of the runs at the first of `ks`."""
    ks: Sequence[int] = (32, 16, 64, 128, 256, 512)
    """k of the runs at `expansion_factor`; the first is that of all other runs."""
    expansion_factor: int | float = 64
    """R of the runs over k, with a lens, and at single layers."""
    lens: str | None = None
    """Of the run with a lens, as in the config; None: no such run."""
    single_layers: bool = True
    """Whether to train an SAE for each layer too."""
    prompt: str = "When John and Mary went to the store, John gave a drink to Mary."
    """Text of the figure with the layers of each latent at a single prompt."""
    evaluation: SweepEvaluation = field(default_factory=SweepEvaluation)
    """Held-out text. Its analyses are replaced by those of the paper."""

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "PaperSettings":
        """The settings of a file, which may omit all but `base`."""
        check_known([*settings], [one.name for one in fields(cls)])
        evaluation = SweepEvaluation.from_settings(mapping(settings, "evaluation"))
        values: dict[str, Any] = {**settings, "evaluation": evaluation}
        return cls(**values)

    def __post_init__(self) -> None:
        for name in ("expansion_factors", "ks"):
            values: Any = getattr(self, name)
            if not isinstance(values, (list, tuple)) or not values:
                raise ValueError(f"`{name}` must be a list of numbers; got {values!r}.")
        if fixed := {"expansion_factor", "d_sae", "k"} & {
            *self.base,
            *mapping(self.base, "sae"),
        }:
            raise ValueError(
                f"`base` must not set {sorted(fixed)}: these vary; use "
                "`expansion_factors`, `expansion_factor` and `ks`."
            )

    @property
    def default(self) -> dict[str, Any]:
        """The settings shared by the runs with a lens and at single layers."""
        return {"expansion_factor": self.expansion_factor, "k": self.ks[0]}

    @property
    def default_name(self) -> str:
        """Name of the run with the default settings and no lens."""
        return _name(self.default)

    def points(self) -> list[dict[str, Any]]:
        """The multi-layer runs: over R, over k, and with the lens."""
        sizes = [self.default]
        sizes += [
            {**self.default, "expansion_factor": r} for r in self.expansion_factors
        ]
        sizes += [{**self.default, "k": k} for k in self.ks]
        points = {_name(size): {**size, "name": _name(size)} for size in sizes}
        if self.lens is not None:
            points[LENS] = {
                **self.default,
                "lens": self.lens,
                "name": LENS,
            }
        return [*points.values()]


def paper_study(
    settings: PaperSettings,
    folder: str | Path,
    *,
    override_model: Any | None = None,
    override_dataset: HfDataset | None = None,
    override_evaluation_dataset: HfDataset | None = None,
) -> PaperStudy:
    """Train, evaluate and analyse what the paper shows, and write its page.

    The runs are a sweep in `sweep`; the single-layer SAEs are in `single_layers`. A
    second call resumes both. The figures, `claims.csv` and the page `paper.md` are
    written again each time.

    Args:
        settings: Sizes, text and model.
        folder: New, or that of an earlier call with the same settings.
        override_model, override_dataset, override_evaluation_dataset: As in `sweep`.

    Raises:
        ValueError: If a setting is invalid, before a model is loaded.
        PointsFailedError: If runs have failed, after all others.

    References:
        Lawson et al. (2025), arXiv:2409.04185.
    """
    folder = Path(folder).expanduser()
    evaluation = replace(settings.evaluation, analyses=ANALYSES)
    data = (override_model, override_dataset, override_evaluation_dataset)
    runs = Sweep(settings.base, settings.points(), folder / "sweep", evaluation, *data)
    table = runs.run()
    check_all_done(table, "These runs failed")
    results = {p.name: load_results(runs.analysis_of(p)) for p in runs.points}
    single = None
    if settings.single_layers:
        of_both = {**settings.base, **settings.default}
        single = comparison_study(
            ComparisonSettings(of_both, evaluation=evaluation),
            folder / "single_layers",
            override_model=override_model,
            override_dataset=override_dataset,
            override_evaluation_dataset=override_evaluation_dataset,
        )
    study = PaperStudy(
        table,
        results[settings.default_name],
        results.get(LENS, {}),
        _of_prompt(runs, settings),
        single,
    )
    _write_page(study, runs, folder)
    return study


def run_settings(settings: dict[str, Any], folder: Path) -> list[pd.DataFrame]:
    """Run the study of a settings file (see `PaperSettings`); tables to print."""
    study = paper_study(PaperSettings.from_settings(settings), folder)
    columns = [name for name in COLUMNS if name in study.table]
    claims = study.claims().set_index("claim").drop(columns="source")
    return [study.table.filter(columns), claims]


def _name(size: Mapping[str, Any]) -> str:
    return f"R{size['expansion_factor']:g}_k{size['k']}"


def _of_prompt(runs: Sweep, settings: PaperSettings) -> Result:
    """The layers of each latent at one prompt."""
    point = next(p for p in runs.points if p.name == settings.default_name)
    model, _ = runs.load(point)
    ids = model.tokenizer(settings.prompt, return_tensors="pt")["input_ids"]
    sae: Any = runs.sae_of(point)
    return analyze(sae, model, ids, DistributionSums(sae))[0]


def _write_page(study: PaperStudy, runs: Sweep, folder: Path) -> None:
    """Write the figures, `claims.csv` and the page."""
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    claims, pictures = study.claims(), study.pictures()
    write_whole(folder / CLAIMS_FILE, claims.to_csv(index=False))
    for name, picture in pictures.items():
        save_figure(draw(picture), figures / f"{name}.png")
    cfg: Any = runs.points[0].cfg
    numbers = study.table[[n for n in COLUMNS if n in study.table]]
    verdicts = claims.assign(
        holds=claims.holds.map({True: "yes", False: "no"}).fillna("not measured")
    )
    lines = [
        "# The paper's tables and figures",
        f"Model {cfg.model_name}, {cfg.training_tokens:,} training tokens, "
        f"{int(study.table.n_tokens.iloc[0]):,} held-out tokens. Claims are of Lawson "
        "et al. (2025), arXiv:2409.04185.",
        "## Claims",
        markdown(verdicts),
        "## Reconstruction, loss and layers, means over layers",
        markdown(numbers.rename_axis("run").reset_index()),
        *(
            f"## {p.title}\n\n![{p.title}](figures/{n}.png)\n\n{p.caption}"
            for n, p in pictures.items()
        ),
    ]
    write_whole(folder / PAGE_FILE, "\n\n".join(lines) + "\n")
