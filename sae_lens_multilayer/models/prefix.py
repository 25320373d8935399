"""Single positions of a prompt, after the keys and values of its earlier positions."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from typing_extensions import override

from sae_lens_multilayer.models.decoder import Decoder, DecoderWalk
from sae_lens_multilayer.models.walk import Walk, walk_differs


class Prefix:
    """The keys and values of a prompt, from one run without edits.

    What changes at a position of a causal model changes nothing before it. So a run
    edited at one position needs this position only:

        prefix = model.prefix(tokens)  # [1, pos]
        walk = prefix.walk(torch.tensor([5, 5, 7]))  # three runs of one position each
        stream = walk.run_block(stream, block)  # [3, 1, d_model]

    Not every model can do this, such as one with layers without keys: see
    `prefix_differs`.
    """

    @torch.no_grad()
    def __init__(
        self,
        decoder: Decoder,
        tokens: Int[Tensor, "1 pos"],
        mask: Int[Tensor, "1 pos"] | None,
    ) -> None:
        """Run the prompt once; ValueError if attention sees a part of it only."""
        window, n_pos = decoder.attention_window, tokens.shape[1]
        # A walk puts its position after the whole prompt, from where it must see all.
        if window is not None and window <= n_pos:
            raise ValueError(
                f"attention sees {window} positions; the prompt has {n_pos}"
            )
        self._decoder, self._tokens = decoder, tokens
        self._mask = torch.ones_like(tokens) if mask is None else mask
        self._cache = _FixedCache()
        walk = DecoderWalk(decoder, tokens, mask, self._cache)
        stream = walk.residual
        for block in range(len(decoder.blocks)):
            stream = walk.run_block(stream, block)
        self._cache.is_fixed = True

    def walk(self, position: Int[Tensor, " row"]) -> Walk:
        """A walk whose rows are one position of the prompt each."""
        position = position.to(self._tokens.device)
        n_pos = self._tokens.shape[1]
        earlier = torch.arange(n_pos, device=position.device) < position.unsqueeze(1)
        own = torch.ones_like(position).unsqueeze(1)
        mask = torch.cat([self._mask * earlier, own], 1)
        tokens = self._tokens[0, position].unsqueeze(1)
        return DecoderWalk(self._decoder, tokens, mask, self._cache)


class _FixedCache(DynamicCache):
    """Once it is fixed, new keys and values are appended to the result only."""

    is_fixed = False

    @override
    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor, Tensor]:
        if not self.is_fixed:
            return super().update(key_states, value_states, layer_idx)
        layer: Any = self.layers[layer_idx]
        return _after(layer.keys, key_states), _after(layer.values, value_states)


def _after(
    old: Float[Tensor, "1 head pos d_head"], new: Float[Tensor, "row head 1 d_head"]
) -> Float[Tensor, "row head all_pos d_head"]:
    return torch.cat([old.expand(len(new), -1, -1, -1), new], 2)


def prefix_differs(
    prefix: Prefix,
    position: Int[Tensor, " row"],
    streams: Sequence[Float[Tensor, "1 pos d_model"]],
    logits: Float[Tensor, "1 pos d_vocab"],
) -> str | None:
    """How single positions differ from a whole pass; None: they agree.

    Args:
        streams, logits: See `walk_differs`.
    """
    alone = [x[0, position].unsqueeze(1) for x in (*streams, logits)]
    return walk_differs(prefix.walk(position.repeat(2)), alone[:-1], alone[-1])
