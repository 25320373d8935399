"""A walk through the blocks of a HookedTransformer."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_multilayer.models.decoder import shallow_copy, with_submodule
from sae_lens_multilayer.models.walk import Walk

# The order of axes in memory in which no call copies the weight.
_HEAD = {"W_U": (1, 0)}
_INTO_HEADS = ("W_Q", "W_K", "_W_K", "W_V", "_W_V")
_ATTENTION = {"W_O": (2, 0, 1), **dict.fromkeys(_INTO_HEADS, (0, 2, 1))}
_GATED_MLP = {"W_in": (1, 0), "W_gate": (1, 0), "W_out": (1, 0)}


class HookedTransformerWalk(Walk):
    """See `Walk`; each block is a call of the model from one block to the next.

    TransformerLens copies its weights into another memory layout in each call of a
    block or of the unembedding. Here, the model shares all but the layout of these
    weights with the one given, so that a block is copied once for several calls.
    """

    def __init__(
        self, module: Any, tokens: Tensor, attention_mask: Tensor | None = None
    ) -> None:
        """Embed the tokens."""
        self._module = module
        self.residual, _, _, self._mask = module.input_to_embed(
            tokens, attention_mask=attention_mask
        )
        self._block, self._with_block = -1, module

    @override
    def run_block(self, stream: Tensor, block: int) -> Tensor:
        if block != self._block:
            self._with_block = _with_laid_out_block(self._module, block)
            self._block = block
        return self._with_block(
            stream,
            start_at_layer=block,
            stop_at_layer=block + 1,
            attention_mask=self._mask,
        )

    @override
    def logits(self, stream: Tensor) -> Tensor:
        self._block, self._with_block = -1, self._module  # Free the copied weights.
        n_layers = self._module.cfg.n_layers
        return self._head(stream, start_at_layer=n_layers, return_type="logits")

    @cached_property
    def _head(self) -> Any:
        unembed = _laid_out(self._module.unembed, _HEAD)
        return with_submodule(self._module, ["unembed"], unembed)


def _with_laid_out_block(model: Any, block: int) -> Any:
    shallow = shallow_copy(model.blocks[block])
    modules = shallow._modules
    if "attn" in modules:  # A user's own block may have none.
        modules["attn"] = _laid_out(modules["attn"], _ATTENTION)
    if hasattr(modules.get("mlp"), "W_gate"):
        modules["mlp"] = _laid_out(modules["mlp"], _GATED_MLP)
    return with_submodule(model, ["blocks", str(block)], shallow)


def _laid_out(module: Any, orders: Mapping[str, tuple[int, ...]]) -> Any:
    """A copy of a module whose weights have their axes in these orders in memory."""
    shallow = shallow_copy(module)
    parameters = dict(shallow._parameters)
    for name, order in orders.items():
        weight = parameters.get(name)
        # Quantised weights are subclasses.
        if type(weight) is nn.Parameter and weight.ndim == len(order):
            back = torch.tensor(order).argsort().tolist()
            parameters[name] = weight.permute(order).contiguous().permute(back)
    shallow.__dict__["_parameters"] = parameters
    return shallow
