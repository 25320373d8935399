"""Shared by the benchmarks: versions, peak memory, and timing in alternating order."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import torch

from sae_lens_multilayer.sweeps.cost import measured


def print_versions(*packages: str) -> None:
    """Print the versions and the hardware that results depend on."""
    print(
        f"python {platform.python_version()}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, "
        f"{time.strftime('%Y-%m-%d')}"
    )
    for package in packages:
        try:
            print(f"{package} {version(package)}")
        except PackageNotFoundError:
            print(f"{package} is not installed")


@contextmanager
def announced(check: str) -> Generator[None]:
    """Print the name of a check, and "ok" when the block ends without error."""
    print(f"{check} ...", end=" ", flush=True)
    yield
    print("ok", flush=True)


def time_in_turns(
    turns: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each function, run alternately so that drifts affect all equally.

    On a machine that others use, `time.process_time` is the better clock.
    """
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            synchronize()
            start = clock()
            turn()
            synchronize()
            seconds[name].append(clock() - start)
    return seconds


def synchronize() -> None:
    """Wait for the work that was given to a GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Median over rounds of the ratio of times in the same round."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


def peak_rss_mib(work: Callable[[], object]) -> float:
    """Peak memory of this process in MiB, minus the memory before (Linux)."""
    with measured() as cost:
        work()
    return cost.peak_memory_mib - cost.memory_before_mib
