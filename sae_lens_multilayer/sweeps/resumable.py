"""Points with a folder each, run one after another; a second call resumes them."""

import logging
import traceback
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import pandas as pd
from sae_lens.training._interruption import InterruptedException
from tqdm.auto import tqdm

from sae_lens_multilayer.files import locked, write_whole
from sae_lens_multilayer.record import RECORD_FILENAME, Record

logger = logging.getLogger(__name__)

TABLE_FILE = "table.csv"
_ERROR_FILE = "error.txt"


class PointsFailedError(RuntimeError):
    """Some points have failed, so their common result cannot be computed."""


@runtime_checkable
class HasName(Protocol):
    """A point: what is run, and the name of its folder."""

    @property
    def name(self) -> str:
        """Name of its folder."""
        ...


T = TypeVar("T", bound=HasName)


class ResumablePoints(ABC, Generic[T]):
    """Runs points that are not done, and writes the table of all of them.

    Each point has a folder in `folder`, with a record of its settings. A point that
    fails is recorded and does not end the others; a later call retries it.
    """

    folder: Path
    kind: str
    """Kind of the record of the whole folder."""
    point_kind: str
    """Kind of the records of the points."""

    @abstractmethod
    def point_settings(self, point: T) -> dict[str, Any]:
        """The settings that its folder was made with."""

    def point_fingerprints(self, point: T) -> dict[str, Any]:
        """Hashes of the inputs that its folder was made of, if known."""
        return {}

    @abstractmethod
    def is_done(self, point: T) -> bool:
        """Whether its results are complete."""

    @abstractmethod
    def run_point(self, point: T) -> None:
        """Compute its results, or continue an interrupted call."""

    @abstractmethod
    def values(self, point: T) -> dict[str, Any]:
        """The columns of its row before and after it is done, without its status."""

    def check_point_folder(self, point: T) -> None:
        """Raise ValueError if its folder has other settings or is something else."""
        folder = self.folder / point.name
        if (folder / RECORD_FILENAME).exists():
            advice = "Use those, or another folder for this sweep."
            Record.read_same(folder, self._record(point), advice)
        elif any(folder.glob("[!.]*")):
            raise ValueError(f"{folder} must be the folder of a point of this sweep.")

    def run_points(self, points: Sequence[T], in_order: Sequence[T]) -> pd.DataFrame:
        """Run the points that are not done; the table, which is also written.

        Args:
            points: All points, in the order of the table.
            in_order: The same, in the order in which they are run.
        """
        with locked(self.folder):
            if not (self.folder / RECORD_FILENAME).exists():
                Record(self.kind, {}).write(self.folder)
            rows = {point.name: self._row(point) for point in points}
            self._write_table(rows)
            for point in tqdm(in_order, desc="Sweep", unit="point"):
                if not self.is_done(point):
                    self._try(point)
                    rows[point.name] = self._row(point)
                    self._write_table(rows)
        return _table(rows)

    def _try(self, point: T) -> None:
        folder = self.folder / point.name
        logger.info("%s", folder)
        if not (folder / RECORD_FILENAME).exists():
            self._record(point).write(folder)
        try:
            self.run_point(point)
            (folder / _ERROR_FILE).unlink(missing_ok=True)
        except InterruptedException:
            raise
        except Exception as error:
            # Record the failure and continue with the remaining points.
            message = f"{type(error).__name__}: {error}"
            lines = [f"{message}\n\n", *traceback.format_exception(error)]
            write_whole(folder / _ERROR_FILE, "".join(lines))
            logger.error("%s has failed: %s", folder, message)

    def _row(self, point: T) -> dict[str, Any]:
        file, is_done, error = self.folder / point.name / _ERROR_FILE, True, None
        if not self.is_done(point):
            is_done = False
            error = file.read_text().split("\n\n")[0] if file.exists() else None
        not_done = "waiting" if error is None else "failed"
        status = {"status": "done" if is_done else not_done}
        return {**self.values(point), **status, "error": error}

    def _record(self, point: T) -> Record:
        fingerprints = self.point_fingerprints(point)
        return Record(self.point_kind, self.point_settings(point), fingerprints)

    def _write_table(self, rows: dict[str, dict[str, Any]]) -> None:
        write_whole(self.folder / TABLE_FILE, _table(rows).to_csv())


def check_all_done(table: pd.DataFrame, what: str) -> None:
    """Raise PointsFailedError, with the errors, if a point of a table is not done.

    Args:
        what: Start of the message, such as "These runs failed".
    """
    failed = table[table.status != "done"]
    if len(failed):
        reasons = "; ".join(f"{name}: {row.error}" for name, row in failed.iterrows())
        raise PointsFailedError(f"{what}: {reasons}")


def _table(rows: dict[str, dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame([*rows.values()], index=pd.Index([*rows], name="point"))
