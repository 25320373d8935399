"""Claim: reading vectors from a cache is many times faster than running the model.

Harvests a cache of all 30 layers of SmolLM2, checks that it returns the vectors of the
live store exactly, then compares vectors per second of

- the live store, which runs the model,
- harvesting a cache, which runs the model and writes,
- the store of the cache, all layers and one layer,
- the same cache in bfloat16,

with the same mixing buffer. Also prints bytes per token. The files are in the page
cache of the operating system; `--cold` drops them from it before each measurement.
"""

import argparse
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens import LoggingConfig

from benchmarks._common import (
    announced,
    print_versions,
    ratio,
    time_in_turns,
)
from examples.smollm2 import load_smollm2
from sae_lens_multilayer import (
    ActivationCache,
    MultiLayerActivationsStore,
    MultiLayerCacheActivationsRunner,
    MultiLayerConfig,
    MultiLayerTrainingSAEConfig,
)
from sae_lens_multilayer.store.cache import vector_settings
from sae_lens_multilayer.store.source import CacheSource

CONTEXT, BATCH = 128, 256


def main() -> None:
    """Check, time and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a minute or two")
    parser.add_argument("--cold", action="store_true", help="read from the disk")
    args = parser.parse_args()
    n_prompts, rounds = (32, 3) if args.small else (256, 5)
    model: Any = load_smollm2()
    tokens = torch.randint(100, model.cfg.d_vocab, (n_prompts, CONTEXT))
    data = Dataset.from_dict({"input_ids": tokens})
    print_versions("torch", "sae-lens", "transformer-lens", "safetensors", "xxhash")
    with tempfile.TemporaryDirectory() as folder:

        def harvest(dtype: str = "float32") -> ActivationCache:
            path = tempfile.mkdtemp(dir=folder)
            cfg = config(model, tokens.numel(), path, dtype)
            return MultiLayerCacheActivationsRunner(cfg, data, model).run()

        exact, rounded = harvest(), harvest("bfloat16")
        with announced("the cache returns the vectors of the live store"):
            check_equal(model, data, exact, rounded)
        cfg = config(model, tokens.numel(), str(exact.path))
        one = config(model, tokens.numel(), str(exact.path), layers=[14])
        half = config(model, tokens.numel(), str(rounded.path), "bfloat16")
        turns: dict[str, Callable[[], None]] = {
            "live store": lambda: serve(live_store(model, cfg, data)),
            "harvesting": lambda: shutil.rmtree(harvest().path),
            "cache, float32": lambda: serve(cached_store(exact, cfg)),
            "cache, one of the layers": lambda: serve(cached_store(exact, one)),
            "cache, bfloat16": lambda: serve(cached_store(rounded, half)),
        }
        if args.cold:
            turns = {name: cold(turn, folder) for name, turn in turns.items()}
        seconds = time_in_turns(turns, rounds)
        report(seconds, tokens.numel(), model.cfg.n_layers)
        sizes(exact, rounded)


def config(
    model: Any, n_tokens: int, path: str, dtype: str = "float32", **changes: Any
) -> MultiLayerConfig[Any]:
    """A run over all tokens with a buffer of 2,048."""
    return MultiLayerConfig(
        sae=MultiLayerTrainingSAEConfig(d_in=model.cfg.d_model, d_sae=1024),
        context_size=CONTEXT,
        training_tokens=n_tokens,
        train_batch_size_tokens=BATCH,
        store_batch_size_prompts=4,
        n_batches_in_buffer=16,
        dtype=dtype,
        cached_activations_path=path,
        n_eval_batches=1,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
        verbose=False,
        **changes,
    )


def live_store(model: Any, cfg: Any, data: Dataset) -> MultiLayerActivationsStore:
    """The store that runs the model."""
    return MultiLayerActivationsStore.from_config(model, cfg, data)


def cached_store(cache: ActivationCache, cfg: Any) -> MultiLayerActivationsStore:
    """The store that reads a cache, opened anew."""
    cache = ActivationCache(cache.path)
    hook_names = cfg.resolve_hook_names(cache.model_shape.n_layers)
    cache.check(vector_settings(cfg), hook_names)
    source = CacheSource.from_config(cache, hook_names, cfg)
    return MultiLayerActivationsStore.from_source(source, cfg)


def serve(store: MultiLayerActivationsStore) -> None:
    """Take all batches of an epoch."""
    for _ in range(store.total_training_tokens // BATCH):
        next(store)


def cold(turn: Callable[[], None], folder: str) -> Callable[[], None]:
    """Drop the cache's files from the page cache before each run of `turn`."""

    def from_disk() -> None:
        for path in Path(folder).rglob("*.safetensors"):
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        turn()

    return from_disk


def check_equal(
    model: Any, data: Dataset, exact: ActivationCache, rounded: ActivationCache
) -> None:
    """Compare the first rows of both caches with the live store, and their tokens."""
    cfg = config(model, 4 * BATCH, str(exact.path), activations_mixing_fraction=0.0)
    live = live_store(model, cfg, data)
    expected = torch.cat([next(live) for _ in range(4)])
    found, text = next(exact.read())
    in_bfloat16, _ = next(rounded.read())
    ids = torch.tensor(data["input_ids"][: len(expected) // CONTEXT]).flatten()
    same = (
        torch.equal(found[: len(expected)], expected)
        and torch.equal(in_bfloat16[: len(expected)], expected.bfloat16())
        and torch.equal(text.token_ids[: len(ids)].long(), ids)
    )
    if not same:
        raise AssertionError("the cache must return the vectors of the live store")


def report(
    seconds: dict[str, list[float]],
    n_tokens: int,
    n_layers: int,
) -> None:
    """Print rates and ratios."""
    print(f"SmolLM2-135M, {n_layers} hooks, {n_tokens:,} tokens, batches of {BATCH}")
    live = seconds["live store"]
    for name, times in seconds.items():
        n_vectors = n_tokens * (1 if "one of" in name else n_layers)
        print(
            f"{name:26}{n_tokens / statistics.median(times):8,.0f} tokens/s "
            f"{n_vectors / statistics.median(times):10,.0f} vectors/s "
            f"{ratio(live, times):6.1f} x live"
        )


def sizes(*caches: ActivationCache) -> None:
    """Print how large the caches are."""
    for cache in caches:
        files = [path for path in cache.path.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        print(
            f"{cache.dtype}: {size / cache.n_tokens:,.0f} bytes per token; "
            f"{cache.n_blocks} blocks of {cache.tokens_per_block} tokens"
        )


if __name__ == "__main__":
    main()
