"""Runs of a model with activations replaced at some hooks."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_multilayer.hooks import block_end
from sae_lens_multilayer.models.model import Model, Replace
from sae_lens_multilayer.models.walk import Walk

logger = logging.getLogger(__name__)

Edit = Mapping[int, Replace]
"""The replacement at each edited hook, by its index on the layer axis."""
Positions = slice | Int[Tensor, " row"]
"""Positions of all prompts, or rows of `prompt * n_pos + pos`."""
Run = Callable[[Positions], Float[Tensor, "*position d_vocab"]]
"""A run of a batch of prompts: computes its logits at some positions."""


def make_splicer(
    model: Model, hook_names: Sequence[str], max_prompts: int, from_middle: bool | None
) -> "Splicer":
    """The fastest splicer for this model and these hooks.

    Args:
        max_prompts: Most prompts in one call of a block.
        from_middle: Start after the spliced block; False: hooks on whole passes; None:
            start in the middle if the model can, else log why not.
    """
    model.own_hook_names(hook_names)
    reason = None if from_middle is False else model.why_whole_passes(hook_names)
    if from_middle and reason is not None:
        raise ValueError(
            f"`from_middle` must be None or False for {type(model.module).__name__}: "
            f"{reason}."
        )
    if reason is not None:
        logger.warning("Each edited run takes a whole forward pass: %s.", reason)
    if reason is not None or from_middle is False:
        return HookSplicer(model, hook_names)
    return ResidualSplicer(model, hook_names, max_prompts)


class ResidualSplicer:
    """Runs the blocks once in order; each edited run starts at its first hook.

    All runs share a block as one larger batch. For L hooked layers that is about L/2
    passes through the model in addition to the clean one, instead of L.
    """

    def __init__(
        self, model: Model, hook_names: Sequence[str], max_prompts: int
    ) -> None:
        """Find the depth of each hook; see `make_splicer`."""
        self._model = model
        self._max_prompts = max_prompts
        self._hooks_at: dict[int, list[int]] = {}
        for hook, name in enumerate(hook_names):
            end = block_end(name)
            assert end is not None  # as `why_whole_passes` checks
            layer, is_output = end
            self._hooks_at.setdefault(layer + is_output, []).append(hook)

    def runs(
        self, tokens: Int[Tensor, "prompt pos"], edits: Sequence[Edit]
    ) -> Iterator[tuple[Run, Mapping[int, Run]]]:
        """All runs of a batch at once."""
        most = max(1, self._max_prompts // len(tokens))
        logits, clean, streams = self._run(tokens, edits, most)
        runs = {i: partial(_head, logits, stream) for i, stream in streams.items()}
        yield partial(_head, logits, clean), runs

    def _run(
        self, tokens: Int[Tensor, "prompt pos"], edits: Sequence[Edit], most: int
    ) -> tuple[Callable[[Tensor], Tensor], Tensor, dict[int, Tensor]]:
        """The model's head, and the last residual streams: clean and of each edit.

        Args:
            most: Most runs in one call of a block.
        """
        walks = _Walks(self._model, tokens, most)
        clean = walks.of(1).residual
        streams: dict[int, Tensor] = {}
        for depth in range(self._model.shape.n_layers + 1):
            if depth > 0:
                before = [clean, *streams.values()]
                clean, *edited = walks.run_block(before, depth - 1)
                streams = dict(zip(streams, edited, strict=True))
            for hook in self._hooks_at.get(depth, []):
                for i, edit in enumerate(edits):
                    if hook in edit:
                        after = edit[hook](streams.get(i, clean))
                        streams[i] = after.to(clean.device, clean.dtype)
        return walks.of(1).logits, clean, streams

    @property
    def forgets_prompts(self) -> bool:
        """Whether replacing the whole stream leaves nothing of a prompt."""
        return self._model.alike.prompts

    def runs_of_any_prompt(self, n_pos: int, edits: Sequence[Edit]) -> tuple[int, Run]:
        """Runs of one prompt, for edits that set all positions to the same vector.

        Returns:
            The number of positions of the prompt, 1 if all are alike, and all runs as
            one of `len(edits)` prompts, so that a few positions share a product.
        """
        most = self._max_prompts
        if self._model.alike.positions:
            n_pos, most = 1, most * n_pos
        tokenizer = self._model.tokenizer
        # Any token except padding, which would be masked.
        token = int(tokenizer is not None and tokenizer.pad_token_id == 0)
        tokens = torch.full((1, n_pos), token, device=self._model.device)
        logits, _, streams = self._run(tokens, edits, most)
        stream = torch.cat([streams[i] for i in range(len(edits))])
        return n_pos, partial(_head, logits, stream)


class _Walks:
    """Walks over a batch of prompts repeated several times, made when needed."""

    def __init__(self, model: Model, tokens: Tensor, most: int) -> None:
        self._model, self._tokens, self._most = model, tokens, most
        self._walks: dict[int, Walk] = {}

    def of(self, n_times: int) -> Walk:
        """The walk over the prompts repeated so many times."""
        if n_times not in self._walks:
            # Masks may be large, so few are held: the largest and the last one.
            for held in [n for n in self._walks if n not in (1, self._most)]:
                del self._walks[held]
            walk = self._model.walk(self._tokens.repeat(n_times, 1))
            self._walks[n_times] = walk
        return self._walks[n_times]

    def run_block(
        self, streams: list[Float[Tensor, "prompt pos d_model"]], block: int
    ) -> list[Float[Tensor, "prompt pos d_model"]]:
        """Pass several streams of the prompts through a block as larger batches."""
        after: list[Tensor] = []
        for start in range(0, len(streams), self._most):
            part = streams[start : start + self._most]
            stream = self.of(len(part)).run_block(torch.cat(part), block)
            after += stream.split(len(part[0]))
        return after


def _head(
    logits: Callable[[Tensor], Tensor],
    stream: Float[Tensor, "prompt pos d_model"],
    at: Positions,
) -> Float[Tensor, "*position d_vocab"]:
    if isinstance(at, slice):
        return logits(stream[:, at])
    # As prompts of one position, since a prompt may not be longer than a context.
    rows = stream.flatten(0, 1)[at.to(stream.device)].unsqueeze(1)
    return logits(rows).squeeze(1)


class HookSplicer:
    """Runs a whole forward pass with hooks for each edit, with any model."""

    def __init__(self, model: Model, hook_names: Sequence[str]) -> None:
        """See `make_splicer`."""
        self._model = model
        self._hook_names = list(hook_names)

    def runs(
        self, tokens: Int[Tensor, "prompt pos"], edits: Sequence[Edit]
    ) -> Iterator[tuple[Run, Mapping[int, Run]]]:
        """One edited run at a time, so that only two sets of logits are held."""
        clean = partial(_logits_at, self._model.logits(tokens))
        for i, edit in enumerate(edits):
            by_name = {self._hook_names[hook]: edit[hook] for hook in edit}
            logits = self._model.logits_with_hooks(tokens, by_name)
            yield clean, {i: partial(_logits_at, logits)}


Splicer = ResidualSplicer | HookSplicer
"""Runs a batch of prompts clean and with edits, one or several at a time, by index.

The replacements of the edits that start at a hook are called in the order of the edits,
with clean activations unless an earlier hook was edited too.
"""


def _logits_at(
    logits: Float[Tensor, "prompt pos d_vocab"], at: Positions
) -> Float[Tensor, "*position d_vocab"]:
    if isinstance(at, slice):
        return logits[:, at]
    return logits.flatten(0, 1)[at.to(logits.device)]
