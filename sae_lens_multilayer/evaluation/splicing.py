"""Runs of a model with activations replaced at some hooks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_multilayer.hooks import block_end
from sae_lens_multilayer.models.model import Model, Replace

Edit = Mapping[int, Replace]
"""The replacement at each edited hook, by its index on the layer axis."""
Run = Callable[[slice], Float[Tensor, "prompt chunk d_vocab"]]
"""A run of a batch of prompts: computes its logits at a slice of the positions."""


def make_splicer(
    model: Model, hook_names: Sequence[str], max_prompts: int, from_middle: bool | None
) -> "Splicer":
    """The fastest splicer for this model and these hooks.

    Args:
        max_prompts: Most prompts in one call of a block.
        from_middle: Start after the spliced block; False: hooks on whole passes; None:
            start in the middle if the model can.
    """
    model.own_hook_names(hook_names)
    can = model.can_start_in_middle(hook_names)
    if from_middle and not can:
        raise ValueError(
            "`from_middle` needs a HookedTransformer and hooks at hook_resid_pre or "
            f"hook_resid_post; got {type(model.module).__name__} and {hook_names}."
        )
    if can and from_middle is not False:
        return ResidualSplicer(model, hook_names, max_prompts)
    return HookSplicer(model, hook_names)


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
            assert end is not None  # as `can_start_in_middle` checks
            layer, is_output = end
            self._hooks_at.setdefault(layer + is_output, []).append(hook)

    def runs(
        self, tokens: Int[Tensor, "prompt pos"], edits: Sequence[Edit]
    ) -> Iterator[tuple[Run, Mapping[int, Run]]]:
        """All runs of a batch at once."""
        clean, mask = self._model.embed(tokens)
        streams: dict[int, Tensor] = {}
        for depth in range(self._model.shape.n_layers + 1):
            if depth > 0:
                before = [clean, *streams.values()]
                clean, *edited = self._step(before, depth - 1, mask)
                streams = dict(zip(streams, edited, strict=True))
            for hook in self._hooks_at.get(depth, []):
                for i, edit in enumerate(edits):
                    if hook in edit:
                        after = edit[hook](streams.get(i, clean))
                        streams[i] = after.to(clean.device, clean.dtype)
        runs = {i: partial(self._logits, stream) for i, stream in streams.items()}
        yield partial(self._logits, clean), runs

    def runs_of_any_prompt(
        self, tokens: Int[Tensor, "prompt pos"], edits: Sequence[Edit]
    ) -> Iterator[tuple[Run, Mapping[int, Run]]]:
        """Runs of one prompt of this length, for edits that replace all of it."""
        tokenizer = self._model.tokenizer
        # Any token except padding, which would be masked.
        token = int(tokenizer is not None and tokenizer.pad_token_id == 0)
        return self.runs(torch.full_like(tokens[:1], token), edits)

    def _logits(self, stream: Tensor, positions: slice) -> Tensor:
        return self._model.head(stream[:, positions])

    def _step(
        self,
        streams: list[Float[Tensor, "_ pos d_model"]],
        block: int,
        mask: Int[Tensor, "prompt pos"] | None,
    ) -> list[Float[Tensor, "_ pos d_model"]]:
        """Pass several batches of the same prompts through a block as one."""
        parts = torch.cat(streams).split(self._max_prompts)
        masks: Sequence[Tensor | None] = [None] * len(parts)
        if mask is not None:
            masks = mask.repeat(len(streams), 1).split(self._max_prompts)
        after = [
            self._model.run_block(part, block, part_mask)
            for part, part_mask in zip(parts, masks, strict=True)
        ]
        return list(torch.cat(after).split(len(streams[0])))


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


def _logits_at(logits: Tensor, positions: slice) -> Tensor:
    return logits[:, positions]
