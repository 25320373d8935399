"""Claim: two ranks make the update of one process; communication is mostly gradients.

Two processes on this machine, connected by gloo and with one thread each, make a
training step with half of a batch each. For comparison one of them makes it with the
whole batch and with half of it, while the other waits. First, after three steps the
weights must equal those of one process to float tolerance, and be bit-identical on both
ranks.

Prints the bytes that a rank passes to collectives in a step, and the time of a step.
The time that two ranks need beyond one rank with half the batch is communication,
waiting and shared memory bandwidth. Also timed: the all-reduce of the gradients alone,
and steps with dead latents, which exchange three more numbers for each layer.

    python -m benchmarks.ranks [--small] [--tokens N] [--repeats N]
"""

import argparse
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from sae_lens import LoggingConfig, TrainingSAE
from torch import Tensor

from benchmarks._common import announced, print_versions
from sae_lens_multilayer import MultiLayerConfig, MultiLayerTrainingSAEConfig
from sae_lens_multilayer.ranks import ALONE, Ranks, bits_of, ranks_of_environment
from sae_lens_multilayer.training.trainer import MultiLayerTrainer

D_IN, K, LAYERS, COUNT = 512, 32, 2, 2


def main() -> None:
    """Start the ranks; the first one prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="R = 16, 1,024 tokens")
    parser.add_argument("--tokens", type=int, help="of a batch, with two layers each")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    expansion = 16 if args.small else 64
    n_tokens = args.tokens or (1024 if args.small else 4096)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context: Any = torch.multiprocessing.get_context("spawn")
    arguments = (port, expansion * D_IN, n_tokens, args.repeats)
    other = context.Process(target=work, args=(1, *arguments), daemon=True)
    other.start()
    work(0, *arguments)
    other.join()


def work(index: int, port: int, d_sae: int, n_tokens: int, repeats: int) -> None:
    """Check and measure on one rank."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(index),
        "WORLD_SIZE": str(COUNT),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    ranks = ranks_of_environment("cpu")
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(D_IN, D_IN, generator=generator) / D_IN**0.5
    x = torch.randn(n_tokens, LAYERS, D_IN, generator=generator) @ mixing
    half = x.chunk(COUNT)[index]
    if ranks.is_first:
        print_versions("torch")
        print(f"{n_tokens:,} tokens x {LAYERS} layers x {D_IN}, d_sae {d_sae:,}, k {K}")
        with announced("two ranks make the update of one process"):
            check(ranks, d_sae, x, half)
    else:
        check(ranks, d_sae, x, half)
    for dead in (0.0, 0.3):
        seconds, n_bytes = measure(ranks, d_sae, x, half, dead, repeats)
        if ranks.is_first:
            print(f"{dead:.0%} dead: {n_bytes / 1e6:.1f} MB in collectives for a step")
            report(seconds)


def new_trainer(d_sae: int, ranks: Ranks, dead: float = 0.0) -> MultiLayerTrainer:
    """A trainer of an SAE with the same initial weights on all ranks."""
    sae_cfg = MultiLayerTrainingSAEConfig(
        d_in=D_IN, d_sae=d_sae, k=K, dead_after_tokens=10**9
    )
    cfg = MultiLayerConfig(
        sae=sae_cfg,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        verbose=False,
    ).to_sae_trainer_config()
    cfg.hook_names = [f"blocks.{layer}.hook_resid_post" for layer in range(LAYERS)]
    torch.manual_seed(0)
    sae: Any = TrainingSAE.from_dict(sae_cfg.to_dict())
    no_data: Iterator[Tensor] = iter(())
    trainer = MultiLayerTrainer(cfg, sae, no_data, initialize_b_dec=False, ranks=ranks)
    # These latents are dead: the counter exceeds `dead_after_tokens`.
    trainer.tokens_since_fired[torch.rand(d_sae) < dead] = 2**40
    return trainer


def check(ranks: Ranks, d_sae: int, x: Tensor, half: Tensor) -> None:
    """Compare the weights after three steps with one process, and between ranks."""
    together, alone = new_trainer(d_sae, ranks), new_trainer(d_sae, ALONE)
    for _ in range(3):
        together.step(half)
        if ranks.is_first:
            alone.step(x)
    ranks.check_same("The SAE", bits_of(together.sae.state_dict()))
    if ranks.is_first:
        for name, tensor in alone.sae.state_dict().items():
            found = together.sae.state_dict()[name]
            # The size of Adam's first steps hardly depends on the gradient, so entries
            # near 0 may differ by a fraction of the learning rate.
            torch.testing.assert_close(found, tensor, rtol=1e-4, atol=2e-5)


def measure(
    ranks: Ranks, d_sae: int, x: Tensor, half: Tensor, dead: float, repeats: int
) -> tuple[dict[str, list[float]], int]:
    """Seconds of each variant on the first rank, and bytes of a step."""
    together, alone = new_trainer(d_sae, ranks, dead), new_trainer(d_sae, ALONE, dead)
    gradients = torch.zeros(2, d_sae, D_IN)
    n_bytes = count_bytes(lambda: dead_step(together, half, dead))
    turns: dict[str, Callable[[], object]] = {
        "1 rank, whole batch": lambda: ranks.is_first and dead_step(alone, x, dead),
        "1 rank, half of it": lambda: ranks.is_first and dead_step(alone, half, dead),
        "2 ranks, half each": lambda: dead_step(together, half, dead),
        "gradients alone": lambda: ranks.sum_(*gradients),
    }
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(repeats + 1):
        for name, turn in turns.items():
            dist.barrier()
            start = time.perf_counter()
            turn()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}, n_bytes


def dead_step(trainer: MultiLayerTrainer, x: Tensor, dead: float) -> None:
    """Make a step, then restore which latents are dead."""
    counters = trainer.tokens_since_fired.clone()
    stats = trainer.step(x)
    assert (stats.losses["auxiliary_reconstruction_loss"] > 0) == (dead > 0)
    trainer.tokens_since_fired = counters


def count_bytes(step: Callable[[], object]) -> int:
    """Bytes of the tensors that a rank passes to collectives."""
    sizes: list[int] = []
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    def counting(name: str) -> Callable[..., object]:
        def collective(*args: Any) -> object:
            sizes.append((args[0] if name == "all_reduce" else args[1]).nbytes)
            return originals[name](*args)

        return collective

    for name in originals:
        setattr(dist, name, counting(name))
    step()
    for name, original in originals.items():
        setattr(dist, name, original)
    return sum(sizes)


def report(seconds: dict[str, list[float]]) -> None:
    """Print medians."""
    for name, times in seconds.items():
        print(
            f"  {name:20}{statistics.median(times) * 1e3:8.0f} ms "
            f"({min(times) * 1e3:.0f} to {max(times) * 1e3:.0f})"
        )
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    whole, half = medians["1 rank, whole batch"], medians["1 rank, half of it"]
    both = medians["2 ranks, half each"]
    print(
        f"  2 ranks are {whole / both:.2f} times as fast as 1, and need "
        f"{(both - half) * 1e3:.0f} ms more than 1 rank with half the batch"
    )


if __name__ == "__main__":
    main()
