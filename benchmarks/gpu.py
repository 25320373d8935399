"""Everything that needs a GPU, in one run of under ten minutes: `make gpu`.

First `tests/test_device.py`: results on the device are those of the CPU. Then, each
after a check of equal results: the training step against SAELens, `eai-sparsify` and
the encoder product in bfloat16; harvesting against a bare forward pass; `evaluate`
against a loop of `run_evals`; and a whole run against SAELens' one SAE per layer.
Writes `results.md` and `results.json`, with the device and the versions. A contestant
that runs out of memory is listed as such.

    python -m benchmarks.gpu [--device cpu] [--small] [--output FOLDER]

`--device cpu` shows that the script works where there is no GPU; use it with `--small`.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks import end_to_end, evaluation, store, train_step
from benchmarks._common import announced, synchronize, time_in_turns
from benchmarks._step_case import Case
from examples.smollm2 import load_smollm2
from sae_lens_multilayer import evaluate
from sae_lens_multilayer.models.kinds import as_model

PACKAGES = ("torch", "sae-lens", "transformer-lens", "transformers", "eai-sparsify")
Turns = Mapping[str, Callable[[], object]]


@dataclass
class Results:
    """All times, and what they were measured with."""

    device: str
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d"))
    versions: dict[str, str] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, sizes: str, times: Mapping[str, list[float]], base: str) -> None:
        """Add and print one comparison; ratios are to the contestant `base`."""
        least = statistics.median(times[base]) if times.get(base) else float("nan")
        for name, seconds in times.items():
            median = statistics.median(seconds) if seconds else None
            row = {"sizes": sizes, "name": name, "base": base, "seconds": seconds}
            row |= {"median": median, "ratio": median and median / least}
            self.rows.append(row)
            print(as_row(row), flush=True)

    def save(self, folder: Path) -> None:
        """Write the table and the JSON."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(asdict(self), indent=1))
        versions = ", ".join(f"{name} {v}" for name, v in self.versions.items())
        head = f"{self.device}, {self.date}. {versions}.\n\n"
        head += "| sizes | | ms | ratio | to |\n|---|---|---|---|---|\n"
        (folder / "results.md").write_text(head + "\n".join(map(as_row, self.rows)))


def as_row(row: dict[str, Any]) -> str:
    """A row of the table."""
    cells = [row["sizes"], row["name"]]
    if row["median"] is None:
        cells += ["out of memory", "", ""]
    else:
        cells += [f"{1e3 * row['median']:.2f}", f"{row['ratio']:.2f}", row["base"]]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Test, check, time, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="small sizes, two rounds")
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"))
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device. To try this, use --device cpu.")
    results = Results(device_name(args.device))
    results.versions = {name: installed(name) for name in PACKAGES}
    print(results.device, results.versions)
    test(args.device)
    parts = (time_steps, time_harvest, time_evaluation, time_runs)
    try:
        for part in parts:
            part(results, args.device, args.small)
    finally:
        results.save(args.output)
    print(f"Written: {args.output}/results.md and results.json")


def device_name(device: str) -> str:
    """Name of the GPU, or of the processor's vector extensions."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.backends.cpu.get_cpu_capability()}"


def installed(package: str) -> str:
    try:
        return version(package)
    except ImportError:
        return "not installed"


def test(device: str) -> None:
    """Run the tests on the device; ends the program if one fails."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_device.py"]
    subprocess.run(command, check=True, env={**os.environ, "TEST_DEVICE": device})


@contextmanager
def tf32() -> Generator[None]:
    """Float32 products with factors rounded to TF32, on a GPU."""
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


def time_steps(results: Results, device: str, small: bool) -> None:
    """A training step, at several widths and numbers of latents."""
    n_vectors, rounds = (512, 2) if small else (8_192, 10)
    widths, expansions = ((64,), (16,)) if small else ((512, 2048), (16, 64, 256))
    for d_in, expansion in product(widths, expansions):
        for dead_share in (0.0, 0.3) if expansion == 16 else (0.0,):
            case = Case(expansion, dead_share, device, False, d_in, n_vectors)
            sizes = f"step, d {d_in}, R {expansion}, {dead_share:.0%} dead"
            with announced(f"{sizes}: equality of results"):
                train_step.check_equality(case)
            train_step.print_unproven(case)
            times = {name: time_alone(*v, rounds) for name, v in contestants(case)}
            results.add(sizes, times, "encoder product, bfloat16")


