"""A loaded language model of any kind, and its shape."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tuned_lens.utils import tensor_hash

from sae_lens_multilayer.hooks import (
    block_end,
    is_residual,
    own_hook_name,
    stop_at_layer,
)
from sae_lens_multilayer.models.padding import padding_mask
from sae_lens_multilayer.models.prefix import Prefix
from sae_lens_multilayer.models.unembed import ModelUnembed
from sae_lens_multilayer.models.walk import (
    Alike,
    Walk,
    attached_hooks,
    find_alike,
    walk_differs,
)

Replace = Callable[[Float[Tensor, "prompt pos d_in"]], Float[Tensor, "prompt pos d_in"]]
"""Computes the replacement of the activations at a hook, heads put end to end."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model; None where its configuration lacks one."""

    n_layers: int
    d_model: int
    n_ctx: int | None = None
    """Longest context in tokens."""
    d_vocab: int | None = None
    """Number of token ids."""

    @classmethod
    def of_config(cls, cfg: Any) -> "ModelShape":
        """The shape in a configuration of TransformerLens."""
        # It has -1 for a vocabulary of unknown size.
        d_vocab = max(0, getattr(cfg, "d_vocab", None) or 0) or None
        return cls(cfg.n_layers, cfg.d_model, getattr(cfg, "n_ctx", None), d_vocab)

    @classmethod
    def of_hf_config(cls, config: Any) -> "ModelShape":
        """The shape in a configuration of Hugging Face."""
        text = config.get_text_config()
        return cls(
            text.num_hidden_layers,
            text.hidden_size,
            getattr(text, "max_position_embeddings", None),
            getattr(text, "vocab_size", None),
        )

    def check_context_size(self, context_size: int, model_name: str) -> None:
        """Raise ValueError if a context is longer than the model's."""
        if self.n_ctx is not None and context_size > self.n_ctx:
            raise ValueError(
                f"`context_size` must be at most {self.n_ctx} tokens, the context of "
                f"{model_name!r}; got {context_size}."
            )

    def check_width(self, hook_names: Sequence[str], d_in: int) -> None:
        """Raise ValueError if hooks of the residual stream have another width."""
        residual = filter(is_residual, hook_names)
        check_widths(dict.fromkeys(residual, self.d_model), d_in)


def check_widths(widths: Mapping[str, int], d_in: int) -> None:
    """Raise ValueError unless all hooks, given with their widths, have width `d_in`."""
    for name, width in widths.items():
        if width != d_in:
            raise ValueError(
                f"`d_in` must be {width}, the width of the model at {name!r}; got "
                f"{d_in}. All hooks of one SAE must have the same width."
            )


