"""A walk through the blocks of a HookedTransformer."""

from functools import cached_property
from typing import Any

from torch import Tensor
from typing_extensions import override

from sae_lens_multilayer.models.decoder import shallow_copy, with_submodule
from sae_lens_multilayer.models.walk import Walk


class HookedTransformerWalk(Walk):
    """See `Walk`; each block is a call of the model from one block to the next."""

    def __init__(
        self, module: Any, tokens: Tensor, attention_mask: Tensor | None = None
    ) -> None:
        """Embed the tokens."""
        self._module = module
        self.residual, _, _, self._mask = module.input_to_embed(
            tokens, attention_mask=attention_mask
        )

    @override
    def run_block(self, stream: Tensor, block: int) -> Tensor:
        return self._module(
            stream,
            start_at_layer=block,
            stop_at_layer=block + 1,
            attention_mask=self._mask,
        )

    @override
    def logits(self, stream: Tensor) -> Tensor:
        n_layers = self._module.cfg.n_layers
        return self._head(stream, start_at_layer=n_layers, return_type="logits")

    @cached_property
    def _head(self) -> Any:
        """The model, sharing all but the memory layout of its unembedding.

        Each call of `Unembed` makes a contiguous copy of `W_U.T` unless `W_U` is laid
        out so already: 113 MB for a vocabulary of 49,152 and width 576.
        """
        unembed = shallow_copy(self._module.unembed)
        parameters = dict(unembed._parameters)
        parameters["W_U"] = parameters["W_U"].T.contiguous().T
        unembed.__dict__["_parameters"] = parameters
        return with_submodule(self._module, ["unembed"], unembed)
