"""Measures time and peak memory of a block of code."""

import ctypes
import gc
import json
import math
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sae_lens_multilayer.files import read_json, write_whole

_PROCESS = Path("/proc/self")
_RESET_PEAK = "5"
"""Written to `clear_refs`, resets the peak; see `man 5 proc_pid_clear_refs`."""


@dataclass
class Cost:
    """Time and memory; NaN where the machine cannot measure it."""

    seconds: float = math.nan
    """Wall-clock time."""
    cpu_seconds: float = math.nan
    """CPU time of all threads of the process."""
    memory_before_mib: float = math.nan
    """Resident memory of the process before."""
    peak_memory_mib: float = math.nan
    """Peak resident memory, including what was allocated before. Linux only."""
    peak_device_memory_mib: float = math.nan
    """Peak memory of PyTorch's tensors on all CUDA devices together."""


@contextmanager
def measured() -> Generator[Cost, None, None]:
    """Measure the block; the numbers are set when it ends, also by an error."""
    gc.collect()
    # glibc keeps freed memory, which would count as this block's.
    trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    cost = Cost(memory_before_mib=_status_mib("VmRSS"))
    has_peak = _reset_peaks()
    start, cpu_start = time.perf_counter(), time.process_time()
    try:
        yield cost
    finally:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            devices = range(torch.cuda.device_count())
            peak = sum(torch.cuda.max_memory_allocated(device) for device in devices)
            cost.peak_device_memory_mib = peak / 2**20
        cost.seconds = time.perf_counter() - start
        cost.cpu_seconds = time.process_time() - cpu_start
        if has_peak:
            cost.peak_memory_mib = _status_mib("VmHWM")


@contextmanager
def measured_in(file: Path) -> Generator[None, None, None]:
    """Measure the block and add its cost to a JSON file; memory: the highest."""
    cost = Cost()
    try:
        with measured() as cost:
            yield
    finally:
        total = asdict(cost)
        if file.exists():
            for name, earlier in asdict(read_cost(file)).items():
                both = earlier, total[name]
                is_time = name in ("seconds", "cpu_seconds")
                total[name] = sum(both) if is_time else max(both)
        write_whole(file, json.dumps(total, indent=1))


def read_cost(file: Path) -> Cost:
    """The cost in a file of `measured_in`; NaN if there is none."""
    return Cost(**read_json(file)) if file.exists() else Cost()


def available_bytes() -> float:
    """Memory that can be allocated without swapping; infinite where unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    found = (float(li.split()[1]) * 2**10 for li in lines if li.startswith("MemAvail"))
    return next(found, math.inf)


def _reset_peaks() -> bool:
    """Reset peak counters; returns whether the process's could be reset."""
    if torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)
    try:
        (_PROCESS / "clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _status_mib(field: str) -> float:
    try:
        lines = (_PROCESS / "status").read_text().splitlines()
    except OSError:
        return math.nan
    found = (int(line.split()[1]) / 2**10 for line in lines if line.startswith(field))
    return next(found, math.nan)
