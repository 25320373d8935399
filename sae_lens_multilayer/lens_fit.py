"""Fits a tuned lens to any model the host can load, in the format of tuned-lens."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from sae_lens.load_model import HookedProxyLM
from torch import Tensor, nn
from tqdm.auto import tqdm
from tuned_lens import TunedLens
from tuned_lens.nn.lenses import TunedLensConfig
from tuned_lens.nn.unembed import Unembed
from typing_extensions import override

from sae_lens_multilayer import hooks
from sae_lens_multilayer.checkpoints import check_free, complete_or_absent

_FINAL_NORMS = ("norm", "final_layer_norm", "ln_f", "final_layernorm")
_RECIPE_TOKENS_PER_STEP = 2**18


class ModelUnembed(Unembed):
    """tuned-lens' `Unembed` for every kind of model the host can load.

    tuned-lens builds its own for a HookedTransformer and for seven Hugging Face
    families, and leaves out a soft cap on the logits.
    """

    def __init__(self, model: Any) -> None:
        """Take the final norm (a copy) and the unembedding (its memory is shared)."""
        nn.Module.__init__(self)
        norm, weight, bias, self.soft_cap = _head_of(model)
        self.final_norm = hooks_removed_copy(norm)
        self.unembedding = nn.Linear(1, 1, bias=False)
        self.unembedding.out_features, self.unembedding.in_features = weight.shape
        self.unembedding.weight = nn.Parameter(weight.detach())
        if bias is not None:
            self.unembedding.bias = nn.Parameter(bias.detach())
        self.requires_grad_(False)

    @override
    def forward(
        self, h: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch d_vocab"]:
        logits = super().forward(h)
        if self.soft_cap is None:
            return logits
        return self.soft_cap * torch.tanh(logits / self.soft_cap)
