"""Runs one job at a time in a thread, with progress and cancelling."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Reports steps done and their number; CancelledError if the job is cancelled."""
_N_KEPT = 8
"""Finished jobs whose results are kept."""


class BusyError(Exception):
    """Another job is running."""


class CancelledError(Exception):
    """The job was cancelled."""


@dataclass
class Job:
    """A job, running or ended."""

    id: int
    state: Literal["running", "done", "failed", "cancelled"] = "running"
    done: int = 0
    total: int = 1
    result: Any = None
    error: str = ""
    cancel: threading.Event = field(default_factory=threading.Event)

    def progress(self, done: int, total: int) -> None:
        """See `Progress`."""
        if self.cancel.is_set():
            raise CancelledError
        self.done, self.total = done, total

    def as_json(self) -> dict[str, Any]:
        """Everything except the event."""
        return {n: v for n, v in vars(self).items() if n != "cancel"}


class Jobs:
    """The jobs of a server; one runs at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: dict[int, Job] = {}
        self._n_started = 0

    def start(self, work: Callable[[Progress], Any]) -> Job:
        """Run `work` in a thread; BusyError if another job runs."""
        with self._lock:
            if any(job.state == "running" for job in self._jobs.values()):
                raise BusyError
            self._n_started += 1
            job = self._jobs[self._n_started] = Job(self._n_started)
            self._jobs.pop(self._n_started - _N_KEPT, None)
        threading.Thread(target=_run, args=(job, work), daemon=True).start()
        return job

    def find(self, job_id: int) -> Job | None:
        """A job by its number, unless it is unknown or forgotten."""
        return self._jobs.get(job_id)


def _run(job: Job, work: Callable[[Progress], Any]) -> None:
    try:
        job.result = work(job.progress)
        job.state = "done"
    except CancelledError:
        job.state = "cancelled"
    except Exception as error:
        # The reader sees the message; the server goes on.
        logger.exception("Job %d failed", job.id)
        job.error = f"{type(error).__name__}: {error}"
        job.state = "failed"
