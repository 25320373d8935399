"""The synthetic study: a grid of streams, seeds and arms, resumable."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd
from sae_lens import LoggingConfig
from typing_extensions import override

from sae_lens_multilayer.config import MultiLayerConfig
from sae_lens_multilayer.config_files import check_known, config_from_settings, mapping
from sae_lens_multilayer.files import check_writable
from sae_lens_multilayer.lens.lens import LayerLens
from sae_lens_multilayer.pictures import draw, save_figure
from sae_lens_multilayer.record import RECORD_FILENAME, Record
from sae_lens_multilayer.studies.synthetic.arms import ARMS, Bench
from sae_lens_multilayer.studies.synthetic.config import StreamConfig
from sae_lens_multilayer.studies.synthetic.metrics import recovery
from sae_lens_multilayer.studies.synthetic.results import SyntheticResult
from sae_lens_multilayer.studies.synthetic.streams import SyntheticStream
from sae_lens_multilayer.sweeps.cost import available_bytes, measured_in, read_cost
from sae_lens_multilayer.sweeps.points import Settings, combine, grid, point_name
from sae_lens_multilayer.sweeps.resumable import ResumablePoints, check_all_done

_TRAINING: dict[str, Any] = {
    "sae": {"d_sae": 512, "k": 4, "dead_after_tokens": 20_000},
    "training_tokens": 200_000,
    "train_batch_size_tokens": 512,
    "lr": 3e-3,
    "n_batches_in_buffer": 64,
    "verbose": False,
}
"""Settings of all runs that a study leaves out."""
_RESULT = "recovery"
_COST_FILE = "cost.json"


@dataclass(frozen=True)
class SyntheticSettings:
    """What the study generates, trains and measures; a YAML file has the same names."""

    seeds: Sequence[int]
    """Seeds of streams and of training; intervals are over them."""
    base: Settings = field(default_factory=dict[str, Any])
    """Factors of all streams: fields of `StreamConfig` without `seed`."""
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict[str, Any])
    """Values of factors that vary, all combinations."""
    points: Sequence[Settings] = ({},)
    """Factors of single streams, each combined with the grid."""
    arms: Sequence[str] = tuple(ARMS)
    """Names in `ARMS`."""
    training: Settings = field(default_factory=dict[str, Any])
    """Settings of all runs: fields of `MultiLayerConfig`, those of the SAE in `sae`."""
    n_epochs: int = 1
    """How often the training tokens are seen."""
    n_eval_tokens: int = 16_384
    """Held-out tokens, in whole prompts."""

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "SyntheticSettings":
        """The settings of a file, which may omit all but `seeds`."""
        check_known([*settings], [one.name for one in fields(cls)])
        values: dict[str, Any] = {"seeds": (), **settings}
        return cls(**values)

    def __post_init__(self) -> None:
        seeds: Any = self.seeds
        if not isinstance(seeds, (list, tuple)) or not seeds:
            raise ValueError(
                "`seeds` must be a list of whole numbers, five or more for intervals; "
                f"got {seeds!r}."
            )
        if unknown := [name for name in self.arms if name not in ARMS]:
            raise ValueError(f"`arms` must be among {[*ARMS]}; got {unknown}.")
        for name in ("n_epochs", "n_eval_tokens"):
            if not getattr(self, name) >= 1:
                raise ValueError(
                    f"`{name}` must be positive; got {getattr(self, name)}."
                )


@dataclass(frozen=True)
class StreamPoint:
    """One stream of the study."""

    name: str
    varied: dict[str, Any]
    """The factors that the grid sets, and the seed."""
    cfg: StreamConfig


def synthetic_study(settings: SyntheticSettings, folder: str | Path) -> SyntheticResult:
    """Recover the features of synthetic streams with each arm, over a grid of factors.

    Each stream has a folder; beside them are `table.csv`, `result` and the figures. A
    second call resumes the study: streams that are done are skipped.

    Args:
        settings: The grid, the seeds and the runs.
        folder: Folder of the study; another study's is an error.

    Raises:
        ValueError: If a setting of any stream is invalid, or the vectors do not fit
            the memory; before anything is generated.
        PointsFailedError: If streams have failed, after all others.
    """
    return _Study(settings, Path(folder).expanduser()).run()


def run_settings(settings: dict[str, Any], folder: Path) -> list[pd.DataFrame]:
    """Run the study of a settings file (see `SyntheticSettings`); tables to print."""
    result = synthetic_study(SyntheticSettings.from_settings(settings), folder)
    table: Any = result.summary()
    shown = ["mcc", "features_covered", "layer_splitting", "profile_w1", "empty_acts"]
    return [table[[*result.varied, "arm", *shown]]]


class _Study(ResumablePoints[StreamPoint]):
    kind, point_kind = "synthetic study", "synthetic stream"

    def __init__(self, settings: SyntheticSettings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        varied = combine(settings.points, grid(**settings.grid))
        self.varied = list(dict.fromkeys(n for point in varied for n in point))
        self.points: list[StreamPoint] = []
        for point in combine(varied, grid(seed=list(settings.seeds))):
            cfg = StreamConfig.from_settings({**settings.base, **point})
            self.points.append(StreamPoint(point_name(point), dict(point), cfg))
        for point in self.points:
            self._check_sizes(point)
        if (folder / RECORD_FILENAME).exists():
            Record.read(folder, self.kind)
        check_writable(folder / "new", "folder")
        for point in self.points:
            self.check_point_folder(point)

    def run(self) -> SyntheticResult:
        """Run what is not done; write the result and the figures."""
        table = self.run_points(self.points, self.points)
        check_all_done(table, "These streams have failed")
        rows = [
            {**point.varied, **row}
            for point in self.points
            for row in self._rows(point)
        ]
        result = SyntheticResult(self.varied, rows)
        for name, picture in result.pictures().items():
            save_figure(draw(picture), self.folder / f"{name}.png")
        result.to_dataframe().to_csv(self.folder / "arms.csv", index=False)
        return result

    @override
    def point_settings(self, point: StreamPoint) -> dict[str, Any]:
        values = asdict(self.settings)
        for name in ("base", "grid", "points", "seeds"):
            values.pop(name)  # the stream's own factors are below
        return {**values, **asdict(point.cfg)}

    @override
    def is_done(self, point: StreamPoint) -> bool:
        return self._result(point).is_dir()

    def _result(self, point: StreamPoint) -> Path:
        return self.folder / point.name / _RESULT

    @override
    def run_point(self, point: StreamPoint) -> None:
        with measured_in(self.folder / point.name / _COST_FILE):
            bench = self._bench(point)
            rows: list[dict[str, Any]] = []
            for name in self.settings.arms:
                found = ARMS[name].find(bench)
                metrics, _ = recovery(
                    found.acts, found.decoder, bench.truth, bench.stream.directions
                )
                rows.append({"arm": name, **metrics})
        SyntheticResult([], rows).save(self._result(point))

    def _bench(self, point: StreamPoint) -> Bench:
        def training(lens: LayerLens | None) -> MultiLayerConfig[Any]:
            return self._training(point, lens)

        n_prompts, n_held_out = self._n_prompts(point)
        return Bench(SyntheticStream(point.cfg), training, n_prompts, n_held_out)

    def _n_prompts(self, point: StreamPoint) -> tuple[int, int]:
        """Prompts of an epoch, and held-out ones."""
        size = point.cfg.context_size
        n_tokens = self._training(point).training_tokens // self.settings.n_epochs
        return -(-n_tokens // size), -(-self.settings.n_eval_tokens // size)

    def _training(
        self, point: StreamPoint, lens: LayerLens | None = None
    ) -> MultiLayerConfig[Any]:
        """The config of a run on this stream."""
        given = self.settings.training
        sae = {**_TRAINING["sae"], **mapping(given, "sae"), "d_in": point.cfg.d_in}
        of_stream = {"context_size": point.cfg.context_size, "seed": point.cfg.seed}
        cfg = config_from_settings({**_TRAINING, **given, "sae": sae, **of_stream})
        no_files = {"output_path": None, "checkpoint_path": None, "lens": lens}
        return cfg.replaced(logger=LoggingConfig(log_to_wandb=False), **no_files)

    def _check_sizes(self, point: StreamPoint) -> None:
        """Check what a stream needs, before anything is generated."""
        cfg, sae = point.cfg, self._training(point).sae
        if sae.k > cfg.n_features:
            raise ValueError(
                f"`n_features` must be at least `k` = {sae.k}, the latents that are "
                f"active in each vector; got {cfg.n_features}."
            )
        n_prompts, n_held_out = self._n_prompts(point)
        n_vectors = cfg.context_size * (n_prompts + n_held_out) * cfg.n_layers
        tallies = 16 * cfg.n_layers * cfg.n_features * sae.d_sae
        needed = 4 * cfg.d_in * n_vectors + 2 * tallies
        free = available_bytes()
        if needed > free:
            raise ValueError(
                f"The vectors and sums of {point.name} need {needed / 2**30:.1f} GiB "
                f"of memory; {free / 2**30:.1f} GiB are free. Reduce "
                "`training_tokens`, `n_eval_tokens`, `n_layers` or `n_features`."
            )

    @override
    def values(self, point: StreamPoint) -> dict[str, Any]:
        cost = vars(read_cost(self.folder / point.name / _COST_FILE))
        means = {}
        if self.is_done(point):
            means = {f"mcc_{row['arm']}": row["mcc"] for row in self._rows(point)}
        return {**point.varied, **means, **cost}

    def _rows(self, point: StreamPoint) -> list[dict[str, Any]]:
        return SyntheticResult.load(self._result(point)).rows
