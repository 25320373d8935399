"""Training runs in separate processes that can be killed at any moment.

Reads lines `TASK FOLDER SECONDS`. For each line it forks a process (faster than
importing everything again), which starts or resumes the task: `train` writes
FOLDER/output, `harvest` writes FOLDER/cache, and `cached` trains on that cache. Tasks
like `train` are `lens` (with a tuned lens), `stock` (a stock architecture), `streamed`
(a streamed dataset) and `prefetch` (batches are read in a thread). `jacobian` fits a
Jacobian lens to FOLDER/fitted, `sgd` and `adam` a tuned lens.
Each step and each part of a checkpoint takes SECONDS longer, so that kills are equally
likely in both. Prints `started PID` just before the task starts, and `ended STATUS`
when the process has ended.
"""

import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import D_MODEL, N_CTX, PAPER_DATA, tiny_model, tiny_sae_config
from datasets import Dataset
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
)
from saes import random_lens
from transformers import AutoTokenizer

from sae_lens_multilayer import (
    MultiLayerCacheActivationsRunner,
    MultiLayerConfig,
    files,
    fit_jacobian_lens,
    fit_tuned_lens,
)
from sae_lens_multilayer.lens import fit, jacobian, progress
from sae_lens_multilayer.training.trainer import MultiLayerTrainer


def slow_down(owner: object, name: str, seconds: float) -> None:
    original = getattr(owner, name)

    def slower(*args, **kwargs):
        time.sleep(seconds)
        return original(*args, **kwargs)

    setattr(owner, name, slower)


def documents() -> Dataset:
    rng = np.random.default_rng(1)
    words = [rng.integers(1, 512, n) for n in rng.integers(5, 40, 200)]
    return Dataset.from_dict({"text": [" ".join(f"w{i}" for i in w) for w in words]})


def fit_lens(task: str, folder: Path, seconds: float, model: Any) -> None:
    progress._SECONDS_BETWEEN_SAVES = 0
    tokens = torch.arange(1, 1 + 24 * N_CTX).view(24, N_CTX) % 500
    output = folder / "fitted"
    print("started", os.getpid(), flush=True)
    if task == "jacobian":
        slow_down(jacobian, "_streams", seconds)
        fit_jacobian_lens(model, tokens, skip_first_positions=1, output_path=output)
    else:
        slow_down(fit, "_backward", seconds)
        kind: Any = task
        settings = {"batch_size_prompts": 7, "n_steps": 24, "optimizer": kind}
        fit_tuned_lens(model, tokens, **settings, output_path=output)


def main(
    task: str, folder: Path, seconds: float, data: Dataset, tokenizer: Any
) -> None:
    slow_down(MultiLayerTrainer, "step", seconds)
    slow_down(files, "_flush", seconds)
    if task in ("jacobian", "sgd", "adam"):
        fit_lens(task, folder, seconds, tiny_model(tokenizer))
        return
    sae: Any = tiny_sae_config(dead_after_tokens=500)
    if task == "stock":
        sae = BatchTopKTrainingSAEConfig(d_in=D_MODEL, d_sae=64, k=4)
    torch.manual_seed(0)
    config = MultiLayerConfig(
        sae=sae,
        lens=random_lens(alignment="tuned_lens") if task == "lens" else None,
        prefetch_llm_batches=task == "prefetch",
        model_name="tiny",
        context_size=N_CTX,
        training_tokens=3200,
        train_batch_size_tokens=64,
        store_batch_size_prompts=4,
        n_batches_in_buffer=16,
        lr=1e-2,
        logger=LoggingConfig(log_to_wandb=False),
        prepend_bos=False,
        verbose=False,
        output_path=str(folder / "output"),
        checkpoint_path=str(folder / "checkpoints"),
        n_checkpoints=12,
        keep_last_n_checkpoints=2,
        resume_from_checkpoint="latest",
        use_cached_activations=task == "cached",
        cached_activations_path=str(folder / "cache"),
    )
    if task == "harvest":
        harvest = MultiLayerCacheActivationsRunner(
            config, data, tiny_model(tokenizer), shard_bytes=2**14, block_bytes=2**10
        )
        print("started", os.getpid(), flush=True)
        harvest.run()
        return
    runner = LanguageModelSAETrainingRunner(
        config,
        override_dataset=data.to_iterable_dataset() if task == "streamed" else data,
        override_model=None if task == "cached" else tiny_model(tokenizer),
    )
    print("started", os.getpid(), flush=True)
    runner.run()


if __name__ == "__main__":
    torch.set_num_threads(1)  # Threads do not survive a fork.
    inputs = documents(), AutoTokenizer.from_pretrained(PAPER_DATA / "model")
    for line in sys.stdin:
        rest, seconds = line.rsplit(maxsplit=1)
        task, path = rest.split(maxsplit=1)
        child = os.fork()
        if child == 0:
            try:
                main(task, Path(path), float(seconds), *inputs)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        _, status = os.waitpid(child, 0)
        print("ended", status, flush=True)
