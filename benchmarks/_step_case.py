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
    d_in: int = D_IN
    n_vectors: int = N_VECTORS

    def __post_init__(self) -> None:
        generator = torch.Generator(self.device).manual_seed(0)
        made = smollm2_vectors() if self.residuals else self._gaussian(generator)
        self.z = made.to(self.device)
        """Vectors [token, layer, d_in] of the multi-layer step."""
        self.x = self.z.flatten(0, 1)
        self.n_vectors, self.d_in = self.x.shape
        self.d_sae = self.expansion * self.d_in
        self.rows = self._normal(self.d_sae, self.d_in, generator)
        self.rows /= self.rows.norm(dim=1, keepdim=True)
        uniform = torch.rand(self.d_sae, generator=generator, device=self.device)
        self.dead = uniform < self.dead_share if self.dead_share else None

    def _normal(self, n_rows: int, width: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n_rows, width, generator=generator, device=self.device)

    def _gaussian(self, generator: torch.Generator) -> Tensor:
        mixing = self._normal(self.d_in, self.d_in, generator) / self.d_in**0.5
        return (self._normal(self.n_vectors, self.d_in, generator) @ mixing)[:, None]

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


@cache
def smollm2_vectors() -> Tensor:
    """Standardised vectors [token, layer, d_in] of all blocks on held-out text."""
    model = load_smollm2()
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    prompts = held_out_prompts(model, n_prompts=1, n_tokens=N_TOKENS)
    with torch.no_grad():
        _, found = model.run_with_cache(prompts, names_filter=names)
    return standardize(torch.stack([found[name][0] for name in names], dim=1))[0]
