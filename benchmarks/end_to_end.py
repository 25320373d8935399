"""Claim: a whole run is at least 4 times faster than SAELens' one SAE per layer.

Trains on the residual stream of SmolLM2, including the forward passes, with

- this package: one SAE of width D for all hooked layers;
- SAELens' `MultiSAETrainingRunner`: one TopK SAE of width D for each hooked layer.

In both, each vector is encoded with D latents, so the work per vector is the same;
SAELens trains one set of parameters per layer. Model, text, tokens, batch and k are the
same, without logging, evaluation or saving. Both must end with TopK SAEs of the same k;
`store.py` compares the vectors and `train_step.py` the steps. The printed FVU is not
meaningful after so few steps.
"""

import argparse
import statistics
from typing import Any

import torch
from datasets import Dataset
from sae_lens import (
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    TopKTrainingSAEConfig,
)
from sae_lens.multi_sae_training_runner import (
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
)

from benchmarks._common import print_versions, ratio, time_in_turns
from benchmarks.store import devices
from examples.smollm2 import english_text, load_smollm2
from sae_lens_multilayer import (
    MultiLayerActivationsStore,
    MultiLayerConfig,
    MultiLayerTrainingSAEConfig,
    reconstruction_metrics,
)

K, CONTEXT, BATCH = 32, 128, 512


def main() -> None:
    """Time both runs alternately and print tokens per second."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="six layers, few tokens")
    parser.add_argument("--tokens", type=int, help="of text, in each run")
    parser.add_argument("--rounds", type=int, help="runs of each that are timed")
    args = parser.parse_args()
    layers = [0, 6, 12, 18, 24, 29] if args.small else list(range(30))
    n_tokens = args.tokens or (2_048 if args.small else 4_096)
    rounds = args.rounds or (2 if args.small else 3)
    model: Any = load_smollm2()
    d_sae = 16 * model.cfg.d_model
    print_versions("torch", "sae-lens", "transformer-lens")
    print(f"{len(layers)} layers, d_sae {d_sae:,}, {n_tokens:,} tokens, k {K}")
    turns = {
        "this package": lambda: train_ours(model, layers, d_sae, n_tokens),
        "MultiSAETrainingRunner": lambda: train_host(model, layers, d_sae, n_tokens),
    }
    check(model, turns["this package"](), turns["MultiSAETrainingRunner"]())
    seconds = time_in_turns(turns, rounds)
    for name, times in seconds.items():
        rate = n_tokens / statistics.median(times)
        print(f"{name:26}{rate:8.0f} tokens/s")
    speed_up = ratio(seconds["MultiSAETrainingRunner"], seconds["this package"])
    print(f"this package is {speed_up:.1f} times faster")


def train_ours(model: Any, layers: list[int], d_sae: int, n_tokens: int) -> Any:
    """One SAE for all layers."""
    cfg = MultiLayerConfig(
        sae=MultiLayerTrainingSAEConfig(d_in=model.cfg.d_model, d_sae=d_sae, k=K),
        layers=layers,
        verbose=False,
        **shared_settings(model, n_tokens),
    )
    return LanguageModelSAETrainingRunner(
        cfg, override_dataset=english_text("train"), override_model=model
    ).run()


def train_host(model: Any, layers: list[int], d_sae: int, n_tokens: int) -> Any:
    """One stock SAE for each layer, from one forward pass."""
    names = {f"layer_{layer}": f"blocks.{layer}.hook_resid_post" for layer in layers}
    cfg = MultiSAETrainingRunnerConfig(
        saes={
            name: TopKTrainingSAEConfig(d_in=model.cfg.d_model, d_sae=d_sae, k=K)
            for name in names
        },
        hook_names=names,
        **shared_settings(model, n_tokens),
    )
    return MultiSAETrainingRunner(
        cfg, override_dataset=english_text("train"), override_model=model
    ).run()


def shared_settings(model: Any, n_tokens: int) -> dict[str, Any]:
    """Settings used by both runs."""
    return {
        "context_size": CONTEXT,
        "training_tokens": n_tokens,
        "train_batch_size_tokens": BATCH,
        "store_batch_size_prompts": 8,
        "n_batches_in_buffer": 16,
        "lr": 1e-3,
        "logger": LoggingConfig(log_to_wandb=False),
        "checkpoint_path": None,
        "output_path": None,
        **devices(model),
    }


def check(model: Any, ours: Any, host: dict[str, Any]) -> None:
    """Both must have trained TopK SAEs of the same k, on vectors of the model."""
    cfg = MultiLayerConfig(
        sae=ours.cfg, **{**shared_settings(model, BATCH), "verbose": False}
    )
    dataset: Dataset = english_text("test")
    store = MultiLayerActivationsStore.from_config(model, cfg, dataset)
    tokens: torch.Tensor = store.get_batch_tokens(8)
    for sae in host.values():
        sae.cfg.metadata.hook_names = None
    for name, saes in (("this package", ours), ("SAELens", list(host.values()))):
        metrics = reconstruction_metrics(saes, model, tokens)
        fvu, l0 = metrics.fvu.median(), metrics.l0.mean()
        print(f"{name}: median FVU of layers {fvu:.2f}, mean L0 {l0:.1f}")
        if not (metrics.fvu.isfinite().all() and abs(l0 - K) < 1):
            raise AssertionError(f"{name} did not train a TopK SAE: {metrics}")


if __name__ == "__main__":
    main()
