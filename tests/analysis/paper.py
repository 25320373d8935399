"""Numbers of the paper's own code; see `data/paper/SOURCE.md`."""

from pathlib import Path

import torch
from conftest import PAPER_DATA
from safetensors.torch import load_file


def paper_numbers(name: str) -> Path:
    return PAPER_DATA / name


def paper_acts() -> torch.Tensor:
    """Activations of the paper's autoencoder on its tokens, [token, layer, d_sae]."""
    sae = load_file(PAPER_DATA / "plain.safetensors")
    x = load_file(PAPER_DATA / "activations.safetensors")["resid_post"]
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    u = (x - mean) / (std + 1e-5) - sae["pre_encoder_bias"]
    values, indices = (u @ sae["encoder.weight"].T).topk(8)
    acts = torch.zeros(*x.shape[:-1], 512).scatter(3, indices, values.relu())
    return acts.flatten(1, 2).transpose(0, 1).double()
