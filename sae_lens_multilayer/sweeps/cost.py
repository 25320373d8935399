"""What a piece of work takes: seconds, and memory at its peak."""

import ctypes
import gc
import math
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_PROCESS = Path("/proc/self")
_NEW_PEAK = "5"
"""What tells Linux to forget a process's peak; see `man 5 proc_pid_clear_refs`."""


@dataclass
class Cost:
    """What a piece of work took; NaN where the machine cannot say."""

    seconds: float = math.nan
    """By the clock on the wall."""
    cpu_seconds: float = math.nan
    """Of all threads of the process; waiting for others on the machine is no part."""
    memory_before_mib: float = math.nan
    """What the whole process held in memory before (resident, on the host)."""
    peak_memory_mib: float = math.nan
    """What it held at its peak during the work, all that was there before included.
    Linux only."""
    peak_device_memory_mib: float = math.nan
    """What PyTorch's tensors held at their peak on all CUDA devices together."""


@contextmanager
def measured() -> Generator[Cost, None, None]:
    """Measure the block; the numbers are there when it has ended, also by an error."""
    _free_memory()
    cost = Cost(memory_before_mib=_status_mib("VmRSS"))
    has_peak = _forget_peaks()
    start, cpu_start = time.perf_counter(), time.process_time()
    try:
        yield cost
    finally:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            cost.peak_device_memory_mib = _device_peak_mib()
        cost.seconds = time.perf_counter() - start
        cost.cpu_seconds = time.process_time() - cpu_start
        if has_peak:
            cost.peak_memory_mib = _status_mib("VmHWM")


def _free_memory() -> None:
    """Give back what earlier work has left, which would count as this one's.

    glibc keeps much of what is freed, and Python some of what is not used any more.
    """
    gc.collect()
    trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _forget_peaks() -> bool:
    """Start new peaks; whether the process's is one of them."""
    if torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)
    try:
        (_PROCESS / "clear_refs").write_text(_NEW_PEAK)
    except OSError:
        return False
    return True


def _device_peak_mib() -> float:
    devices = range(torch.cuda.device_count())
    return sum(torch.cuda.max_memory_allocated(device) for device in devices) / 2**20


def _status_mib(field: str) -> float:
    try:
        lines = (_PROCESS / "status").read_text().splitlines()
    except OSError:
        return math.nan
    found = (int(line.split()[1]) / 2**10 for line in lines if line.startswith(field))
    return next(found, math.nan)
