"""SAEs used with the k at which they reconstruct equally well."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_multilayer.evaluation.metrics import LayerSums
from sae_lens_multilayer.models.model import Model

TOLERANCE = 0.005
"""SAEs whose FVU differs by more are not compared at equal reconstruction."""
_ROWS = 512

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextVectors:
    """The vectors of a text at each hook."""

    vectors: Float[Tensor, "layer token d_in"]
    fingerprint: str
    """Of the text's tokens."""


@torch.no_grad()
def vectors_of_text(
    lm: Model, ids: Tensor, hook_names: Sequence[str], batch_size_prompts: int
) -> Float[Tensor, "layer prompt pos d_in"]:
    """The vectors of each hook, on the CPU."""
    parts = [
        torch.stack([x.cpu() for x in lm.vectors(batch, hook_names)])
        for batch in ids.split(batch_size_prompts)
    ]
    return torch.cat(parts, 1)


@torch.no_grad()
def mean_fvu(
    sae: Any, x: Float[Tensor, "layer token d_in"], hook_names: Sequence[str]
) -> float:
    """Fraction of variance unexplained in raw space, mean over layers."""
    fvu: list[float] = []
    for name, of_layer in zip(hook_names, x, strict=True):
        rows = of_layer.to(sae.device, sae.dtype)
        parts = [
            sae.decode_topk(sae.encode_topk(part, name), name)
            for part in rows.split(_ROWS)
        ]
        none = torch.zeros(0, dtype=torch.int64, device=rows.device)
        sums = LayerSums.of_layer(
            rows, torch.cat(parts), none, none.to(rows.dtype), sae.cfg.d_sae
        )
        fvu.append(float(sums.fvu))
    return sum(fvu) / len(fvu)


def match_fvu(
    sae: Any,
    x: Float[Tensor, "layer token d_in"],
    hook_names: Sequence[str],
    target: float,
) -> float:
    """Set `sae.cfg.k` to a k whose raw-space FVU is nearest to a target.

    As k grows from 1, the FVU falls to its minimum, at or above the k of training, and
    then may rise, as weak activations are mostly noise; k is found by bisection where
    it falls. A warning is logged if no k there comes within `TOLERANCE`.

    Returns:
        The FVU with this k.
    """
    found: dict[int, float] = {}

    def at(k: int) -> float:
        if k not in found:
            sae.cfg.k = k
            found[k] = mean_fvu(sae, x, hook_names)
        return found[k]

    low, high = 1, sae.cfg.k
    while at(high) > target and high < sae.cfg.d_sae:
        more = min(sae.cfg.d_sae, high + max(1, high // 8))
        if at(more) >= at(high):
            break  # past the minimum
        low, high = high, more
    while at(high) <= target and high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle) <= target else (middle, high)
    at(low)
    sae.cfg.k = min(found, key=lambda k: abs(found[k] - target))
    fvu = found[sae.cfg.k]
    if abs(fvu - target) > TOLERANCE:
        logger.warning(
            "The FVU with the nearest k = %s is %.4f, not %.4f: they differ by more "
            "than %s, so reconstructions are not equally good.",
            *(sae.cfg.k, fvu, target, TOLERANCE),
        )
    return fvu
