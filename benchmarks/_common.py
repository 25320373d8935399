"""What the benchmarks share: versions, memory, and turns that are timed in rotation."""

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
    """Print what the figures depend on."""
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
def announced(what: str) -> Generator[None]:
    """Print what is being done, and that it went well."""
    print(f"{what} ...", end=" ", flush=True)
    yield
    print("ok", flush=True)


def time_in_turns(
    turns: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each contestant, taken in turn, so that drifts hit all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            start = time.perf_counter()
            turn()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


def peak_rss_mib(work: Callable[[], object]) -> float:
    """MiB that this process takes at its peak beyond what it held before (Linux)."""
    with measured() as cost:
        work()
    return cost.peak_memory_mib - cost.memory_before_mib
