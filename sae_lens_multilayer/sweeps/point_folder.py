"""The folder of one point of a sweep: what is done, what it took, what went wrong."""

import copy
import json
import math
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd

from sae_lens_multilayer.analysis.suite import save_results
from sae_lens_multilayer.config import LATEST, MultiLayerConfig
from sae_lens_multilayer.evaluation.metrics import SpliceMetrics
from sae_lens_multilayer.files import complete_or_absent, read_json, write_whole
from sae_lens_multilayer.record import RECORD_FILENAME, Record, as_lines
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.sweeps.cost import Cost, measured
from sae_lens_multilayer.sweeps.evaluation import summary

_EVALUATION_FILE = "evaluation.csv"
_SUMMARY_FILE = "summary.json"
_COST_FILE = "cost.json"
_ERROR_FILE = "error.txt"

_POINT_KIND = "sweep point"
_ANALYSIS_KIND = "sweep analysis"


class PointFolder:
    """Where a point keeps its SAE (`sae`), its checkpoints and its `analysis`.

    Of both the SAE and the analysis, all is there or nothing.
    """

    def __init__(self, path: Path) -> None:
        """Take the folder; it need not be there yet."""
        self.path = path
        self.sae = path / "sae"
        self.analysis = path / "analysis"

    @property
    def is_trained(self) -> bool:
        """Whether the SAE is there."""
        return self.sae.is_dir()

    @property
    def is_done(self) -> bool:
        """Whether the SAE and its analysis are there."""
        return self.is_trained and self.analysis.is_dir()

    def check(self, cfg: MultiLayerConfig[Any], evaluation: dict[str, Any]) -> None:
        """Check that what is there was made with these settings.

        Raises:
            ValueError: If it was made with others; names them.
        """
        if self._is_begun:
            wanted = Record(_POINT_KIND, cfg.decisive_settings())
            found = Record.read(self.path, _POINT_KIND)
            if changed := found.differences(wanted):
                raise ValueError(
                    f"{self.path} was begun with other settings:{as_lines(changed)}\n"
                    "Use those, move the folder away, or choose another one for this "
                    "sweep."
                )
        elif any(self.path.glob("[!.]*")):
            raise ValueError(
                f"{self.path} must be the folder of a point of this sweep, or not be "
                f"there; it has no {RECORD_FILENAME}."
            )
        if not self.is_done:
            return
        wanted = Record(_ANALYSIS_KIND, evaluation)
        if changed := self._analysed.differences(wanted):
            raise ValueError(
                f"{self.path} was evaluated with other settings:{as_lines(changed)}\n"
                f"Use those, or move the folders {self.analysis.name!r} of all points "
                "away to evaluate them again."
            )

    @property
    def _is_begun(self) -> bool:
        return (self.path / RECORD_FILENAME).exists()

    def begin(self, cfg: MultiLayerConfig[Any]) -> MultiLayerConfig[Any]:
        """The config of the run that saves to this folder, and is resumed there."""
        if not self._is_begun:
            Record(_POINT_KIND, cfg.decisive_settings()).write(self.path)
        begun = copy.copy(cfg)
        begun.output_path = str(self.sae)
        begun.checkpoint_path = str(self.path / "checkpoints")
        begun.resume_from_checkpoint = LATEST
        return begun

    @contextmanager
    def training(self) -> Generator[None, None, None]:
        """Add what the block takes to the cost of training the point."""
        cost = Cost()
        try:
            with measured() as cost:
                yield
        finally:
            sessions = [_without_nan(vars(one)) for one in [*self._sessions(), cost]]
            text = json.dumps({"sessions": sessions}, indent=1)
            write_whole(self.path / _COST_FILE, text)

    def _sessions(self) -> list[Cost]:
        file = self.path / _COST_FILE
        if not file.exists():
            return []
        found = read_json(file)["sessions"]
        return [Cost(**{n: _number(v) for n, v in one.items()}) for one in found]

    def cost(self) -> Cost:
        """What all sessions of training took: the sum of seconds, the highest peaks."""
        sessions = self._sessions()
        if not sessions:
            return Cost()
        highest = {
            field.name: max(getattr(session, field.name) for session in sessions)
            for field in fields(Cost)
        }
        summed = {
            name: sum(getattr(session, name) for session in sessions)
            for name in ("seconds", "cpu_seconds")
        }
        return Cost(**highest | summed)

    def save_analysis(
        self,
        metrics: SpliceMetrics,
        results: dict[str, Result],
        evaluation: dict[str, Any],
        fingerprint: str,
        tokenizer: Any,
    ) -> None:
        """Write what was measured, and of what."""
        content = {
            "n_tokens": metrics.n_tokens,
            "values": _without_nan(summary(metrics, results)),
        }
        with complete_or_absent(self.analysis) as folder:
            metrics.to_dataframe().to_csv(folder / _EVALUATION_FILE)
            save_results(results, folder, tokenizer)
            (folder / _SUMMARY_FILE).write_text(json.dumps(content, indent=1))
            Record(_ANALYSIS_KIND, evaluation, {"tokens": fingerprint}).write(folder)
        (self.path / _ERROR_FILE).unlink(missing_ok=True)

    @property
    def _summary(self) -> dict[str, Any]:
        return read_json(self.analysis / _SUMMARY_FILE)

    @property
    def metrics(self) -> pd.DataFrame:
        """What `evaluate` measured of a point that is done; a row for each hook."""
        return pd.read_csv(self.analysis / _EVALUATION_FILE, index_col="hook_name")

    @property
    def done_at(self) -> float:
        """When a point that is done was measured."""
        return (self.analysis / _SUMMARY_FILE).stat().st_mtime

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens that a point that is done was measured on."""
        return self._analysed.fingerprints["tokens"]

    @property
    def _analysed(self) -> Record:
        return Record.read(self.analysis, _ANALYSIS_KIND)

    def values(self) -> dict[str, Any]:
        """What was measured of a point that is done, as its row of the table."""
        found = self._summary
        values = {name: _number(value) for name, value in found["values"].items()}
        return {"n_tokens": found["n_tokens"], **values}

    def save_error(self, error: Exception) -> None:
        """Write what went wrong, and where."""
        lines = [f"{type(error).__name__}: {error}\n\n"]
        text = "".join(lines + traceback.format_exception(error))
        write_whole(self.path / _ERROR_FILE, text)

    @property
    def error(self) -> str | None:
        """What went wrong the last time; None if nothing did."""
        file = self.path / _ERROR_FILE
        return file.read_text().split("\n\n")[0] if file.exists() else None


def _without_nan(values: dict[str, float]) -> dict[str, float | None]:
    return {n: None if math.isnan(value) else value for n, value in values.items()}


def _number(value: float | None) -> float:
    return math.nan if value is None else value
