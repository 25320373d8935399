"""The state of a fit beside its output, from which a killed fit is resumed."""

import logging
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sae_lens_multilayer.files import (
    LOCK_FILENAME,
    complete_or_absent,
    locked,
    read_tensors,
    remove_folder,
    remove_leftovers,
    save_somewhere,
)
from sae_lens_multilayer.record import RECORD_FILENAME, Record

logger = logging.getLogger(__name__)

_STATE_PREFIX = "batches-"
_TENSORS_FILENAME = "state.safetensors"
_FINISHED_FILENAME = "finished"
"""Exists once all batches are done and the output is being saved."""
_SECONDS_BETWEEN_SAVES = 60
"""Least time between two saves, which write several matrices per layer."""


class FitProgress:
    """The tensors of a fit after the batches done so far, in the folder of the fit."""

    def __init__(self, output: Path | None = None) -> None:
        """Without output, nothing is saved."""
        self._output, self._saved_at = output, monotonic()

    def load(self) -> tuple[int, dict[str, Tensor]]:
        """Number of batches done, and the tensors after them; at first 0 and none."""
        saved = [] if self._output is None else _states(_folder_of(self._output))
        if not saved:
            return 0, {}
        n_batches = int(saved[-1].name.removeprefix(_STATE_PREFIX))
        logger.info("Resuming after %d batches in %s.", n_batches, saved[-1].parent)
        return n_batches, read_tensors(saved[-1] / _TENSORS_FILENAME)

    def end_batch(self, n_batches: int, tensors: Mapping[str, Tensor]) -> None:
        """Save the tensors after this many batches, if a minute has passed."""
        is_due = monotonic() >= self._saved_at + _SECONDS_BETWEEN_SAVES
        if self._output is not None and is_due:
            try:
                _save(_folder_of(self._output), n_batches, tensors)
            except (OSError, SafetensorError) as error:
                logger.warning("The state of the fit could not be saved: %s", error)
            self._saved_at = monotonic()

    def save_output(self, save: Callable[[Path], None]) -> None:
        """Save what was fitted by `save_somewhere`, if there is an output."""
        if self._output is not None:
            with suppress(OSError):  # a full disk
                (_folder_of(self._output) / _FINISHED_FILENAME).touch()
            path = save_somewhere(self._output, save)
            logger.info("The lens is saved at %s.", path)


@contextmanager
def resumable_fit(
    output: Path | None, record: Record
) -> Generator[FitProgress, None, None]:
    """The progress of a fit, in the folder `{output}.partial` until the block ends.

    The folder stays if the process is killed or the block raises an error, unless no
    state has been saved, or a value is not finite, as it would be again.

    Raises:
        ValueError: If the folder is that of a fit with another record.
    """
    if output is None:
        yield FitProgress()
        return
    folder = _folder_of(output)
    advice = f"Delete {folder} to fit from the start, or give another `output_path`."
    if (folder / RECORD_FILENAME).exists():
        Record.read_same(folder, record, advice)
    with locked(folder):
        remove_leftovers(folder)
        (folder / _FINISHED_FILENAME).unlink(missing_ok=True)
        record.write(folder)
        try:
            yield FitProgress(output)
        except BaseException as error:
            if isinstance(error, FloatingPointError) or not _states(folder):
                _remove(folder)
            raise
        _remove(folder)


def remove_finished(output: Path) -> None:
    """Remove what a fit that was killed after it had saved its output has left."""
    folder = _folder_of(output)
    if not output.exists() or not folder.is_dir():
        return
    if (folder / _FINISHED_FILENAME).exists() or not any(folder.iterdir()):
        with locked(folder):
            _remove(folder)


def _folder_of(output: Path) -> Path:
    path = output.resolve()
    return path.with_name(f"{path.name}.partial")


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_STATE_PREFIX}*"))


def _save(folder: Path, n_batches: int, tensors: Mapping[str, Tensor]) -> None:
    earlier = _states(folder)
    with complete_or_absent(folder / f"{_STATE_PREFIX}{n_batches:08d}") as partial:
        save_file(dict(tensors), partial / _TENSORS_FILENAME)
    for one in earlier:
        remove_folder(one)


def _remove(folder: Path) -> None:
    """Remove what a fit has written, in an order that a later call can continue."""
    for state in _states(folder):
        remove_folder(state)
    remove_leftovers(folder)
    for name in (LOCK_FILENAME, RECORD_FILENAME, _FINISHED_FILENAME):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # the user may have put something there
        folder.rmdir()
