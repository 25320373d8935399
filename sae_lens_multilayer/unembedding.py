"""The end of a model, where its residual stream becomes logits, as a lens needs it."""

import copy
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.load_model import HookedProxyLM
from torch import Tensor, nn
from tuned_lens.nn.unembed import Unembed
from tuned_lens.utils import tensor_hash
from typing_extensions import override

from sae_lens_multilayer import hooks

_FINAL_NORMS = ("norm", "final_layer_norm", "ln_f", "final_layernorm")


class ModelUnembed(Unembed):
    """tuned-lens' `Unembed` for every kind of model the host can load.

    tuned-lens' own takes a HookedTransformer and seven Hugging Face families, and does
    not know of a soft cap on the logits.
    """

    def __init__(self, model: Any) -> None:
        """Copy the model's final norm and share the memory of its unembedding.

        Args:
            model: A HookedTransformer, a TransformerBridge or the host's HookedProxyLM
                around a Hugging Face model.

        Raises:
            ValueError: If the model has no final norm or unembedding where known
                models have them.
        """
        nn.Module.__init__(self)
        if isinstance(model, HookedProxyLM):
            norm = final_norm_of_hf_model(model.model)
            soft_cap = getattr(_hf_config(model), "final_logit_softcapping", None)
        else:
            norm = getattr(model, "ln_final", None) or nn.Identity()
            soft_cap = getattr(model.cfg, "output_logits_soft_cap", None)
        self.final_norm = copy.deepcopy(norm)
        # HookedProxyLM's hooks would write to its hook points.
        self.final_norm._forward_hooks.clear()
        self.unembedding = _linear(*_unembedding_of(model))
        self.soft_cap = soft_cap if soft_cap and soft_cap > 0 else None
        self.requires_grad_(False)

    @override
    def forward(
        self, h: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch d_vocab"]:
        """Turn residual-stream vectors into logits, as the end of the model does."""
        logits = super().forward(h)
        if self.soft_cap is None:
            return logits
        return self.soft_cap * torch.tanh(logits / self.soft_cap)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    d_vocab, d_model = weight.shape
    linear = nn.Linear(d_model, d_vocab, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach())
    return linear


def _hf_config(model: HookedProxyLM) -> Any:
    hf_model: Any = model.model
    return hf_model.config.get_text_config()


def final_norm_of_hf_model(model: Any) -> nn.Module:
    """The norm between the last block and the unembedding.

    Raises:
        ValueError: If it is not where known models have it.
    """
    decoder = model.get_decoder()
    for name in _FINAL_NORMS:
        norm = getattr(decoder, name, None)
        if isinstance(norm, nn.Module):
            return norm
    raise ValueError(
        f"The model's decoder must hold its final norm as one of {_FINAL_NORMS}; "
        f"{type(decoder).__name__} does not. Load it as a HookedTransformer."
    )


def _unembedding_of(model: Any) -> tuple[Tensor, Tensor | None]:
    if not isinstance(model, HookedProxyLM):
        hooks.shape_of_model(model)  # a model of another kind is an error
        return model.unembed.W_U.T, model.unembed.b_U
    hf_model: Any = model.model
    unembedding = hf_model.get_output_embeddings()
    if not isinstance(unembedding, nn.Linear):
        raise ValueError(
            "The model's output embedding must be a linear layer; got "
            f"{type(unembedding).__name__}."
        )
    return unembedding.weight, unembedding.bias


def unembedding_hash(model: Any) -> str:
    """tuned-lens' hash of a model's unembedding, by which a lens knows its model.

    It prints the corners of the matrix to one decimal, so two models may share it.

    Args:
        model: As for `ModelUnembed`.
    """
    weight, _ = _unembedding_of(model)
    return tensor_hash(weight.detach().float().cpu().numpy())


def name_of_model(model: Any) -> str:
    """The name that a lens gives to the model it was made for."""
    if isinstance(model, HookedProxyLM):
        hf_model: Any = model.model
        return hf_model.config.name_or_path
    return model.cfg.model_name