class Model(ABC):
    """A loaded language model; `kinds.as_model` wraps a model of any kind."""

    module: Any
    """The model that was given to `as_model`."""
    shape: ModelShape

    def __init__(self, module: Any, shape: ModelShape) -> None:
        self.module, self.shape = module, shape
        self._own_names: dict[str, str] = {}

    @property
    @abstractmethod
    def name(self) -> str:
        """The name or folder of the model, for messages and lenses."""

    @property
    def device(self) -> torch.device:
        """The device on which the model expects its tokens."""
        return next(self.module.parameters()).device

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the model; None if it has none."""
        return getattr(self.module, "tokenizer", None)

    def own_hook_names(self, hook_names: Sequence[str]) -> list[str]:
        """The names under which the model itself lists these hooks.

        SAETransformerBridge lists `blocks.{layer}.hook_out` but silently ignores its
        alias `blocks.{layer}.hook_resid_post`, and so on.
        """
        if not set(hook_names) <= set(self._own_names):
            known = set(self.module.hook_dict)
            self._own_names |= {n: own_hook_name(known, n) for n in hook_names}
        return [self._own_names[name] for name in hook_names]

    def vectors(
        self,
        tokens: Int[Tensor, "prompt pos"],
        hook_names: Sequence[str],
        head_indices: Sequence[int | None] | None = None,
        **model_kwargs: Any,
    ) -> list[Float[Tensor, "prompt pos d_vector"]]:
        """The vectors of each hook, from one run that stops after the last hook."""
        own_names = self.own_hook_names(hook_names)
        _, cache = self._run(
            tokens, own_names, stop_at_layer=stop_at_layer(own_names), **model_kwargs
        )
        if off := [name for name in own_names if name not in cache]:
            raise ValueError(
                f"The model must run through the hooks {off}; they are switched off. "
                "Switch them on, such as `hook_result` with "
                "`model.set_use_attn_result(True)`."
            )
        heads = head_indices or [None] * len(own_names)
        return [
            one_vector_per_position(cache[name], head)
            for name, head in zip(own_names, heads, strict=True)
        ]

    def _run(self, tokens: Tensor, own_names: list[str], **kwargs: Any) -> Any:
        kwargs = self._mask_kwargs(tokens) | kwargs
        return self.module.run_with_cache(
            tokens.to(self.device), names_filter=own_names, **kwargs
        )

    def logits(
        self, tokens: Int[Tensor, "prompt pos"]
    ) -> Float[Tensor, "prompt pos d_vocab"]:
        """The logits of a whole forward pass."""
        return self.module(
            tokens.to(self.device), return_type="logits", **self._mask_kwargs(tokens)
        )

    def logits_with_hooks(
        self, tokens: Int[Tensor, "prompt pos"], replacements: Mapping[str, Replace]
    ) -> Float[Tensor, "prompt pos d_vocab"]:
        """The logits of a whole forward pass, with activations of hooks replaced."""
        return self.hooked_logits(tokens, replacements, **self._mask_kwargs(tokens))

    def hooked_logits(
        self, tokens: Tensor, replacements: Mapping[str, Replace], **kwargs: Any
    ) -> Tensor:
        """The same, with these arguments for the model instead of a mask."""
        own_names = self.own_hook_names(list(replacements))
        hooks = zip(own_names, map(_as_hook, replacements.values()), strict=True)
        return self.module.run_with_hooks(
            tokens.to(self.device),
            return_type="logits",
            fwd_hooks=list(hooks),
            **kwargs,
        )

    def caching(self) -> AbstractContextManager[Callable[[Tensor], dict[str, Any]]]:
        """See `steps`: gives the model's arguments for the tokens of a step."""
        raise ValueError("its kind of model has no known cache")

    @abstractmethod
    def residual_streams(
        self, tokens: Int[Tensor, "prompt pos"]
    ) -> tuple[
        list[Float[Tensor, "prompt pos d_model"]], Float[Tensor, "prompt pos d_vocab"]
    ]:
        """The residual stream before each block and after the last one; the logits."""

    def why_whole_passes(self, hook_names: Sequence[str]) -> str | None:
        """Why runs edited at these hooks need whole passes; None: `walk` serves.

        A hook that somebody has attached may treat the prompts of a batch differently,
        and a walk puts several runs of the same prompts into one batch.
        """
        inside = [name for name in hook_names if block_end(name) is None]
        if inside:
            return f"{inside[:3]} are not the input or output of a block"
        if hooks := attached_hooks(self.module):
            return f"the model has hooks of its user at {hooks[:5]}"
        return self.walk_obstacle

    @cached_property
    def walk_obstacle(self) -> str | None:
        """Why the model cannot be run block by block; None: it can.

        Found once, by comparing each block on a small batch with a whole pass.
        """
        tokens = self.tokens_of_check()
        try:
            with torch.no_grad():
                walk = self._walk(tokens.repeat(2, 1))
                return walk_differs(walk, *self.residual_streams(tokens))
        # Whatever happens in a model unlike the others, whole passes remain.
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    @cached_property
    def alike(self) -> Alike:
        """What the blocks leave the same if the residual stream is the same."""
        return find_alike(self.walk(self.tokens_of_check()), self.shape.n_layers)

    def tokens_of_check(self) -> Int[Tensor, "prompt pos"]:
        """Two short prompts without padding, to compare ways of running the model."""
        n_pos = min(8, self.shape.n_ctx or 8)
        tokens = torch.arange(2 * n_pos, device=self.device).view(2, n_pos)
        tokens = tokens % (self.shape.d_vocab or 2)
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return tokens if pad is None else tokens.masked_fill(tokens == pad, pad == 0)

    def walk(self, tokens: Int[Tensor, "prompt pos"]) -> Walk:
        """Start to run prompts block by block; no block has run yet.

        Padding on the left is masked. Hooks attached to the model run as usual, on the
        rows of the walk.

        Raises:
            ValueError: If the model has a `walk_obstacle`.
        """
        if self.walk_obstacle is not None:
            raise ValueError(
                f"{type(self.module).__name__} cannot be run block by block, only in "
                f"whole passes: {self.walk_obstacle}."
            )
        return self._walk(tokens.to(self.device))

    def _walk(self, tokens: Int[Tensor, "prompt pos"]) -> Walk:
        raise ValueError("its kind of model has no blocks that can be called")

    def prefix(self, tokens: Int[Tensor, "1 pos"]) -> Prefix:
        """The keys and values of a prompt; ValueError if this kind gives none."""
        raise ValueError("its kind of model gives no keys and values")

    def mask(self, tokens: Int[Tensor, "prompt pos"]) -> Tensor | None:
        """The attention mask of padding on the left; None without padding."""
        tokenizer = self.tokenizer
        prepends = getattr(tokenizer, "add_bos_token", False)
        if hasattr(self.module, "cfg"):
            prepends = getattr(self.module.cfg, "default_prepend_bos", prepends)
        return padding_mask(tokens.to(self.device), tokenizer, bool(prepends))

    def _mask_kwargs(self, tokens: Int[Tensor, "prompt pos"]) -> dict[str, Any]:
        """The attention mask as an argument of a whole pass; none without padding."""
        mask = self.mask(tokens)
        return {} if mask is None else {"attention_mask": mask}

    @property
    @abstractmethod
    def token_embeddings(self) -> Float[Tensor, "d_vocab d_model"]:
        """The embedding of each token."""

    @property
    def token_unembeddings(self) -> Float[Tensor, "d_vocab d_model"]:
        """The direction that each token's logit reads, after the final norm."""
        return self._unembedding()[0].detach()

    @abstractmethod
    def _unembedding(self) -> tuple[Tensor, Tensor | None]:
        """Weight [d_vocab, d_model] and bias of the unembedding."""

    @abstractmethod
    def unembed(self) -> ModelUnembed:
        """tuned-lens' `Unembed` of this model, which shares its unembedding."""

    def unembedding_hash(self) -> str:
        """tuned-lens' hash of the unembedding, which two models may share."""
        return tensor_hash(self.token_unembeddings.float().cpu().numpy())

    def check_tokens(self, tokens: Int[Tensor, "prompt pos"]) -> None:
        """Raise ValueError if prompts have unknown token ids or are too long."""
        d_vocab = self.shape.d_vocab
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or (d_vocab is not None and high >= d_vocab):
            raise ValueError(
                f"Token ids must be in [0, {d_vocab or 'd_vocab'}), the model's "
                f"vocabulary; got ids from {low} to {high}."
            )
        self.shape.check_context_size(tokens.shape[1], self.name)

    @torch.no_grad()
    def check_hook_widths(
        self, hook_names: Sequence[str], d_in: int, **kwargs: Any
    ) -> None:
        """Run the model on one token; ValueError for a width other than `d_in`."""
        vectors = self.vectors(torch.zeros(1, 1).long(), hook_names, **kwargs)
        widths = (x.shape[-1] for x in vectors)
        check_widths(dict(zip(hook_names, widths, strict=True)), d_in)

    def check_no_saes_attached(self) -> None:
        """Raise ValueError if SAEs are attached, since the clean model is measured."""
        attached = getattr(self.module, "acts_to_saes", None)
        if attached:
            raise ValueError(
                "The model must have no SAEs attached; it has SAEs at "
                f"{list(attached)}. Use `model.reset_saes()`."
            )


def one_vector_per_position(
    acts: Float[Tensor, "prompt pos *head d_in"], head_index: int | None
) -> Float[Tensor, "prompt pos d_vector"]:
    """Choose one head of a hook that has heads, or put the heads end to end."""
    if head_index is not None and acts.ndim != 4:
        raise ValueError(
            f"`hook_head_index` must be None at a hook without heads; got {head_index}."
        )
    return acts.flatten(2) if head_index is None else acts[:, :, head_index]


def _as_hook(replace: Replace) -> Callable[..., Tensor]:
    def hook_function(activations: Tensor, hook: Any) -> Tensor:
        after = replace(one_vector_per_position(activations, None))
        after = after.to(activations.device, activations.dtype)
        return after.reshape(activations.shape)  # [prompt, pos, d_in or head, d_head]

    return hook_function
