"""Runs a model with activations replaced at some hooks, starting where they are."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from sae_lens_multilayer import hooks
from sae_lens_multilayer.store.store import one_vector_per_position

Replace = Callable[[Float[Tensor, "prompt pos d_in"]], Float[Tensor, "prompt pos d_in"]]
"""Gives what goes on instead of the activations at a hook, heads put end to end."""


@dataclass(frozen=True)
class Edit:
    """One run of the model: what is replaced at which hooks."""

    replace: Mapping[int, Replace]
    """From the position of a hook on the layer axis to its replacement."""


@runtime_checkable
class Run(Protocol):
    """The end of a run, from which logits can be had piece by piece."""

    def logits(self, positions: slice) -> Float[Tensor, "prompt chunk d_vocab"]: ...


@runtime_checkable
class Splicer(Protocol):
    """Runs a batch of prompts clean and with edits."""

    def runs(
        self, tokens: Int[Tensor, "prompt pos"], edits: Sequence[Edit]
    ) -> Iterator[tuple[Run, Mapping[int, Run]]]:
        """Give the clean run with one or several edited runs at a time.

        The replacements of the edits that start at a hook are called in the order of
        the edits, with clean activations unless an earlier hook was edited too.
        """
        ...


def make_splicer(
    model: Any, hook_names: Sequence[str], max_prompts: int, from_middle: bool | None
) -> Splicer:
    """The fastest way to splice into this model at these hooks.

    Args:
        max_prompts: Most prompts in one call of a block.
        from_middle: Start after the spliced block; False: hooks on whole passes; None:
            start in the middle where the model can.

    Raises:
        ValueError: If the model lacks a hook, or cannot start in the middle and must.
    """
    names = hooks.model_hook_names(model, hook_names)
    can = _can_start_in_the_middle(model, names)
    if from_middle and not can:
        raise ValueError(
            "`from_middle` needs a HookedTransformer and hooks at hook_resid_pre or "
            f"hook_resid_post; got {type(model).__name__} and {list(hook_names)}."
        )
    if can and from_middle is not False:
        return ResidualSplicer(model, names, max_prompts)
    return HookSplicer(model, names)


def _can_start_in_the_middle(model: Any, hook_names: Sequence[str]) -> bool:
    return (
        isinstance(model, HookedTransformer)
        # Its attention adds the embedding of positions in every block.
        and model.cfg.positional_embedding_type != "shortformer"
        and all(hooks.block_end(name) is not None for name in hook_names)
    )


@dataclass
class _Residual:
    model: HookedTransformer
    stream: Float[Tensor, "prompt pos d_model"]

    def logits(self, positions: slice) -> Float[Tensor, "prompt chunk d_vocab"]:
        # The final norm and the unembedding act on each position by itself.
        return self.model(
            self.stream[:, positions],
            start_at_layer=self.model.cfg.n_layers,
            return_type="logits",
        )


class ResidualSplicer:
    """Walks the blocks once; each edited run joins where its first hook is.

    All runs share a block as one larger batch. For L hooked layers that is about L/2
    passes through the model, less what is above the clean one, instead of L.
    """

    def __init__(
        self, model: HookedTransformer, hook_names: Sequence[str], max_prompts: int
    ) -> None:
        """Find at which depth each hook is.

        Args:
            hook_names: All of them at the residual stream before or after a block.
            max_prompts: Most prompts in one call of a block.
        """
        self._model = model
        self._max_prompts = max_prompts
        self._hooks_at: dict[int, list[int]] = {}
        for hook, name in enumerate(hook_names):
            end = hooks.block_end(name)
            assert end is not None  # checked by make_splicer
            layer, is_output = end
            depth = layer + is_output
            self._hooks_at.setdefault(depth, []).append(hook)

    def runs(
        self, tokens: Int[Tensor, "prompt pos"], edits: Sequence[Edit]
    ) -> Iterator[tuple[Run, Mapping[int, Run]]]:
        """All runs of a batch at once."""
        # The mask is of padding on the left, which the blocks cannot see otherwise.
        clean, _, _, mask = self._model.input_to_embed(tokens)
        streams: dict[int, Tensor] = {}
        for depth in range(self._model.cfg.n_layers + 1):
            if depth > 0:
                before = [clean, *streams.values()]
                clean, *edited = self._step(before, depth - 1, mask)
                streams = dict(zip(streams, edited, strict=True))
            for hook in self._hooks_at.get(depth, []):
                for i, edit in enumerate(edits):
                    if hook in edit.replace:
                        before = streams.get(i, clean)
                        after = edit.replace[hook](before)
                        streams[i] = after.to(clean.device, clean.dtype)
        runs = {i: _Residual(self._model, stream) for i, stream in streams.items()}
        yield _Residual(self._model, clean), runs

    def runs_of_any_prompt(
        self, tokens: Int[Tensor, "prompt pos"], edits: Sequence[Edit]
    ) -> Iterator[tuple[Run, Mapping[int, Run]]]:
        """Runs of one prompt of this length, for edits that leave nothing of it."""
        tokenizer = self._model.tokenizer
        # Of any token but padding, which would be masked.
        token = int(tokenizer is not None and tokenizer.pad_token_id == 0)
        return self.runs(torch.full_like(tokens[:1], token), edits)

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
            self._model(
                part,
                start_at_layer=block,
                stop_at_layer=block + 1,
                attention_mask=part_mask,
            )
            for part, part_mask in zip(parts, masks, strict=True)
        ]
        return list(torch.cat(after).split(len(streams[0])))


@dataclass
class _Logits:
    values: Float[Tensor, "prompt pos d_vocab"]

    def logits(self, positions: slice) -> Float[Tensor, "prompt chunk d_vocab"]:
        return self.values[:, positions]


class HookSplicer:
    """One whole forward pass with hooks for each run; for any hooked model."""

    def __init__(self, model: Any, hook_names: Sequence[str]) -> None:
        """Take the model and its own names of the hooks."""
        self._model = model
        self._hook_names = list(hook_names)

    def runs(
        self, tokens: Int[Tensor, "prompt pos"], edits: Sequence[Edit]
    ) -> Iterator[tuple[Run, Mapping[int, Run]]]:
        """One edited run at a time, so that only two sets of logits are held."""
        clean = _Logits(self._model(tokens, return_type="logits"))
        for i, edit in enumerate(edits):
            fwd_hooks = [
                (self._hook_names[hook], _as_hook(replace))
                for hook, replace in edit.replace.items()
            ]
            logits = self._model.run_with_hooks(
                tokens, return_type="logits", fwd_hooks=fwd_hooks
            )
            yield clean, {i: _Logits(logits)}


def _as_hook(replace: Replace) -> Callable[..., Tensor]:
    def hook_function(activations: Tensor, hook: Any) -> Tensor:
        after = replace(one_vector_per_position(activations, None))
        after = after.to(activations.device, activations.dtype)
        return after.reshape(activations.shape)  # [prompt, pos, d_in or head, d_head]

    return hook_function
