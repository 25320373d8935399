"""Which tokens of a batch of prompts are padding, for every kind of model."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


def padding_mask(
    tokens: Int[Tensor, "prompt pos"], tokenizer: Any, prepends_bos: bool
) -> Int[Tensor, "prompt pos"] | None:
    """1 at text and 0 at padding on the left; None if there is no padding.

    Padding are the pad tokens at the start of a prompt if the tokenizer pads on the
    left. Where its pad token is its BOS, a single one is the BOS of a prompt without
    padding; the last one of several is the BOS if `prepends_bos`. Padding on the right
    needs no mask: in a causal model, earlier positions do not see it.

    Args:
        prepends_bos: Whether the model's tokenizer starts a prompt with the BOS.

    Example:
        >>> from types import SimpleNamespace
        >>> gpt2 = SimpleNamespace(pad_token_id=0, bos_token_id=0, padding_side="left")
        >>> padding_mask(torch.tensor([[0, 7, 8], [0, 0, 8]]), gpt2, False)
        tensor([[1, 1, 1],
                [0, 0, 1]])
    """
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None or tokenizer.padding_side != "left":
        return None
    n_leading = tokens.eq(pad).long().cumprod(-1).sum(-1, keepdim=True)
    if pad == tokenizer.bos_token_id:
        n_leading = n_leading - (prepends_bos | (n_leading == 1)).long()
    mask = torch.arange(tokens.shape[1], device=tokens.device) >= n_leading
    return None if mask.all() else mask.long()
