"""Pseudo-random numbers that depend on what is sampled, not on the order of batches."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

# The constants of SplitMix64 (Steele et al., 2014), as signed integers.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_FACTORS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


def uniform_hash(*keys: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Numbers in (0, 1], uniform over different keys; equal keys give equal numbers.

    Args:
        keys: Tensors of integers; a number depends on one element of each.
    """
    hashed = torch.zeros_like(keys[0], dtype=torch.int64)
    for key in keys:
        # Products of int64 wrap around, as SplitMix64 needs.
        hashed = hashed + key + _STEP
        for shift, factor in _FACTORS:
            hashed = (hashed ^ _shift_right(hashed, shift)) * factor
        hashed = hashed ^ _shift_right(hashed, 31)
    return (_shift_right(hashed, 11) + 1).double() / 2**53


def _shift_right(values: Int[Tensor, " n"], n_bits: int) -> Int[Tensor, " n"]:
    """Shift as if the integers had no sign."""
    return (values >> n_bits) & (2 ** (64 - n_bits) - 1)
