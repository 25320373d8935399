"""Claim: `evaluate` is at least 3 times faster than looping `run_evals` over 12 layers.

Both compute cross-entropy (clean, spliced, ablated) and KL divergence for each layer of
a 12-layer model on the same tokens; `evaluate` also measures the reconstructions.
Equality of the results is checked first.
"""

import argparse
import statistics
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from sae_lens import ActivationsStore
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from transformer_lens import HookedTransformer, HookedTransformerConfig

from benchmarks._common import (
    announced,
    peak_rss_mib,
    print_versions,
    ratio,
    time_in_turns,
)
from sae_lens_multilayer import MultiLayerSAE, MultiLayerSAEConfig, evaluate

N_LAYERS, D_MODEL, CONTEXT = 12, 256, 128


def main() -> None:
    """Check, time and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="about a minute")
    args = parser.parse_args()
    d_vocab, n_prompts, rounds = (8_192, 8, 3) if args.small else (50_257, 16, 5)
    model, sae = make_model(d_vocab), make_sae()
    tokens = torch.randint(1, d_vocab, (n_prompts, CONTEXT))
    print_versions("torch", "sae-lens", "transformer-lens")
    with announced("equality of results"):
        ours = evaluate(sae, model, tokens).to_dataframe()
        host = loop_run_evals(sae, model, tokens)
        same = ours.loc[:, list(host.columns)]
        pd.testing.assert_frame_equal(same, host, atol=1e-4, rtol=1e-4)
    turns = {
        "evaluate": lambda: evaluate(sae, model, tokens),
        "run_evals, looped": lambda: loop_run_evals(sae, model, tokens),
    }
    seconds = time_in_turns(turns, rounds)
    print(
        f"{N_LAYERS} layers, d_model {D_MODEL}, vocabulary {d_vocab:,}, "
        f"{n_prompts} prompts x {CONTEXT}, {rounds} rounds"
    )
    for name, times in seconds.items():
        peak = peak_rss_mib(turns[name])
        print(f"{name:20}{statistics.median(times):8.2f} s {peak:8.0f} MiB")
    speed_up = ratio(seconds["run_evals, looped"], seconds["evaluate"])
    print(f"evaluate is {speed_up:.1f} times faster")


def make_model(d_vocab: int) -> Any:
    """A random GPT with 12 layers."""
    return HookedTransformer(
        HookedTransformerConfig(
            n_layers=N_LAYERS,
            d_model=D_MODEL,
            n_ctx=CONTEXT,
            d_head=64,
            n_heads=D_MODEL // 64,
            d_mlp=4 * D_MODEL,
            d_vocab=d_vocab,
            act_fn="gelu",
            normalization_type="LN",
            seed=0,
        )
    )


def make_sae() -> MultiLayerSAE:
    """A random SAE on all layers."""
    torch.manual_seed(0)
    sae = MultiLayerSAE(MultiLayerSAEConfig(D_MODEL, 16 * D_MODEL, k=32))
    sae.cfg.metadata.hook_names = [
        f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS)
    ]
    sae.cfg.metadata.context_size = CONTEXT
    sae.cfg.metadata.prepend_bos = False
    return sae


def loop_run_evals(
    sae: MultiLayerSAE, model: Any, tokens: torch.Tensor
) -> pd.DataFrame:
    """SAELens' own evaluation of each view on the same tokens."""
    rows = {}
    for view in sae.views():
        store = ActivationsStore.from_sae(
            model, view, Dataset.from_dict({"input_ids": tokens}), streaming=False
        )
        config = EvalConfig(
            batch_size_prompts=8,
            n_eval_reconstruction_batches=len(tokens) // 8,
            compute_kl=True,
            compute_ce_loss=True,
        )
        found, _ = run_evals(
            view,
            store,
            model,
            ActivationScaler(),
            config,
            exclude_special_tokens=False,
        )
        ce = found["model_performance_preservation"]
        rows[view.cfg.metadata.hook_name] = {
            "ce_loss_clean": ce["ce_loss_without_sae"],
            "ce_loss_spliced": ce["ce_loss_with_sae"],
            "kl_div": found["model_behavior_preservation"]["kl_div_with_sae"],
            "ce_loss_ablated": ce["ce_loss_with_ablation"],
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("hook_name")


if __name__ == "__main__":
    main()
