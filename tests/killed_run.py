"""Training runs in processes of their own that may be killed at any moment.

Reads lines `WHAT FOLDER SECONDS`; for each it forks a process (importing everything
anew would take longer than the run) that trains, or goes on, and ends with
FOLDER/output; or that harvests FOLDER/cache (WHAT is `harvest`) or trains on it
(`cached`). Other values of WHAT are runs of another kind: with a tuned lens (`lens`),
of a stock architecture (`stock`), on a streamed dataset (`streamed`), with a thread
that reads ahead (`prefetch`).
Each step and each part of a checkpoint takes SECONDS longer, so that a kill is as
likely in the one as in the other. Prints `started PID` once the process is about to
train, and `ended STATUS` when it is no more.
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
)
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


def main(
    what: str, folder: Path, seconds: float, data: Dataset, tokenizer: Any
) -> None:
    slow_down(MultiLayerTrainer, "step", seconds)
    slow_down(files, "_flush", seconds)
    sae: Any = tiny_sae_config(dead_after_tokens=500)
    if what == "stock":
        sae = BatchTopKTrainingSAEConfig(d_in=D_MODEL, d_sae=64, k=4)
    torch.manual_seed(0)
    config = MultiLayerConfig(
        sae=sae,
        tuned_lens=random_lens(alignment="tuned_lens") if what == "lens" else None,
        prefetch_llm_batches=what == "prefetch",
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
        use_cached_activations=what == "cached",
        cached_activations_path=str(folder / "cache"),
    )
    if what == "harvest":
        harvest = MultiLayerCacheActivationsRunner(
            config, data, tiny_model(tokenizer), shard_bytes=2**14, block_bytes=2**10
        )
        print("started", os.getpid(), flush=True)
        harvest.run()
        return
    runner = LanguageModelSAETrainingRunner(
        config,
        override_dataset=data.to_iterable_dataset() if what == "streamed" else data,
        override_model=None if what == "cached" else tiny_model(tokenizer),
    )
    print("started", os.getpid(), flush=True)
    runner.run()


if __name__ == "__main__":
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    inputs = documents(), AutoTokenizer.from_pretrained(PAPER_DATA / "model")
    for line in sys.stdin:
        rest, seconds = line.rsplit(maxsplit=1)
        what, path = rest.split(maxsplit=1)
        child = os.fork()
        if child == 0:
            try:
                main(what, Path(path), float(seconds), *inputs)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        _, status = os.waitpid(child, 0)
        print("ended", status, flush=True)
