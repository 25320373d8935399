"""The end of a model, from the residual stream to logits, as tuned-lens uses it."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tuned_lens.nn.unembed import Unembed
from typing_extensions import override


class ModelUnembed(Unembed):
    """tuned-lens' `Unembed` for every kind of model.

    tuned-lens' own supports HookedTransformer and seven Hugging Face families, and no
    soft cap on the logits.
    """

    def __init__(
        self,
        final_norm: nn.Module,
        weight: Float[Tensor, "d_vocab d_model"],
        bias: Float[Tensor, " d_vocab"] | None,
        soft_cap: float | None,
    ) -> None:
        """Copy the final norm and share the memory of the unembedding.

        Args:
            soft_cap: Logits become `soft_cap * tanh(logits / soft_cap)`; None or a
                value of 0 or less: they stay as they are.
        """
        nn.Module.__init__(self)
        self.final_norm = copy.deepcopy(final_norm)
        # The hooks of a HookedProxyLM would write to its hook points.
        self.final_norm._forward_hooks.clear()
        self.unembedding = _linear(weight, bias)
        self.soft_cap = soft_cap if soft_cap and soft_cap > 0 else None
        self.requires_grad_(False)

    @override
    def forward(
        self, h: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch d_vocab"]:
        """Compute logits from residual-stream vectors, as the end of the model does."""
        logits = super().forward(h)
        if self.soft_cap is None:
            return logits
        return self.soft_cap * torch.tanh(logits / self.soft_cap)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    d_vocab, d_model = weight.shape
    linear = nn.Linear(d_model, d_vocab, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach())
    return linear
