"""Tasks on several ranks: processes connected by gloo, like those of torchrun.

Reads lines of JSON, `[task, folder, number of ranks, settings]` (0 ranks: one process
without torchrun's environment). For each line it forks the ranks (faster than importing
everything again), which call the function `task` with the folder and the settings.
Rank i writes its output to FOLDER/rank_{i}.log. Prints `started PID ...`, then `ended
STATUS ...` when all have ended. Ranks are killed after `TIMEOUT_SECONDS`.
"""

import json
import math
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from conftest import D_MODEL, N_CTX, PAPER_DATA, tiny_model, tiny_sae_config
from killed_run import documents, slow_down
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
)
from safetensors.torch import save_file
from test_trainer import build_sae, random_batches
from transformers import AutoTokenizer

from sae_lens_multilayer import (
    CrosscoderTrainingSAEConfig,
    MultiLayerConfig,
    RoutedTrainingSAEConfig,
    cli,
)
from sae_lens_multilayer.ranks import Ranks, ranks_of_environment
from sae_lens_multilayer.store.source import ModelSource
from sae_lens_multilayer.training import runner as runner_module
from sae_lens_multilayer.training import trainer as trainer_module
from sae_lens_multilayer.training.trainer import MultiLayerTrainer

TIMEOUT_SECONDS = 240
SAES = {
    "multilayer": tiny_sae_config(d_sae=256, k=2, dead_after_tokens=100),
    "raw": tiny_sae_config(
        d_sae=256, k=2, dead_after_tokens=100, normalize_activations="none"
    ),
    **{
        name: kind(
            d_in=D_MODEL, d_sae=256, k=2, k_aux=8, dead_after_tokens=100, n_layers=2
        )
        for name, kind in (
            ("crosscoder", CrosscoderTrainingSAEConfig),
            ("routed", RoutedTrainingSAEConfig),
        )
    },
    "standard": StandardTrainingSAEConfig(d_in=D_MODEL, d_sae=64),
    "topk": TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=256, k=2),
    "batchtopk": BatchTopKTrainingSAEConfig(d_in=D_MODEL, d_sae=64, k=2),
    "scaled": StandardTrainingSAEConfig(
        d_in=D_MODEL, d_sae=64, normalize_activations="expected_average_only_in"
    ),
}


def config(sae: str = "multilayer", **changes: Any) -> MultiLayerConfig:
    settings = {
        "sae": replace(SAES[sae]),
        "model_name": "tiny",
        "context_size": N_CTX,
        "training_tokens": 1280,
        "train_batch_size_tokens": 64,
        "store_batch_size_prompts": 4,
        "n_batches_in_buffer": 16,
        "lr": 1e-2,
        "logger": LoggingConfig(log_to_wandb=False),
        "standardize_stock_inputs": sae != "scaled",
        "n_batches_for_norm_estimate": 3,
        "prepend_bos": False,
        "verbose": False,
        "output_path": None,
        "checkpoint_path": None,
    }
    return MultiLayerConfig(**{**settings, **changes})


def steps(ranks: Ranks, sae: str) -> dict[str, torch.Tensor]:
    """Train on this rank's share of batches, which are the same for any rank count.

    Returns:
        Weights, average gradients, counters, and the losses and metrics of each step.
    """
    cfg = config(sae).to_sae_trainer_config()
    cfg.hook_names = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    cfg.dead_feature_window = 1  # of stock SAEs
    shares = [b.chunk(ranks.count)[ranks.index] for b in random_batches(13)]
    trainer = MultiLayerTrainer(cfg, build_sae(config(sae)), iter(shares), ranks=ranks)
    trainer._estimate_scale()
    found: dict[str, torch.Tensor] = {}
    for step in range(10):
        found[f"n_dead.{step}"] = trainer.dead_neurons.sum()
        stats = trainer.step(next(trainer.data_provider))
        trainer.n_training_steps += 1
        found |= {f"losses.{step}.{name}": v for name, v in stats.losses.items()}
        found |= {f"metrics.{step}.{name}": v for name, v in stats.by_layer().items()}
    found["tokens_since_fired"] = trainer.tokens_since_fired
    found["act_freq_scores"] = trainer.act_freq_scores
    found["n_samples"] = torch.tensor(trainer.n_training_samples)
    # Adam's step hardly depends on the scale of gradients, but their average does.
    found |= {
        f"average_gradient.{name}": trainer.optimizer.state[parameter]["exp_avg"]
        for name, parameter in trainer.sae.named_parameters()
    }
    found |= trainer.sae.state_dict()
    return {name: t.detach().contiguous().clone() for name, t in found.items()}


def save_steps(folder: Path, sae: str) -> None:
    ranks = ranks_of_environment("cpu")
    save_file(steps(ranks, sae), folder / f"{ranks.index}.safetensors")


