"""SAEs with random weights, and processes that know nothing of this one."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import D_MODEL, N_CTX, N_LAYERS
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata

from sae_lens_multilayer import (
    MultiLayerSAE,
    MultiLayerSAEConfig,
    MultiLayerTrainingSAE,
    MultiLayerTrainingSAEConfig,
)
from sae_lens_multilayer.lens import LayerLens
from sae_lens_multilayer.lens_config import Alignment, LensConfig

HOOK_NAMES = [f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS)]


def random_sae(training: bool = False, **changes: Any) -> Any:
    """A multi-layer SAE of the tiny model whose every weight is random.

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
    """Vectors whose means and scales differ, as those of several layers do."""
    scale = torch.logspace(-1, 2, batch[-1], dtype=dtype).unsqueeze(-1)
    return (torch.randn(*batch, D_MODEL, dtype=dtype) + 0.5) * scale


def run_fresh(script: str, *args: str | Path) -> str:
    """Run Python in a process of its own and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, args)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