def contestants(case: Case) -> Generator[tuple[str, tuple[Any, bool]]]:
    """Each variant of the step, and again with TF32 on a GPU."""
    for name, make in train_step.variants(case).items():
        if name == "dense reference":
            continue
        yield name, (make, False)
        if case.device == "cuda" and "bfloat16" not in name:
            yield f"{name}, TF32", (make, True)


def time_alone(make: Callable[[], Callable], is_tf32: bool, n: int) -> list[float]:
    """Seconds of steps after a first one; none if memory does not suffice.

    One contestant is in memory at a time, as weights of 500,000 latents are large.
    """
    times: list[float] = []
    try:
        step = make()
        for turn in range(n + 1):
            synchronize()
            start = time.perf_counter()
            if is_tf32:
                with tf32():
                    step()
            else:
                step()
            synchronize()
            if turn > 0:
                times.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        times = []
    step = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return times


def time_harvest(results: Results, device: str, small: bool) -> None:
    """The store, at all 30 blocks of SmolLM2."""
    model: Any = load_smollm2().to(device)
    n_prompts, rounds = (8, 2) if small else (256, 5)
    tokens = torch.randint(100, model.cfg.d_vocab, (n_prompts, 128), device=device)
    with announced("both stores return the vectors of run_with_cache"):
        store.check_equal(model, tokens[:4])
    turns: Turns = {
        "bare forward pass": lambda: store.bare(model, tokens),
        "this package's store": lambda: store.serve(store.our_store(model, tokens)),
        "SAELens' store": lambda: store.serve(store.host_store(model, tokens)),
    }
    sizes = f"harvest, SmolLM2, {tokens.numel():,} tokens"
    results.add(sizes, time_in_turns(turns, rounds), "bare forward pass")


def time_evaluation(results: Results, device: str, small: bool) -> None:
    """`evaluate` of 12 layers against a loop of `run_evals`."""
    d_vocab, rounds = (1_024, 2) if small else (50_257, 5)
    kind = "HookedTransformer"
    model = evaluation.make_models(d_vocab)[kind].to(device)
    sae = evaluation.make_sae(kind, as_model(model).shape).to(device)
    tokens = torch.randint(1, d_vocab, (16, evaluation.CONTEXT), device=device)
    turns: Turns = {
        "from the middle": lambda: evaluate(sae, model, tokens).to_dataframe(),
        "whole passes": lambda: evaluate(
            sae, model, tokens, from_middle=False
        ).to_dataframe(),
        "run_evals": lambda: evaluation.loop_run_evals(sae, model, tokens),
    }
    with announced("evaluation: equality of results"):
        evaluation.check_equal({name: turn() for name, turn in turns.items()})
    sizes = f"evaluate, 12 layers, vocabulary {d_vocab:,}"
    results.add(sizes, time_in_turns(turns, rounds), "from the middle")


def time_runs(results: Results, device: str, small: bool) -> None:
    """A whole run of this package and one of SAELens, on SmolLM2."""
    model: Any = load_smollm2().to(device)
    layers = [0, 15, 29] if small else list(range(30))
    n_tokens, rounds = (1_024, 1) if small else (32_768, 2)
    d_sae = model.cfg.d_model * (1 if small else 16)
    sizes = model, layers, d_sae, n_tokens
    turns: Turns = {
        "this package": lambda: end_to_end.train_ours(*sizes),
        "MultiSAETrainingRunner": lambda: end_to_end.train_host(*sizes),
    }
    end_to_end.check(model, *(turn() for turn in turns.values()))
    name = f"run, {len(layers)} layers, d_sae {d_sae:,}, {n_tokens:,} tokens"
    results.add(name, time_in_turns(turns, rounds), "this package")


if __name__ == "__main__":
    main()