def train(
    folder: Path,
    n_rows: int = 200,
    streaming: bool = False,
    fail_at: int | None = None,
    value: float = math.nan,
    break_at: int | None = None,
    stop_at: int | None = None,
    differ: str | None = None,
    seconds: float = 0,
    wandb: bool = False,
    **changes: Any,
) -> None:
    """Train and write FOLDER/output; the run can be stopped or made to fail.

    Writes the prompts that each rank has harvested to FOLDER/{rank}.json.

    Args:
        fail_at: Model batch in which the last rank's vectors contain `value`.
        value: An activation that stops the run, such as NaN.
        break_at: Tokens after which a step of the last rank raises an error.
        stop_at: Tokens after which the last rank receives SIGTERM.
        differ: Initial state that differs on the last rank: "weights" or "settings".
        seconds: Time by which each step is slowed down.
        wandb: Whether to log; writes the keys that each rank has logged.
    """
    index = int(os.environ.get("RANK", "0"))
    is_last = index == int(os.environ.get("WORLD_SIZE", "1")) - 1
    harvested: list[list[int]] = []
    vectors = ModelSource.vectors

    def watched(self: Any, chunk: torch.Tensor, rows: Any = None) -> Any:
        if rows is None:
            harvested.extend(chunk.tolist())
        return vectors(self, chunk, rows)

    ModelSource.vectors = watched
    slow_down(MultiLayerTrainer, "step", seconds)
    if wandb:
        changes["logger"] = LoggingConfig(
            wandb_log_frequency=5, eval_every_n_wandb_logs=2, log_weights_to_wandb=False
        )
        watch_wandb(folder / f"logged_{index}.json")
    if is_last and differ == "settings":
        changes["lr"] = 1.0
    model = tiny_model(AutoTokenizer.from_pretrained(PAPER_DATA / "model"))
    cfg = config(
        output_path=str(folder / "output"),
        checkpoint_path=str(folder / "checkpoints"),
        **changes,
    )
    data = documents().select(range(n_rows))
    runner: Any = LanguageModelSAETrainingRunner(
        cfg,
        override_dataset=data.to_iterable_dataset() if streaming else data,
        override_model=model,
    )
    if is_last and fail_at is not None:
        poison(runner.activations_store.source, fail_at, value)
    if is_last and stop_at is not None:
        ask_to_stop(stop_at)
    if is_last and break_at is not None:
        break_step(break_at)
    if index > 0:
        forbid_writing()
    if is_last and differ == "weights":
        runner.sae.W_dec.data[0, 0] += 1e-6
    try:
        runner.run()
    finally:
        (folder / f"{index}.json").write_text(json.dumps(harvested))


def command(folder: Path, arguments: list[str]) -> None:
    """Run a command on the ranks."""
    os.chdir(folder)
    cli.main(arguments)


def watch_wandb(file: Path) -> None:
    import wandb

    logged: list[str] = []

    def log(values: dict[str, Any], step: int) -> None:
        logged.extend(f"{step} {name}" for name in values)
        file.write_text(json.dumps(logged))

    for name in ("init", "finish", "log_artifact"):
        setattr(wandb, name, lambda *args, **kwargs: None)
    wandb.log = log  # type: ignore[assignment]


def poison(source: Any, n_model_batches: int, value: float) -> None:
    get_activations = source.activations

    def poisoned(*args: Any) -> dict[str, torch.Tensor]:
        acts = get_activations(*args)
        if source.n_chunks == n_model_batches:
            next(iter(acts.values()))[0, 0, 0] = value
        return acts

    source.activations = poisoned


def ask_to_stop(n_tokens: int) -> None:
    step = MultiLayerTrainer.step

    def stopping(self: Any, batch: torch.Tensor) -> Any:
        stats = step(self, batch)
        if self.n_training_samples == n_tokens:
            os.kill(os.getpid(), signal.SIGTERM)
        return stats

    MultiLayerTrainer.step = stopping  # type: ignore[method-assign]


def break_step(n_tokens: int) -> None:
    gradients = MultiLayerTrainer._gradients

    def breaking(self: Any, batch: torch.Tensor) -> Any:
        if self.n_training_samples == n_tokens:
            raise RuntimeError("no memory on this rank")
        return gradients(self, batch)

    MultiLayerTrainer._gradients = breaking  # type: ignore[method-assign]


def forbid_writing() -> None:
    def refuse(path: Path) -> None:
        raise AssertionError(f"Only the first rank writes; {path}.")

    for module in (runner_module, trainer_module):
        vars(module)["complete_or_absent"] = refuse


TASKS: dict[str, Any] = {f.__name__: f for f in (save_steps, train, command)}


def start_rank(index: int, port: int, folder: Path, count: int) -> None:
    if count:
        os.environ |= {
            "RANK": str(index),
            "LOCAL_RANK": str(index),
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    log = os.open(folder / f"rank_{index}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fork_rank(
    index: int, port: int, task: str, folder: Path, count: int, settings: Any
) -> int:
    child = os.fork()
    if child:
        return child
    try:
        start_rank(index, port, folder, count)
        TASKS[task](folder, **settings)
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


def wait_for(children: list[int]) -> list[int]:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    statuses: dict[int, int] = {}
    while len(statuses) < len(children):
        for child in set(children) - statuses.keys():
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                statuses[child] = status
            elif time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return [statuses[child] for child in children]


def main() -> None:
    torch.set_num_threads(1)  # Threads do not survive a fork.
    for line in sys.stdin:
        task, folder, count, settings = json.loads(line)
        port = free_port()
        arguments = (port, task, Path(folder), count, settings)
        children = [fork_rank(index, *arguments) for index in range(count or 1)]
        print("started", *children, flush=True)
        print("ended", *wait_for(children), flush=True)


if __name__ == "__main__":
    main()
