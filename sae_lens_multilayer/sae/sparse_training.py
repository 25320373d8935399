"""What the SAEs that our trainer trains with the sparse step have in common."""

from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Bool, Float
from sae_lens import TrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor
from typing_extensions import override

from sae_lens_multilayer.ranks import ALONE, Ranks
from sae_lens_multilayer.sae.config import MultiLayerTrainingSAEConfig
from sae_lens_multilayer.sae.topk_weights import TopKWeights
from sae_lens_multilayer.topk.reference import TopKLosses
from sae_lens_multilayer.topk.step import TopKStep, training_step

_T_CONFIG = TypeVar("_T_CONFIG", bound=MultiLayerTrainingSAEConfig)


class SparseTrainingSAE(TopKWeights[_T_CONFIG], TrainingSAE[_T_CONFIG]):
    """An SAE in training with TopK, AuxK and decoder rows of unit norm.

    Our trainer calls `accumulate_gradients`, which uses the k active latents only;
    SAELens' own call `training_forward_pass`, the dense version of the same loss.
    """

    dense_loss: ClassVar[Any]
    """The dense definition, with the arguments of `reference.training_loss`."""

    @override
    def get_coefficients(self) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def accumulate_gradients(
        self,
        x: Float[Tensor, "token layer d_in"],
        dead_latents: Bool[Tensor, " d_sae"] | None,
        micro_batch_size: int,
        ranks: Ranks = ALONE,
    ) -> TopKStep:
        """Add the gradients of the loss of a training batch to `.grad`.

        Args:
            x: Vectors in raw space; losses and sums are in the space of the lens.
            dead_latents: Latents that the auxiliary loss trains.
            micro_batch_size: Vectors, or tokens if all layers of a token are encoded
                together, that are encoded at a time.
            ranks: Each holds an equal share of the tokens of the batch.

        References:
            Auxiliary loss: Gao et al. (2024), arXiv:2406.04093, appendix A.2.
        """
        return training_step(
            x,
            *self.loss_weights(),
            **self.loss_options(),
            dead_latents=dead_latents,
            micro_batch_size=micro_batch_size,
            certified=self.cfg.certified_topk,
            transform=None if self.lens is None else self.lens.transform,
            ranks=ranks,
        )

    def loss_weights(self) -> tuple[Tensor, ...]:
        """The arguments of `dense_loss` after the vectors."""
        return self.W_enc, self.W_dec, self.b_dec

    def loss_options(self) -> dict[str, Any]:
        """The settings of the loss."""
        return {
            "k": self.cfg.k,
            "k_aux": self.cfg.k_aux,
            "aux_coefficient": self.cfg.aux_loss_coefficient,
            "standardize_inputs": self.standardizes,
        }

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """The loss by its dense definition, differentiable by autograd.

        `step_input.sae_in` is [token, layer, d_in] in raw space. If each vector is
        encoded alone, it may be [token, d_in].
        """
        x = step_input.sae_in.to(self.dtype)
        feature_acts, hidden_pre = self.encode_with_hidden_pre(x)
        z = self.into_lens(x)
        losses: TopKLosses = type(self).dense_loss(
            z if z.ndim == 3 else z.unsqueeze(1),
            *self.loss_weights(),
            **self.loss_options(),
            dead_latents=step_input.dead_neuron_mask,
        )
        return TrainStepOutput(
            sae_in=x,
            sae_out=self.decode(feature_acts),
            feature_acts=feature_acts,
            hidden_pre=hidden_pre,
            loss=losses.loss,
            losses={
                "mse_loss": losses.mse_loss,
                "auxiliary_reconstruction_loss": losses.aux_loss,
            },
        )

    @override
    def log_histograms(self) -> dict[str, Any]:
        """None: SAELens' histogram shows the norms of the decoder, which are all 1."""
        return {}

    @override
    def calculate_aux_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError("It is part of `training_forward_pass`.")
