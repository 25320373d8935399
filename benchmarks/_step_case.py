"""Vectors and weights on which `train_step.py` compares training steps."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from examples.smollm2 import held_out_prompts, load_smollm2
from sae_lens_multilayer.topk.reference import standardize

N_VECTORS, D_IN, K, K_AUX, AUX_COEFFICIENT = 2048, 512, 32, 256, 1 / 32
N_TOKENS = 128


@dataclass
class Case:
    """Sizes and inputs of one comparison."""

    expansion: int
    dead_share: float
    device: str
    residuals: bool

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        z = smollm2_vectors() if self.residuals else gaussian_vectors(generator)
        self.z = z.to(self.device)
        """Vectors [token, layer, d_in] of the multi-layer step."""
        self.x = self.z.flatten(0, 1)
        self.d_in = z.shape[-1]
        self.d_sae = self.expansion * self.d_in
        rows = torch.randn(self.d_sae, self.d_in, generator=generator)
        self.rows = (rows / rows.norm(dim=1, keepdim=True)).to(self.device)
        dead = torch.rand(self.d_sae, generator=generator) < self.dead_share
        self.dead = dead.to(self.device) if self.dead_share else None

    def parameters(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """New encoder rows, decoder rows and bias."""
        bias = nn.Parameter(self.x.new_zeros(self.d_in))
        return nn.Parameter(self.rows.clone()), nn.Parameter(self.rows.clone()), bias

    def loss_options(self) -> dict:
        return {
            "k": K,
            "dead_latents": self.dead,
            "k_aux": K_AUX,
            "aux_coefficient": AUX_COEFFICIENT,
        }


def gaussian_vectors(generator: torch.Generator) -> Tensor:
    mixing = torch.randn(D_IN, D_IN, generator=generator) / D_IN**0.5
    x = torch.randn(N_VECTORS, D_IN, generator=generator) @ mixing
    return x.unsqueeze(1)


@cache
def smollm2_vectors() -> Tensor:
    """Standardised vectors [token, layer, d_in] of all blocks on held-out text."""
    model = load_smollm2()
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    prompts = held_out_prompts(model, n_prompts=1, n_tokens=N_TOKENS)
    with torch.no_grad():
        _, found = model.run_with_cache(prompts, names_filter=names)
    return standardize(torch.stack([found[name][0] for name in names], dim=1))[0]
