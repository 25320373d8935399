"""Reads the rows of a dataset from any place on, through faults of disk and network."""

import logging
import time
from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from huggingface_hub.errors import OfflineModeIsEnabled
from sae_lens.config import HfDataset

logger = logging.getLogger(__name__)

RETRY_SECONDS = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 120.0, 120.0)
"""Waits before a row is asked for again. `datasets` and `huggingface_hub` have tried
for some minutes themselves before an error arrives here."""
_PERMANENT = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    OfflineModeIsEnabled,
)


def read_rows(dataset: HfDataset, start: int) -> Iterator[dict[str, Any]]:
    """The rows of a dataset from number `start` on.

    A map-style dataset goes there at once. A streamed one reads the rows before again,
    the only way that is exact for every stream, such as a shuffled one.

    Raises:
        RuntimeError: If a row cannot be read, at once or, where the disk or the network
            fails, in spite of waiting; names the row.
    """
    place, waits = start, iter(RETRY_SECONDS)
    rows = _from(dataset, place)
    while True:
        try:
            row = next(rows, None)
        except Exception as error:
            wait = next(waits, None) if _may_pass(error) else None
            if wait is None:
                raise RuntimeError(
                    f"Row {place} of the dataset must be readable; {error!r}."
                ) from error
            logger.warning(
                "Row %d of the dataset cannot be read now (%r); trying again in %g s.",
                place,
                error,
                wait,
            )
            time.sleep(wait)
            # A generator that has raised is at its end.
            rows = _from(dataset, place)
            continue
        if row is None:
            return
        place, waits = place + 1, iter(RETRY_SECONDS)
        yield row


def _from(dataset: Any, start: int) -> Iterator[Any]:
    if isinstance(dataset, Dataset) and start >= len(dataset):
        return iter(())
    return iter(dataset.skip(start) if start else dataset)


def _may_pass(error: Exception) -> bool:
    """Whether it is a fault of the disk, the network or a server, which may pass."""
    response: Any = getattr(error, "response", None)
    if response is not None:
        return response.status_code in (408, 429) or response.status_code >= 500
    return isinstance(error, OSError) and not isinstance(error, _PERMANENT)
