"""Claim: a checkpoint takes seconds, 2% of a run that saves one every 100 seconds.

Trains an MLSAE on all layers of SmolLM2 for some steps, saving checkpoints as a run
does (flushed to the disk). A run resumed from one must end with bit-identical weights.
Prints the time and size of a checkpoint, the size of its data state compared to the
buffer that is rebuilt from it, the interval at which checkpoints take 2% of the time,
and the share of 20 checkpoints in a day.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from sae_lens import LanguageModelSAETrainingRunner, LoggingConfig

from benchmarks._common import announced, print_versions
from examples.smollm2 import english_text, load_smollm2
from sae_lens_multilayer import MultiLayerConfig, MultiLayerTrainingSAEConfig
from sae_lens_multilayer.training.trainer import MultiLayerTrainer

BATCH, CONTEXT = 256, 128


def main() -> None:
    """Check, time and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="six layers, R = 16")
    args = parser.parse_args()
    layers = [0, 6, 12, 18, 24, 29] if args.small else None
    expansion, n_checkpoints = (16, 5) if args.small else (64, 9)
    model: Any = load_smollm2()
    print_versions("torch", "sae-lens", "safetensors")
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "sae": MultiLayerTrainingSAEConfig(
                d_in=model.cfg.d_model, d_sae=expansion * model.cfg.d_model, k=32
            ),
            "layers": layers,
            "checkpoint_path": folder,
            "n_checkpoints": n_checkpoints,
            "training_tokens": (n_checkpoints + 1) * BATCH,
        }
        seconds = timed_saves()
        whole = train(model, settings)
        (run,) = Path(folder).iterdir()
        checkpoints = sorted(run.iterdir(), key=lambda path: int(path.name))
        sizes = {file.name: file.stat().st_size for file in checkpoints[-1].iterdir()}
        with announced("a resumed run ends with the same weights"):
            check_equal(whole, model, settings, checkpoints[1])
    report(seconds, sizes, len(layers or range(model.cfg.n_layers)), whole)


def train(model: Any, settings: dict[str, Any], **changes: Any) -> Any:
    """A run that saves checkpoints."""
    cfg = MultiLayerConfig(
        context_size=CONTEXT,
        train_batch_size_tokens=BATCH,
        store_batch_size_prompts=4,
        n_batches_in_buffer=16,
        logger=LoggingConfig(log_to_wandb=False),
        output_path=None,
        verbose=False,
        **{**settings, **changes},
    )
    return LanguageModelSAETrainingRunner(
        cfg, override_dataset=english_text("train"), override_model=model
    ).run()


def timed_saves() -> list[float]:
    """Patch the trainer; the returned list receives the seconds of each checkpoint."""
    seconds: list[float] = []
    original = MultiLayerTrainer.save_or_report

    def save(self: MultiLayerTrainer, checkpoint_name: str) -> bool:
        start = time.perf_counter()
        is_saved = original(self, checkpoint_name)
        seconds.append(time.perf_counter() - start)
        return is_saved

    MultiLayerTrainer.save_or_report = save
    return seconds


def check_equal(
    whole: Any, model: Any, settings: dict[str, Any], checkpoint: Path
) -> None:
    """A resumed run must end with bit-identical weights."""
    changes = {"resume_from_checkpoint": str(checkpoint), "n_checkpoints": 0}
    again = train(model, settings, **changes)
    pairs = zip(whole.parameters(), again.parameters(), strict=True)
    if not all(torch.equal(a, b) for a, b in pairs):
        raise AssertionError("the resumed run ended with other weights")


def report(
    seconds: list[float], sizes: dict[str, int], n_layers: int, sae: Any
) -> None:
    """Print what a checkpoint costs."""
    data_state = sizes["activations_store_state.safetensors"]
    buffer = 16 * CONTEXT * n_layers * sae.cfg.d_in * 4
    median = statistics.median(seconds)
    print(f"{n_layers} layers, d_sae {sae.cfg.d_sae:,}, {len(seconds)} checkpoints")
    print(f"seconds: median {median:.2f}, {min(seconds):.2f} to {max(seconds):.2f}")
    print(
        f"size {sum(sizes.values()) / 2**20:.0f} MiB; data state "
        f"{data_state / 2**20:.3f} MiB, for a buffer of {buffer / 2**20:.0f} MiB"
    )
    print(f"2% of the time if one is saved every {50 * median:.0f} s; ", end="")
    print(f"20 per day: {20 * median / 86_400:.4%}")


if __name__ == "__main__":
    main()
