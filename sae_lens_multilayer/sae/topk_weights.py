"""What our TopK SAEs have in common: weights, dense activations, files."""

from typing import Any, TypeVar

import torch
from jaxtyping import Float
from sae_lens import SAE
from sae_lens.saes.topk_sae import TopK
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_multilayer.lens.carrier import LensCarrier
from sae_lens_multilayer.sae.config import (
    MultiLayerSAEConfig,
    MultiLayerTrainingSAEConfig,
)
from sae_lens_multilayer.sae.layer_norm import CopyableLayerNorm

_UNIT_NORM_TOLERANCE = 1e-2  # the paper's decoders differ less: one optimiser step

T_CONFIG = TypeVar("T_CONFIG", bound=MultiLayerSAEConfig | MultiLayerTrainingSAEConfig)


class TopKWeights(LensCarrier, CopyableLayerNorm, SAE[T_CONFIG]):
    """A TopK SAE whose decoder rows have unit norm."""

    @property
    def d_enc(self) -> int:
        """Width of what is encoded at once: a vector, or those of all layers."""
        return self.cfg.d_in

    def encoded_at_once(
        self, u: Float[Tensor, "token layer d_in"]
    ) -> Float[Tensor, "act d_enc"]:
        """What is encoded of standardised vectors, apart from the bias."""
        return u.reshape(-1, self.d_enc)

    @override
    def initialize_weights(self) -> None:
        """Draw decoder rows of unit norm; the encoder starts as their transpose.

        In `W_enc`, the weights of one latent are contiguous for the sparse step.
        """
        like: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        self.b_dec = nn.Parameter(torch.zeros(self.d_enc, **like))
        W_dec = torch.empty(self.cfg.d_sae, self.d_enc, **like)
        nn.init.kaiming_uniform_(W_dec)  # as SAELens
        W_dec.div_(W_dec.norm(dim=-1, keepdim=True))
        self.W_dec = nn.Parameter(W_dec)
        self.W_enc = nn.Parameter(W_dec.clone().T)

    @override
    def get_activation_fn(self) -> TopK:
        return TopK(self.cfg.k)

    def encode_with_hidden_pre(
        self, x: Tensor, hook: int | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode densely, with the pre-activations; see `encode`."""
        hidden_pre = self.hook_sae_acts_pre(self.process_sae_in(x, hook) @ self.W_enc)
        return self.hook_sae_acts_post(self.activation_fn(hidden_pre)), hidden_pre

    @override
    def fold_W_dec_norm(self) -> None:
        """Do nothing, as the decoder rows have unit norm; ValueError if they do not."""
        check_unit_norm(self.W_dec)

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        # safetensors saves contiguous tensors only.
        state_dict.update({name: t.contiguous() for name, t in state_dict.items()})

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].T.contiguous().T


def check_unit_norm(W_dec: Float[Tensor, "d_sae d_in"]) -> None:
    """Raise ValueError if the norm of a decoder row is off 1 by more than 0.01."""
    off = (W_dec.norm(dim=-1) - 1).abs().max().item()
    if not off <= _UNIT_NORM_TOLERANCE:
        raise ValueError(
            "`fold_W_dec_norm` needs decoder rows of unit norm, as folding others "
            f"would change which latents are the largest; one is off by {off:.3g}."
        )
