"""Finds prompts whose first position has very long vectors (an attention sink)."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sae_lens_multilayer.analysis.stream import TokenStream

_LONG = 4.0
"""Ratio of norms from which the first position dominates averages over tokens."""


def first_position_ratio(
    model: Any, hook_names: Sequence[str], tokens: Int[Tensor, "prompt pos"]
) -> float:
    """Ratio of the mean norm at first positions to that at others, the largest layer's.

    Models attend to the first position when there is nothing to attend to; its vectors
    can be hundreds of times as long as others. Prompts have two or more positions.
    """
    sums = torch.zeros(2, len(hook_names), dtype=torch.float64)
    for batch in TokenStream(model, hook_names, tokens, batch_size_prompts=1):
        norms = batch.x.norm(dim=-1).cpu().double()
        sums.index_add_(0, (batch.position > 0).long(), norms)
    first, rest = sums[0], sums[1] / (tokens.shape[1] - 1)
    return torch.nan_to_num(first / rest).max().item()


def first_position_warning(
    model: Any,
    hook_names: Sequence[str],
    tokens: Int[Tensor, "prompt pos"],
    exclude_positions: Sequence[int] = (),
) -> str | None:
    """A sentence for the user if the first position dominates averages over tokens.

    None if its vectors are less than 4 times as long as others, or are excluded.
    """
    n_pos = tokens.shape[1]
    if n_pos < 2 or {0, -n_pos}.intersection(exclude_positions):
        return None
    ratio = first_position_ratio(model, hook_names, tokens)
    if ratio < _LONG:
        return None
    return (
        f"The vectors at position 0 are up to {ratio:.0f} times as long as at other "
        "positions (an attention sink) and dominate every average over tokens."
    )
