"""Running a model from the middle: a batch of prompts, one block at a time."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_OWN_PACKAGES = ("transformer_lens.", "sae_lens.", "transformers.", "accelerate.")
_MAX_DIFFERENCE = 1e-4
"""Relative difference up to which vectors may be alike, in any dtype."""


class Walk(ABC):
    """A batch of prompts that passes through a model's blocks one call at a time.

    `Model.walk` makes one; no block has run then, so it is cheap. The rows of a stream
    given to `run_block` belong to the prompts of the walk, in order. To run several
    edits of some prompts as one larger batch, walk over the prompts repeated:

        walk = model.walk(tokens.repeat(n_edits, 1))
        stream = torch.cat(edited)  # [n_edits * prompt, pos, d_model], after block l
        for block in range(l + 1, model.shape.n_layers):
            stream = walk.run_block(stream, block)
        logits = walk.logits(stream)

    Gradients flow unless the caller disables them. The model is not changed, so a walk
    may run while another thread uses the model.
    """

    residual: Float[Tensor, "prompt pos d_model"]
    """The residual stream before the first block."""

    @abstractmethod
    def run_block(
        self, stream: Float[Tensor, "prompt pos d_model"], block: int
    ) -> Float[Tensor, "prompt pos d_model"]:
        """The residual stream after a block, from the one before it."""

    @abstractmethod
    def logits(
        self, stream: Float[Tensor, "row chunk d_model"]
    ) -> Float[Tensor, "row chunk d_vocab"]:
        """Logits of a residual stream after the last block.

        Each position is computed by itself, so any rows and positions may be given, up
        to a context in each row.
        """


@torch.no_grad()
def walk_differs(
    walk: Walk,
    streams: Sequence[Float[Tensor, "prompt pos d_model"]],
    logits: Float[Tensor, "prompt pos d_vocab"],
) -> str | None:
    """How a walk differs from a whole pass; None: it agrees.

    Other vectors ride in the same batch, before the clean ones, and the blocks run from
    the last to the first. So a model that mixes prompts, or whose blocks leave
    something for the next one, differs. At each position, the difference may be the
    square root of the dtype's epsilon, relative to the largest value: 3e-4 in float32,
    0.09 in bfloat16.

    Args:
        walk: Over the prompts twice.
        streams: Before each block and after the last one, of the whole pass.
        logits: Of the whole pass.
    """
    n = len(logits)
    for block in reversed(range(len(streams) - 1)):
        clean = streams[block]
        stream = walk.run_block(torch.cat([4 * clean.flip(-1), clean]), block)
        if not agree(stream[n:], streams[block + 1]):
            return f"block {block} gives other vectors when it is called alone"
    if not agree(walk.residual[n:], streams[0]):
        return "the residual stream before the first block was not found"
    # Each position by itself, as only the scored ones are computed.
    alone = walk.logits(streams[-1].flatten(0, 1).unsqueeze(1))
    if not agree(alone.view(*logits.shape[:2], -1), logits):
        return "the part after the last block gives other logits when it runs alone"
    return None


@dataclass
class Alike:
    """What stays the same through all blocks if the residual stream is the same."""

    prompts: bool
    """Two prompts with the same stream. The blocks of Zamba and Gemma 4 read the tokens
    again."""
    positions: bool
    """The positions of a prompt that has the same vector at all of them. So they do in
    softmax attention, which averages equal values; not with attention sinks or in
    state-space blocks, which count the positions before."""


@torch.no_grad()
def find_alike(walk: Walk, n_layers: int) -> Alike:
    """Run each block on the same vector at all positions of at least two prompts."""
    vector = torch.linspace(-1, 1, walk.residual.shape[-1]).to(walk.residual)
    stream = vector.expand_as(walk.residual)
    after = [walk.run_block(stream, block) for block in range(n_layers)]
    return Alike(
        prompts=all(_alike(x, x[:1].expand_as(x), 100.0) for x in after),
        positions=all(_alike(x, x[:1, :1].expand_as(x), 32.0) for x in after),
    )


def _alike(found: Tensor, expected: Tensor, n_eps: float) -> bool:
    # 100 epsilons of bfloat16 would be 78% of the largest entry.
    most = _MAX_DIFFERENCE / torch.finfo(expected.dtype).eps
    return _within(found, expected, min(n_eps, most))


def agree(found: Tensor, expected: Tensor) -> bool:
    """Whether two ways to compute vectors or logits agree up to rounding."""
    n_eps = torch.finfo(expected.dtype).eps ** -0.5
    return found.shape == expected.shape and _within(found, expected, n_eps)


def _within(found: Tensor, expected: Tensor, n_eps: float) -> bool:
    """Whether vectors agree within so many epsilons of their largest entries."""
    tolerance = n_eps * torch.finfo(expected.dtype).eps * expected.abs().amax(-1, True)
    # NaN is a difference.
    return bool(((found - expected).abs() <= tolerance).all())


def attached_hooks(model: Any) -> list[str]:
    """Where a user has attached hooks to a model: hook points and modules.

    Hooks that belong to the libraries themselves are left out.
    """
    points = [name for name, point in model.hook_dict.items() if _is_used(point)]
    modules = [
        name or type(module).__name__
        for name, module in model.named_modules()
        if any(map(_is_foreign, _hooks_of(module)))
    ]
    return points + modules


def _is_used(point: Any) -> bool:
    return bool(point.fwd_hooks)


def _hooks_of(module: Any) -> list[Any]:
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def _is_foreign(hook: Any) -> bool:
    return not str(getattr(hook, "__module__", "")).startswith(_OWN_PACKAGES)
