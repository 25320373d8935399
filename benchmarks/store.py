"""Claim: harvesting all layers takes at most 1.1 times as long as a forward pass.

Compares, on the same prompts and the same model, tokens per second of

- a bare forward pass through the same blocks,
- `MultiLayerActivationsStore`, shuffling included,
- SAELens' own multi-hook store, shuffling included,

after checking that both stores return exactly the vectors of `run_with_cache`. The
three are timed alternately.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from sae_lens import LoggingConfig
from sae_lens.training.activations_store import ActivationsStore

from benchmarks._common import (
    announced,
    peak_rss_mib,
    print_versions,
    ratio,
    time_in_turns,
)
from examples.smollm2 import load_smollm2
from sae_lens_multilayer import (
    MultiLayerActivationsStore,
    MultiLayerConfig,
    MultiLayerTrainingSAEConfig,
)

PROMPTS = 4


def main() -> None:
    """Check, time and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a few minutes")
    args = parser.parse_args()
    n_prompts, context, rounds = (16, 128, 3) if args.small else (64, 128, 5)
    model: Any = load_smollm2()
    tokens = torch.randint(100, model.cfg.d_vocab, (n_prompts, context))
    print_versions("torch", "sae-lens", "transformer-lens")
    with announced("both stores return the vectors of run_with_cache"):
        check_equal(model, tokens[:4])
    turns: dict[str, Callable[[], None]] = {
        "bare forward pass": lambda: bare(model, tokens),
        "this package's store": lambda: serve(our_store(model, tokens)),
        "SAELens' multi-hook store": lambda: serve(host_store(model, tokens)),
    }
    seconds = time_in_turns(turns, rounds)
    print(f"SmolLM2-135M, 30 hooks, {n_prompts} prompts x {context}, {rounds} rounds")
    base = seconds["bare forward pass"]
    for name, times in seconds.items():
        rate = tokens.numel() / statistics.median(times)
        peak = peak_rss_mib(turns[name])
        print(
            f"{name:28}{rate:6.0f} tokens/s {ratio(times, base):6.3f} x bare "
            f"{peak:7.0f} MiB"
        )


def bare(model: Any, tokens: torch.Tensor) -> None:
    """Run the model up to the last hooked block, as many prompts at a time."""
    with torch.no_grad():
        for batch in tokens.split(PROMPTS):
            model(batch, stop_at_layer=model.cfg.n_layers)


def serve(batches: Any) -> None:
    """Take all batches."""
    for _ in batches:
        pass


def our_store(model: Any, tokens: torch.Tensor) -> Any:
    """Batches of 256 tokens from the store of this package."""
    cfg = MultiLayerConfig(
        sae=MultiLayerTrainingSAEConfig(d_in=model.cfg.d_model, d_sae=1024),
        context_size=tokens.shape[1],
        training_tokens=tokens.numel(),
        train_batch_size_tokens=256,
        store_batch_size_prompts=PROMPTS,
        n_batches_in_buffer=len(tokens) // 2,
        **devices(model),
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
        verbose=False,
    )
    dataset = Dataset.from_dict({"input_ids": tokens})
    store = MultiLayerActivationsStore.from_config(model, cfg, dataset)
    return (next(store) for _ in range(tokens.numel() // 256))


def devices(model: Any) -> dict[str, Any]:
    """All of a run on the device of its model."""
    device = str(model.cfg.device)
    return dict.fromkeys(("device", "llm_device", "act_store_device"), device)


def host_store(model: Any, tokens: torch.Tensor) -> Any:
    """Batches of 256 tokens from SAELens' store."""
    hooks = [f"blocks.{i}.hook_resid_post" for i in range(model.cfg.n_layers)]
    d_in: int = model.cfg.d_model
    store = ActivationsStore.from_config_multi_hook(
        model,
        dataset=Dataset.from_dict({"input_ids": tokens}),
        hook_names=hooks,
        hook_d_ins=dict.fromkeys(hooks, d_in),
        streaming=False,
        context_size=tokens.shape[1],
        n_batches_in_buffer=len(tokens) // 2,
        store_batch_size_prompts=PROMPTS,
        device=model.cfg.device,
        train_batch_size_tokens=256,
        total_training_tokens=tokens.numel(),
    )
    batches = store.get_multi_hook_data_loader()
    return (next(batches) for _ in range(tokens.numel() // 256))


def check_equal(model: Any, tokens: torch.Tensor) -> None:
    """Both stores must return the vectors of `run_with_cache`, ours each token once."""
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, stop_at_layer=model.cfg.n_layers)
    hooks = [f"blocks.{i}.hook_resid_post" for i in range(model.cfg.n_layers)]
    expected = torch.stack([cache[h].flatten(0, 1) for h in hooks], 1)
    ours = torch.cat(list(our_store(model, tokens)))
    host = torch.cat(
        [torch.stack([b[h] for h in hooks], 1) for b in host_store(model, tokens)]
    )
    key, order = expected[:, 0, 0].sort()
    for name, found in (("ours", ours), ("SAELens'", host)):
        rank = torch.searchsorted(key, found[:, 0, 0].contiguous())
        same = torch.equal(found, expected[order[rank.clamp(max=len(key) - 1)]])
        if not same:
            raise AssertionError(
                f"{name} store does not return the vectors of run_with_cache"
            )
    if len(ours[:, 0, 0].unique()) != len(key):
        raise AssertionError("our store must return each token once")


if __name__ == "__main__":
    main()
