"""Claim: analyses are cheap compared to the model; memory is independent of tokens.

Runs all streaming analyses together on a tiny random model, once with a number of
tokens and once with ten times as many, each in its own process: peak memory must be
within 10%. Then compares the time of each analysis with the forward passes and the
encoder.
"""

import argparse
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from sae_lens.saes.sae import SAEMetadata
from transformer_lens import HookedTransformer, HookedTransformerConfig

from benchmarks._common import peak_rss_mib, print_versions
from sae_lens_multilayer import MultiLayerSAE, MultiLayerSAEConfig
from sae_lens_multilayer.analysis import (
    ActiveLayerCounts,
    DistributionSums,
    ExampleCollector,
    TokenBatch,
    TokenClassSums,
    TokenStream,
    VarianceSums,
    analyze,
)

N_CTX, D_VOCAB, BATCH = 128, 512, 8


class Timed:
    """An accumulator that measures its own time."""

    def __init__(self, accumulator: Any) -> None:
        self.accumulator, self.seconds = accumulator, 0.0

    def update(self, batch: TokenBatch) -> None:
        start = time.perf_counter()
        self.accumulator.update(batch)
        self.seconds += time.perf_counter() - start

    def compute(self) -> Any:
        start = time.perf_counter()
        result = self.accumulator.compute()
        self.seconds += time.perf_counter() - start
        return result


class Encoded:
    """Computes the active latents; the batch caches them for other accumulators."""

    def update(self, batch: TokenBatch) -> None:
        _ = batch.active

    def compute(self) -> None:
        """Return nothing; the time of `update` is measured."""


def make_model_and_sae(n_layers: int, d_model: int) -> tuple[Any, MultiLayerSAE]:
    """A random model and a random SAE of all its layers."""
    config = HookedTransformerConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_ctx=N_CTX,
        d_head=d_model // 4,
        n_heads=4,
        d_mlp=4 * d_model,
        d_vocab=D_VOCAB,
        act_fn="gelu",
        normalization_type="LN",
        seed=0,
        default_prepend_bos=False,
    )
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(n_layers)]
    torch.manual_seed(0)
    settings = MultiLayerSAEConfig(
        d_in=d_model,
        d_sae=8 * d_model,
        k=32,
        metadata=SAEMetadata(hook_names=names, model_name="random"),
    )
    return HookedTransformer(config).eval(), MultiLayerSAE(settings)


def analyses(sae: MultiLayerSAE) -> dict[str, Any]:
    """All analyses that stream over tokens."""
    return {
        "layer distributions": DistributionSums(sae),
        "variances": VarianceSums(sae),
        "active layers": ActiveLayerCounts(sae),
        "largest activations": ExampleCollector(sae),
        "token classes": TokenClassSums(sae, range(10)),
    }


def random_tokens(n_tokens: int) -> torch.Tensor:
    """Prompts of random tokens."""
    return torch.randint(0, D_VOCAB, (n_tokens // N_CTX, N_CTX))


def measure_memory(n_tokens: int) -> tuple[float, float]:
    """Peak memory of the process, and of one pass minus the memory before, in MiB."""
    model, sae = make_model_and_sae(2, 32)
    tokens = random_tokens(n_tokens)
    analyze(sae, model, tokens[:BATCH], *analyses(sae).values())
    own = peak_rss_mib(lambda: analyze(sae, model, tokens, *analyses(sae).values()))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, own


def measure_time(n_tokens: int) -> None:
    """Print seconds of the model, the encoder and each analysis."""
    model, sae = make_model_and_sae(8, 256)
    tokens = random_tokens(n_tokens)
    analyze(sae, model, tokens[:BATCH], *analyses(sae).values())
    start = time.perf_counter()
    for _ in TokenStream(model, sae.cfg.metadata.hook_names, tokens):
        pass
    forward = time.perf_counter() - start
    timed = {"encoder": Timed(Encoded())}
    timed |= {name: Timed(a) for name, a in analyses(sae).items()}
    analyze(sae, model, tokens, *timed.values())
    print(f"\n{tokens.numel():,} tokens, 8 layers, d_in 256, d_sae 2048, k 32")
    print(f"{'forward passes':20} {forward:7.2f} s  {tokens.numel() / forward:,.0f}/s")
    for name, one in timed.items():
        print(f"{name:20} {one.seconds:7.2f} s  {one.seconds / forward:7.1%}")


def main() -> None:
    """Measure memory in one process per size, then time."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a tenth of the tokens")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of is not None:
        print(*measure_memory(args.memory_of))
        return
    print_versions("torch", "sae-lens", "transformer-lens")
    few = 10_000 if args.small else 100_000
    peaks: list[float] = []
    for n_tokens in (few, 10 * few):
        command = [sys.executable, __file__, "--memory-of", str(n_tokens)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peak, own = (float(number) for number in done.stdout.split()[-2:])
        peaks.append(peak)
        print(f"{n_tokens:>9,} tokens: peak {peak:.1f} MiB, pass alone {own:.1f} MiB")
    print(f"ratio of peaks {peaks[1] / peaks[0]:.3f}")
    measure_time(few // 5)


if __name__ == "__main__":
    main()
