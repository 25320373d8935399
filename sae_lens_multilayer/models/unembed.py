"""tuned-lens' `Unembed` for every kind of model."""

import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tuned_lens.nn.unembed import Unembed
from typing_extensions import override


class ModelUnembed(Unembed):
    """tuned-lens' `Unembed` for every kind of model, and with a soft cap."""

    def __init__(
        self,
        final_norm: nn.Module,
        weight: Float[Tensor, "d_vocab d_model"],
        bias: Float[Tensor, " d_vocab"] | None,
        soft_cap: float | None,
    ) -> None:
        """Copy the final norm and share the memory of the unembedding."""
        nn.Module.__init__(self)
        self.final_norm = copy.deepcopy(final_norm)
        # The hooks of a HookedProxyLM would write to its hook points.
        self.final_norm._forward_hooks.clear()
        d_vocab, d_model = weight.shape
        has_bias = bias is not None
        self.unembedding = nn.Linear(d_model, d_vocab, has_bias, device="meta")
        self.unembedding.weight = nn.Parameter(weight.detach())
        if bias is not None:
            self.unembedding.bias = nn.Parameter(bias.detach())
        self.soft_cap = soft_cap if soft_cap and soft_cap > 0 else None
        self.requires_grad_(False)

    @override
    def forward(
        self, h: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch d_vocab"]:
        return self._capped(super().forward(h))

    def token_logits(
        self, h: Float[Tensor, "row d_model"], token: Int[Tensor, " row"]
    ) -> Float[Tensor, " row"]:
        """The logit of one token for each vector, without those of the others."""
        logits = (self.final_norm(h) * self.unembedding.weight[token]).sum(-1)
        bias = self.unembedding.bias
        # In torch's types it is never None.
        if bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
            logits = logits + bias[token]
        return self._capped(logits)

    def _capped(self, logits: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        if self.soft_cap is None:
            return logits
        return self.soft_cap * torch.tanh(logits / self.soft_cap)
