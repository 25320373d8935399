"""Measures the gain of `prefetch_llm_batches` if model and SAE share a CPU.

Trains on six layers of SmolLM2 (all with --all-layers) without prefetching and with two
batches prefetched by a thread. The weights must be bit-identical. Prefetching is meant
for two devices, which are not measured here.

    python -m benchmarks.prefetch [--small] [--all-layers] [--rounds N]
"""

import argparse
import statistics
from typing import Any

import torch
from sae_lens import LanguageModelSAETrainingRunner, LoggingConfig

from benchmarks._common import announced, print_versions, ratio, time_in_turns
from examples.smollm2 import english_text, load_smollm2
from sae_lens_multilayer import MultiLayerConfig, MultiLayerTrainingSAEConfig


def main() -> None:
    """Compare, time and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="fewer tokens and rounds")
    parser.add_argument("--all-layers", action="store_true")
    parser.add_argument("--rounds", type=int)
    args = parser.parse_args()
    layers = list(range(30)) if args.all_layers else [0, 6, 12, 18, 24, 29]
    n_tokens, rounds = (2048, 2) if args.small else (4096, 4)
    model: Any = load_smollm2()
    print_versions("torch", "sae-lens")
    print(
        f"{len(layers)} layers, d_sae {16 * model.cfg.d_model:,}, {n_tokens:,} tokens"
    )
    with announced("prefetching does not change the weights"):
        first, second = (train(model, layers, n_tokens, n) for n in (False, 2))
        for name, tensor in first.state_dict().items():
            assert torch.equal(tensor, second.state_dict()[name]), name
    turns = {
        "no prefetching": lambda: train(model, layers, n_tokens, False),
        "prefetching": lambda: train(model, layers, n_tokens, 2),
    }
    seconds = time_in_turns(turns, args.rounds or rounds)
    for name, times in seconds.items():
        print(f"{name:16}{n_tokens / statistics.median(times):8.0f} tokens/s")
    gain = ratio(seconds["no prefetching"], seconds["prefetching"])
    print(f"prefetching is {gain:.2f} times as fast")


def train(model: Any, layers: list[int], n_tokens: int, prefetch: bool | int) -> Any:
    """A short run."""
    cfg = MultiLayerConfig(
        sae=MultiLayerTrainingSAEConfig(
            d_in=model.cfg.d_model, d_sae=16 * model.cfg.d_model, k=32
        ),
        layers=layers,
        context_size=128,
        training_tokens=n_tokens,
        train_batch_size_tokens=256,
        store_batch_size_prompts=4,
        n_batches_in_buffer=8,
        lr=1e-3,
        prefetch_llm_batches=prefetch,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
        verbose=False,
    )
    return LanguageModelSAETrainingRunner(
        cfg, override_dataset=english_text("train"), override_model=model
    ).run()


if __name__ == "__main__":
    main()
