"""The sums of a fit of a Jacobian lens, from which a killed fit is resumed."""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sae_lens_multilayer.files import (
    complete_or_absent,
    locked,
    read_tensors,
    remove_folder,
    remove_leftovers,
)
from sae_lens_multilayer.record import RECORD_FILENAME, Record

logger = logging.getLogger(__name__)

_TENSORS_FILENAME = "sums.safetensors"
_SECONDS_BETWEEN_SAVES = 60
"""Least time between two saves, which write two matrices in float32 per layer."""


class JacobianSums:
    """Derivatives added up over the batches of prompts done so far, in float64."""

    def __init__(self, n_layers: int, d_in: int, folder: Path | None = None) -> None:
        """Start with no batch, or with those of a folder."""
        self.total: Float[Tensor, "layer d_in d_in"]
        self.total = torch.zeros(n_layers, d_in, d_in, dtype=torch.float64)
        self.n_positions = self.n_batches = 0
        self._folder, self._saved_at = folder, monotonic()
        saved = [] if folder is None else sorted(folder.glob("batches-*"))
        if saved:
            tensors = read_tensors(saved[-1] / _TENSORS_FILENAME)
            self.total = tensors["total"]
            self.n_positions = int(tensors["n_positions"])
            self.n_batches = int(tensors["n_batches"])
            logger.info("Resuming after %d batches in %s.", self.n_batches, folder)

    def end_batch(self, n_positions: int) -> None:
        """Count a batch whose derivatives have been added, and save now and then."""
        self.n_positions += n_positions
        self.n_batches += 1
        is_due = monotonic() >= self._saved_at + _SECONDS_BETWEEN_SAVES
        if self._folder is not None and is_due:
            try:
                self._save(self._folder)
            except (OSError, SafetensorError) as error:
                logger.warning("The sums could not be saved: %s", error)
            self._saved_at = monotonic()

    def _save(self, folder: Path) -> None:
        earlier = [*folder.glob("batches-*")]
        with complete_or_absent(folder / f"batches-{self.n_batches:08d}") as partial:
            counts = {"n_positions": self.n_positions, "n_batches": self.n_batches}
            tensors = {name: torch.tensor(count) for name, count in counts.items()}
            save_file({"total": self.total, **tensors}, partial / _TENSORS_FILENAME)
        for one in earlier:
            remove_folder(one)

    def mean(self) -> Float[Tensor, "layer d_in d_in"]:
        """Mean over positions, in float32."""
        return (self.total / self.n_positions).float()


@contextmanager
def kept_until_done(
    output: Path | None, record: Record
) -> Generator[Path | None, None, None]:
    """The folder of a fit's sums beside its output, removed when the block ends.

    With sums, it stays if the block raises an error or the process is killed. None
    without output.

    Raises:
        ValueError: If the folder is that of a fit with another record.
    """
    if output is None:
        yield None
        return
    folder = output.with_name(f"{output.name}.partial")
    advice = f"Delete {folder} to fit from the start, or give another `output_path`."
    if (folder / RECORD_FILENAME).exists():
        Record.read_same(folder, record, advice)
    with locked(folder):
        remove_leftovers(folder)
        record.write(folder)
        try:
            yield folder
        except BaseException:
            if not any(folder.glob("batches-*")):
                remove_folder(folder)
            raise
    remove_folder(folder)
