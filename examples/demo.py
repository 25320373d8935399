"""Demo without a model hub: train and use one SAE for all 30 blocks of SmolLM2.

Trains on the residual stream after every block, prints a table of held-out metrics by
layer, plots FVU by layer, saves the SAE, and runs the model with some of its views in a
new process.
"""

import argparse
import json
import logging
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from jaxtyping import Int
from sae_lens import LanguageModelSAETrainingRunner, LoggingConfig
from sae_lens.util import get_special_token_ids
from torch import Tensor

from examples.smollm2 import MODEL_NAME, english_text, load_smollm2
from sae_lens_multilayer import (
    MultiLayerActivationsStore,
    MultiLayerConfig,
    MultiLayerTrainingSAEConfig,
    reconstruction_metrics,
)
from sae_lens_multilayer.pictures import draw, save_figure
from sae_lens_multilayer.topk.select import cpu_has_bfloat16

CONTEXT_SIZE = 128


@dataclass
class Settings:
    """Settings that the command line can change."""

    output: Path
    """New folder for the SAE and the picture."""
    training_tokens: int
    """Tokens of text to train on."""
    held_out_tokens: int
    """Tokens of text to evaluate on."""
    expansion_factor: int
    """d_sae / d_in."""
    k: int
    """Latents kept for each vector."""


def main() -> None:
    """Run the demo with the settings of the command line."""
    settings = parse_args(sys.argv[1:])
    logging.basicConfig(format="%(message)s")
    logging.getLogger("sae_lens_multilayer").setLevel(logging.INFO)
    # SAELens compares the number of documents with the number of tokens.
    warnings.filterwarnings("ignore", "The training dataset contains fewer samples")
    warnings.filterwarnings("ignore", "Dataset is not tokenized")
    start = time.perf_counter()
    model: Any = load_smollm2()
    print(f"{MODEL_NAME}: {model.cfg.n_layers} blocks, d_model {model.cfg.d_model}")

    cfg = make_config(settings, model)
    runner = LanguageModelSAETrainingRunner(
        cfg, override_dataset=english_text("train"), override_model=model
    )
    loaded, forward = time.perf_counter(), ForwardSeconds(model)
    sae = runner.run()
    trained, harvest = time.perf_counter(), forward.total

    tokens = held_out_tokens(cfg, model, settings.held_out_tokens)
    metrics = reconstruction_metrics(
        sae, model, tokens, exclude_tokens=get_special_token_ids(model.tokenizer)
    )
    columns = ["fvu", "fvu_scalar", "l0", "silent_fraction"]
    table = metrics.to_dataframe()[columns]
    table.index = table.index.str.extract(r"(\d+)", expand=False)
    print(f"Held-out text, {metrics.n_tokens:,} tokens, by layer:")
    print(table.rename_axis("layer").to_string(float_format="{:.4f}".format))
    print(
        f"mean FVU {metrics.fvu.mean():.4f}; dead latents (silent at every layer): "
        f"{metrics.dead_fraction[0]:.1%}"
    )
    picture = save_figure(draw(metrics), settings.output / "fvu.png")
    (settings.output / "held_out.json").write_text(json.dumps(metrics.to_log_dict()))
    print(f"SAE and picture: {settings.output}, {picture}\n")

    evaluated = time.perf_counter()
    print("In a new process:", flush=True)
    script = [sys.executable, "-m", "examples.splice_views", str(settings.output)]
    subprocess.run(script, check=True)
    end = time.perf_counter()
    print(
        f"Done in {end - start:.0f} s: loading {loaded - start:.0f} s, forward passes "
        f"{harvest:.0f} s, training steps {trained - loaded - harvest:.0f} s, "
        f"evaluation {evaluated - trained:.0f} s, new process {end - evaluated:.0f} s."
    )


class ForwardSeconds:
    """Measures the time that a model spends in forward passes."""

    def __init__(self, model: Any) -> None:
        """Start with 0 seconds."""
        self.total = 0.0
        """Seconds."""
        model.register_forward_pre_hook(self._start)
        model.register_forward_hook(self._stop)

    def _start(self, *_: Any) -> None:
        self.total -= time.perf_counter()

    def _stop(self, *_: Any) -> None:
        self.total += time.perf_counter()


def parse_args(args: list[str]) -> Settings:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    default_output = Path("outputs") / time.strftime("demo-%Y%m%d-%H%M%S")
    parser.add_argument("--output", type=Path, default=default_output)
    parser.add_argument("--training-tokens", type=int, default=21_000)
    parser.add_argument("--held-out-tokens", type=int, default=4_096)
    parser.add_argument("--expansion-factor", type=int, default=8)
    parser.add_argument("--k", type=int, default=32)
    return Settings(**vars(parser.parse_args(args)))


def make_config(
    settings: Settings, model: Any
) -> MultiLayerConfig[MultiLayerTrainingSAEConfig]:
    """The paper's recipe, with a higher learning rate for few steps."""
    d_in = model.cfg.d_model
    return MultiLayerConfig(
        sae=MultiLayerTrainingSAEConfig(
            d_in=d_in,
            d_sae=settings.expansion_factor * d_in,
            k=settings.k,
            dead_after_tokens=max(1, settings.training_tokens // 4),
        ),
        model_name=MODEL_NAME,
        model_from_pretrained_kwargs={},
        dataset_path="pydoc_data.topics",
        context_size=CONTEXT_SIZE,
        training_tokens=settings.training_tokens,
        train_batch_size_tokens=64,
        store_batch_size_prompts=8,
        n_batches_in_buffer=64,
        exclude_special_tokens=True,
        autocast_lm=cpu_has_bfloat16(),
        lr=3e-3,
        lr_decay_steps=settings.training_tokens // 64 // 2,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=str(settings.output),
        verbose=False,
    )


def held_out_tokens(
    cfg: MultiLayerConfig[Any], model: Any, n_tokens: int
) -> Int[Tensor, "prompt pos"]:
    """Contexts of held-out text, tokenised like the training text."""
    dataset: Dataset = english_text("test")
    store = MultiLayerActivationsStore.from_config(model, cfg, dataset)
    return store.get_batch_tokens(max(1, n_tokens // CONTEXT_SIZE))


if __name__ == "__main__":
    main()
