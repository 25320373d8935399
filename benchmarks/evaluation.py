"""Claims about `evaluate` over all layers, of the same weights in every kind of model.

It is several times as fast as with whole passes, and as `run_evals` in a loop; with a
TransformerBridge or a Hugging Face model it takes no longer than with a
HookedTransformer. It computes cross-entropy (clean, spliced, ablated) and KL divergence
for each layer, besides the errors of the reconstructions. Equality is checked first.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from sae_lens import ActivationsStore
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.load_model import HookedProxyLM
from sae_lens.training.activation_scaler import ActivationScaler
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.pretrained.weight_conversions.gpt2 import convert_gpt2_weights
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from benchmarks._common import (
    announced,
    peak_rss_mib,
    print_versions,
    ratio,
    time_in_turns,
)
from examples.smollm2 import held_out_prompts, load_smollm2, smollm2_folder
from sae_lens_multilayer import MultiLayerSAE, MultiLayerSAEConfig, evaluate
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.models.model import ModelShape

N_LAYERS, D_MODEL, CONTEXT = 12, 256, 128
KINDS = ("HookedTransformer", "TransformerBridge", "Hugging Face")


def main() -> None:
    """Check, time and print."""
    args = parse_args()
    models, tokens = make_case(args)
    shape = as_model(models[KINDS[0]]).shape
    saes = {kind: make_sae(kind, shape) for kind in KINDS}
    print_versions("torch", "sae-lens", "transformer-lens", "transformers")

    def run(kind: str, from_middle: bool) -> pd.DataFrame:
        metrics = evaluate(saes[kind], models[kind], tokens, from_middle=from_middle)
        return metrics.to_dataframe()

    def run_host(kind: str) -> pd.DataFrame:
        return loop_run_evals(saes[kind], models[kind], tokens)

    turns: dict[str, Callable[[], pd.DataFrame]] = {}
    for kind in KINDS:
        turns[f"{kind}, from the middle"] = partial(run, kind, True)
        turns[f"{kind}, whole passes"] = partial(run, kind, False)
        if kind != "TransformerBridge":  # `run_evals` does not take its hook names.
            turns[f"{kind}, run_evals"] = partial(run_host, kind)
    with announced("equality of results"):
        tables, peaks = run_once(turns)
        check_equal(tables)
    clock = time.process_time if args.cpu_time else time.perf_counter
    seconds = time_in_turns(turns, args.rounds, clock)
    print(
        f"{shape.n_layers} layers, d_model {shape.d_model}, "
        f"vocabulary {shape.d_vocab:,}, {len(tokens)} prompts x {CONTEXT}, "
        f"{args.rounds} rounds, {'CPU' if args.cpu_time else 'wall'} seconds"
    )
    fastest = seconds[f"{KINDS[0]}, from the middle"]
    for name, times in seconds.items():
        own = seconds[f"{name.split(',')[0]}, from the middle"]
        print(
            f"{name:36}{statistics.median(times):8.2f} s {peaks[name]:6.0f} MiB"
            f"{ratio(times, own):7.2f} x from the middle"
            f"{ratio(times, fastest):7.2f} x {KINDS[0]}"
        )


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_true", help="some minutes")
    size.add_argument("--smollm2", action="store_true", help="30 layers; half an hour")
    parser.add_argument("--prompts", type=int, help="default 16, 8 or 2")
    parser.add_argument("--rounds", type=int, help="default 5, 3 or 1")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="of this process instead of wall time, on a machine that others use",
    )
    args = parser.parse_args()
    defaults = (8, 3) if args.small else (2, 1) if args.smollm2 else (16, 5)
    args.prompts, args.rounds = args.prompts or defaults[0], args.rounds or defaults[1]
    return args


def make_case(args: argparse.Namespace) -> tuple[dict[str, Any], torch.Tensor]:
    """The models by kind, and the prompts."""
    if args.smollm2:
        models = load_models()
        return models, held_out_prompts(models[KINDS[0]], args.prompts, CONTEXT)
    d_vocab = 8_192 if args.small else 50_257
    return make_models(d_vocab), torch.randint(1, d_vocab, (args.prompts, CONTEXT))


def run_once(
    turns: dict[str, Callable[[], pd.DataFrame]],
) -> tuple[dict[str, pd.DataFrame], dict[str, float]]:
    """The result of each turn, and its peak memory in MiB."""
    tables: dict[str, pd.DataFrame] = {}
    peaks: dict[str, float] = {}
    for name, turn in turns.items():
        peaks[name] = peak_rss_mib(lambda: tables.update({name: turn()}))  # noqa: B023
    return tables, peaks


def check_equal(tables: dict[str, pd.DataFrame]) -> None:
    """Raise AssertionError if results of methods, or of kinds of models, differ.

    Vectors of two kinds differ by rounding, so at near ties they select other latents.
    """
    first, *_ = tables.values()
    for name, table in tables.items():
        kind = name.split(",")[0]
        own = tables.get(f"{kind}, from the middle", first)
        methods = 1e-4 if "run_evals" in name else 1e-5
        for expected, tolerance in ((own, methods), (first, 1e-3)):
            pd.testing.assert_frame_equal(
                table.reset_index(drop=True),
                expected.reset_index(drop=True).loc[:, list(table.columns)],
                atol=tolerance,
                rtol=tolerance,
            )


def make_models(d_vocab: int) -> dict[str, Any]:
    """A random GPT-2 with 12 layers, as every kind of model."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=d_vocab,
        n_positions=CONTEXT,
        n_embd=D_MODEL,
        n_layer=N_LAYERS,
        n_head=D_MODEL // 64,
        architectures=["GPT2LMHeadModel"],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0}, "a")), pad_token="a"
    )
    hf_model = GPT2LMHeadModel(config).eval()
    hooked = HookedTransformer(
        HookedTransformerConfig(
            n_layers=N_LAYERS,
            d_model=D_MODEL,
            n_ctx=CONTEXT,
            d_head=64,
            n_heads=D_MODEL // 64,
            d_mlp=4 * D_MODEL,
            d_vocab=d_vocab,
            act_fn="gelu_new",
            normalization_type="LN",
        )
    )
    state = convert_gpt2_weights(hf_model, hooked.cfg)
    hooked.load_state_dict(state, strict=False)  # Masks are missing.
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(
            folder, hf_model=copy.deepcopy(hf_model), tokenizer=tokenizer, device="cpu"
        )
    models: Any = (hooked, bridge, HookedProxyLM(hf_model, tokenizer))
    return dict(zip(KINDS, models, strict=True))


def load_models() -> dict[str, Any]:
    """SmolLM2 as every kind of model."""
    folder = str(smollm2_folder())
    hooked: Any = load_smollm2()
    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    bridge = TransformerBridge.boot_transformers(
        folder,
        hf_model=copy.deepcopy(hf_model),
        tokenizer=hooked.tokenizer,
        device="cpu",
    )
    models: Any = (hooked, bridge, HookedProxyLM(hf_model, hooked.tokenizer))
    return dict(zip(KINDS, models, strict=True))


def make_sae(kind: str, shape: ModelShape) -> MultiLayerSAE:
    """A random SAE on all layers of a kind of model."""
    torch.manual_seed(0)
    sae = MultiLayerSAE(MultiLayerSAEConfig(shape.d_model, 16 * shape.d_model, k=32))
    name = "blocks.{}.hook_resid_post"
    if kind == "Hugging Face":
        name = "transformer.h.{}" if shape.n_layers == N_LAYERS else "model.layers.{}"
    sae.cfg.metadata.hook_names = [name.format(i) for i in range(shape.n_layers)]
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
            batch_size_prompts=min(8, len(tokens)),
            n_eval_reconstruction_batches=max(1, len(tokens) // 8),
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
