"""SAEs with random weights, SAELens' metrics, and scripts in new processes."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import D_MODEL, N_CTX, N_LAYERS
from datasets import Dataset
from sae_lens import SAE, ActivationsStore
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler

from sae_lens_multilayer import (
    MultiLayerSAE,
    MultiLayerSAEConfig,
    MultiLayerTrainingSAE,
    MultiLayerTrainingSAEConfig,
)
from sae_lens_multilayer.lens.config import Alignment, LensConfig
from sae_lens_multilayer.lens.lens import LayerLens

HOOK_NAMES = [f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS)]


def random_sae(training: bool = False, **changes: Any) -> Any:
    """A multi-layer SAE of the tiny model with random weights.

    The encoder is not the decoder's transpose and `b_dec` is not 0, as after training.
    """
    settings = {"d_in": D_MODEL, "d_sae": 64, "k": 4, **changes}
    settings.setdefault(
        "metadata",
        SAEMetadata(
            hook_names=HOOK_NAMES,
            model_name="tiny",
            context_size=N_CTX,
            prepend_bos=False,
        ),
    )
    if training:
        sae = MultiLayerTrainingSAE(MultiLayerTrainingSAEConfig(**settings))
    else:
        sae = MultiLayerSAE(MultiLayerSAEConfig(**settings))
    return randomize(sae)


def randomize(sae: SAE[Any]) -> SAE[Any]:
    with torch.no_grad():
        sae.W_enc.add_(torch.randn_like(sae.W_enc), alpha=0.1)
        sae.b_dec.add_(torch.randn_like(sae.b_dec), alpha=0.3)
    return sae


def random_lens(
    hook_names: Sequence[str] = tuple(HOOK_NAMES),
    alignment: Alignment = "reference",
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> LayerLens:
    """A lens of the tiny model with a translator at every hook."""
    settings = {"n_layers": N_LAYERS, "d_in": D_MODEL, **changes}
    config = LensConfig(list(hook_names), alignment=alignment, **settings)
    lens = LayerLens(config, dtype)
    for tensor in lens.buffers():
        tensor.normal_(std=0.1)
    return lens


def random_acts(*batch: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Vectors whose means and scales differ between layers."""
    scale = torch.logspace(-1, 2, batch[-1], dtype=dtype).unsqueeze(-1)
    return (torch.randn(*batch, D_MODEL, dtype=dtype) + 0.5) * scale


def host_numbers(
    view: SAE[Any], model: Any, tokens: torch.Tensor, exclude: Sequence[int] = ()
) -> dict[str, float]:
    """Metrics of a view from `sae_lens.evals.run_evals`, under our names."""
    dataset = Dataset.from_dict({"input_ids": tokens})
    store = ActivationsStore.from_sae(model, view, dataset, streaming=False)
    config = EvalConfig(
        batch_size_prompts=len(tokens),
        n_eval_reconstruction_batches=1,
        n_eval_sparsity_variance_batches=1,
        compute_kl=True,
        compute_ce_loss=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
    )
    found, _ = run_evals(
        view,
        store,
        model,
        ActivationScaler(),
        eval_config=config,
        exclude_special_tokens=list(exclude),
    )
    ce, kl = (
        found["model_performance_preservation"],
        found["model_behavior_preservation"],
    )
    quality, sparsity = found["reconstruction_quality"], found["sparsity"]
    return {
        "ce_loss_clean": ce["ce_loss_without_sae"],
        "ce_loss_spliced": ce["ce_loss_with_sae"],
        "ce_loss_ablated": ce["ce_loss_with_ablation"],
        "ce_loss_score": ce["ce_loss_score"],
        "kl_div": kl["kl_div_with_sae"],
        "fvu": 1 - quality["explained_variance"],
        "mse": quality["mse"] / view.cfg.d_in,
        "l0": sparsity["l0"],
        "l1": sparsity["l1"],
    }


def run_fresh(script: str, *args: str | Path) -> str:
    """Run a Python script in a new process and return its output.

    It has as many threads as this process, on which rounding depends.
    """
    n_threads = str(torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, args)],
        cwd=Path(__file__).parents[1],
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TQDM_DISABLE": "1",
            "OMP_NUM_THREADS": n_threads,
            "MKL_NUM_THREADS": n_threads,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
