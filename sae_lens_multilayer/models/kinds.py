"""The kinds of model that SAELens can train on, behind one interface.

Each kind is a subclass of `Model` in this file. A kind without TransformerLens' hook
API (`hook_dict`, `run_with_cache`) overrides `own_hook_names`, `_run`, `logits` and
`logits_with_hooks` too; `_walk` lets runs start in the middle. How a kind is loaded by
name is in `loading.py`.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from sae_lens.load_model import HookedProxyLM
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_multilayer.models.decoder import (
    Decoder,
    DecoderWalk,
    check_decoder_only,
    first_output,
    input_kwargs,
    keep_keys_and_values,
)
from sae_lens_multilayer.models.hooked_walk import HookedTransformerWalk
from sae_lens_multilayer.models.model import Model, ModelShape, Replace
from sae_lens_multilayer.models.prefix import Prefix
from sae_lens_multilayer.models.unembed import ModelUnembed
from sae_lens_multilayer.models.walk import Walk

_FINAL_NORMS = ("norm", "final_layer_norm", "ln_f", "final_layernorm")


class _TransformerLensModel(Model):
    """A TransformerBridge, or another model with TransformerLens' `cfg` and hooks."""

    def __init__(self, module: Any) -> None:
        super().__init__(module, ModelShape.of_config(module.cfg))

    @property
    @override
    def name(self) -> str:
        return self.module.cfg.model_name

    @override
    def residual_streams(self, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
        last = self.shape.n_layers - 1
        names = [f"blocks.{layer}.hook_resid_pre" for layer in range(last + 1)]
        own_names = self.own_hook_names([*names, f"blocks.{last}.hook_resid_post"])
        logits, cache = self._run(tokens, own_names)
        return [cache[name] for name in own_names], logits

    @property
    @override
    def token_embeddings(self) -> Tensor:
        return self.module.W_E.detach()

    @override
    def _unembedding(self) -> tuple[Tensor, Tensor | None]:
        return self.module.unembed.W_U.T, self.module.unembed.b_U

    @override
    def unembed(self) -> ModelUnembed:
        norm = getattr(self.module, "ln_final", None) or nn.Identity()
        soft_cap = getattr(self.module.cfg, "output_logits_soft_cap", None)
        return ModelUnembed(norm, *self._unembedding(), soft_cap)


class _DecoderModel(Model):
    """A Hugging Face decoder, or hooks around one."""

    _hf_model: Any

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder(self._hf_model, self.shape.n_layers)

    @override
    def _walk(self, tokens: Tensor) -> Walk:
        return DecoderWalk(self._decoder, tokens, self.mask(tokens))

    @contextmanager
    @override
    def caching(self) -> Generator[Callable[[Tensor], dict[str, Any]]]:
        with keep_keys_and_values(self._hf_model):
            yield lambda _: {}

    @override
    def prefix(self, tokens: Tensor) -> Prefix:
        return Prefix(self._decoder, tokens.to(self.device), self.mask(tokens))


class _Bridge(_DecoderModel, _TransformerLensModel):
    """A TransformerBridge: hooks around the blocks of a Hugging Face model."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self._hf_model = module.original_model
        check_decoder_only(self._hf_model.config)

    @cached_property
    @override
    def _decoder(self) -> Decoder:
        return Decoder(self._hf_model, self.shape.n_layers, self.module)

    @override
    def _run(self, tokens: Tensor, own_names: list[str], **kwargs: Any) -> Any:
        if kwargs.get("stop_at_layer") != self.shape.n_layers:
            return super()._run(tokens, own_names, **kwargs)
        # The bridge stops before a block only, so it would compute the logits, too.
        handle = self.module.blocks[-1].register_forward_hook(_stop)
        try:
            return super()._run(tokens, own_names, **kwargs)
        finally:
            handle.remove()


def _stop(block: nn.Module, args: Any, output: Any) -> None:
    """End a bridge's forward pass; it catches this exception."""
    from transformer_lens.model_bridge.exceptions import StopAtLayerException

    raise StopAtLayerException(first_output(output))


class _HookedTransformer(_TransformerLensModel):
    @override
    def _walk(self, tokens: Tensor) -> Walk:
        return HookedTransformerWalk(self.module, tokens, **self._mask_kwargs(tokens))

    @override
    def _mask_kwargs(self, tokens: Tensor) -> dict[str, Any]:
        kwargs = super()._mask_kwargs(tokens)
        if not kwargs and getattr(self.tokenizer, "padding_side", None) == "left":
            # Given no mask, the model would mask a BOS that is also the pad token.
            return {"attention_mask": torch.ones_like(tokens, device=self.device)}
        return kwargs

    @contextmanager
    @override
    def caching(self) -> Generator[Callable[[Tensor], dict[str, Any]]]:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        cache = TransformerLensKeyValueCache.init_cache(self.module.cfg, self.device)
        # Given no mask, the model would mask tokens that are also the pad token.
        yield lambda tokens: {
            "past_kv_cache": cache,
            "attention_mask": torch.ones_like(tokens, device=self.device),
        }


class _HuggingFaceModel(_DecoderModel):
    """A Hugging Face causal language model in SAELens' HookedProxyLM."""

    def __init__(self, module: HookedProxyLM) -> None:
        self._hf_model = module.model
        super().__init__(module, ModelShape.of_hf_config(self._hf_model.config))
        check_decoder_only(self._hf_model.config)

    @override
    def _mask_kwargs(self, tokens: Tensor) -> dict[str, Any]:
        # HookedProxyLM passes nothing on: see `_masked`.
        return {}

    @contextmanager
    def _masked(self, tokens: Tensor) -> Generator[None]:
        """Give the model the mask of padding and the positions that follow from it."""
        mask = self.mask(tokens)
        if mask is None:
            yield
            return
        given = input_kwargs(self._hf_model, mask)
        handle = self._hf_model.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | given), with_kwargs=True
        )
        try:
            yield
        finally:
            handle.remove()

    @override
    def _run(self, tokens: Tensor, own_names: list[str], **kwargs: Any) -> Any:
        # Any value makes the pass end after the last of these hooks.
        kwargs["stop_at_layer"] = 0
        with self._masked(tokens):
            return super()._run(tokens, own_names, **kwargs)

    @override
    def logits(self, tokens: Tensor) -> Tensor:
        with self._masked(tokens):
            return super().logits(tokens)

    @override
    def logits_with_hooks(
        self, tokens: Tensor, replacements: Mapping[str, Replace]
    ) -> Tensor:
        with self._masked(tokens):
            return super().logits_with_hooks(tokens, replacements)

    @property
    @override
    def name(self) -> str:
        return self._hf_model.config.name_or_path

    @override
    def residual_streams(self, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
        return self._decoder.residual_streams(lambda: self.logits(tokens))

    @property
    @override
    def token_embeddings(self) -> Tensor:
        weight = self._hf_model.get_input_embeddings().weight.detach()
        return self._of_stream_width(weight)

    def _of_stream_width(self, weight: Tensor) -> Tensor:
        if weight.shape[1] != self.shape.d_model:
            raise ValueError(
                f"The embeddings of tokens must have the width {self.shape.d_model} of "
                f"the residual stream; those of {self.name!r} have {weight.shape[1]} "
                "and are projected. It has no lens and no similarity to tokens."
            )
        return weight

    def _final_norm(self) -> nn.Module:
        decoder = self._hf_model.get_decoder()
        norms = [norm for n in _FINAL_NORMS if (norm := getattr(decoder, n, None))]
        if not norms:
            raise ValueError(
                f"{type(decoder).__name__} must hold its final norm as one of "
                f"{_FINAL_NORMS}. Load the model as a HookedTransformer."
            )
        return norms[0]

    @override
    def _unembedding(self) -> tuple[Tensor, Tensor | None]:
        unembedding = self._hf_model.get_output_embeddings()
        return self._of_stream_width(unembedding.weight), unembedding.bias

    @override
    def unembed(self) -> ModelUnembed:
        config = self._hf_model.config.get_text_config()
        soft_cap = getattr(config, "final_logit_softcapping", None)
        return ModelUnembed(self._final_norm(), *self._unembedding(), soft_cap)


def _hooked_transformers() -> tuple[type, ...]:
    try:
        from transformer_lens import HookedTransformer
    except ImportError:  # TransformerLens 4 removed it.
        return ()
    return (HookedTransformer,)


def as_model(raw: Any) -> Model:
    """Wrap a loaded model of any kind; a `Model` is returned as it is."""
    if isinstance(raw, Model):
        return raw
    if isinstance(raw, HookedProxyLM):
        return _HuggingFaceModel(raw)
    if getattr(getattr(raw, "cfg", None), "n_layers", None) is None:
        raise ValueError(
            "The model must be a HookedTransformer, a TransformerBridge or a Hugging "
            "Face model in sae_lens.load_model.HookedProxyLM(model, tokenizer); got "
            f"{type(raw).__name__}."
        )
    if isinstance(raw, _hooked_transformers()):
        return _HookedTransformer(raw)
    if hasattr(raw, "original_model"):
        return _Bridge(raw)
    return _TransformerLensModel(raw)
