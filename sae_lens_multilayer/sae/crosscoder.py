"""The crosscoder: one latent vector for the vectors of all layers of a token."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from sae_lens_multilayer.sae.config import (
    CrosscoderSAEConfig,
    CrosscoderTrainingSAEConfig,
)
from sae_lens_multilayer.sae.sparse_training import SparseTrainingSAE
from sae_lens_multilayer.sae.token_sae import T_TOKEN_CONFIG, TokenSAE
from sae_lens_multilayer.topk import reference, sparse


class _CrosscoderWeights(TokenSAE[T_TOKEN_CONFIG]):
    """Base of the inference and the training class."""

    @property
    @override
    def d_enc(self) -> int:
        return self.n_layers * self.cfg.d_in

    @property
    def encoders(self) -> Float[Tensor, "layer d_in d_sae"]:
        """The encoder of each layer; a view of `W_enc`."""
        return self.W_enc.unflatten(0, (self.n_layers, self.cfg.d_in))

    @property
    def decoders(self) -> Float[Tensor, "layer d_sae d_in"]:
        """The decoder of each layer; a view of `W_dec`.

        Rows have any norm; the squares of a latent's norms sum to 1 over layers.
        """
        shape = self.n_layers, self.cfg.d_in
        return self.W_dec.unflatten(1, shape).transpose(0, 1)

    @override
    def joined(
        self, u: Float[Tensor, "*batch layer d_in"]
    ) -> Float[Tensor, "*batch d_enc"]:
        return u.flatten(-2)

    @override
    def decode(
        self, feature_acts: Float[Tensor, "*batch d_sae"]
    ) -> Float[Tensor, "*batch layer d_in"]:
        """Reconstruct the vectors of all layers that were last encoded, in raw space.

        As in SAELens, this uses and deletes the mean and standard deviation stored by
        the last `encode`.
        """
        recons = self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)
        by_layer = recons.unflatten(-1, (self.n_layers, self.cfg.d_in))
        return self.out_of_lens(self.run_time_activation_norm_fn_out(by_layer))

    @override
    @torch.no_grad()
    def encode_topk(self, x: Float[Tensor, "*batch layer d_in"]) -> sparse.TopKActs:
        """The k largest latents of each token, after ReLU."""
        self.check_is_stacked(x)
        acts = sparse.encode_topk(
            self.into_lens(x.to(self.dtype)),
            self.W_enc,
            self.b_dec,
            self.cfg.k,
            standardize_inputs=self.standardizes,
        )
        shape = *x.shape[:-2], self.cfg.k
        values, indices = acts.values.view(shape), acts.indices.view(shape)
        return replace(acts, values=values, indices=indices)

    @torch.no_grad()
    def decode_topk(self, acts: sparse.TopKActs) -> Float[Tensor, "*batch layer d_in"]:
        """Reconstruct the vectors of all layers, in raw space."""
        z_hat = sparse.decode_topk(acts, self.W_dec, self.b_dec)
        return self.out_of_lens(z_hat)

    @override
    @torch.no_grad()
    def decode_layer(
        self, acts: sparse.TopKActs, layer: int
    ) -> Float[Tensor, "*batch d_in"]:
        """Reconstruct the vectors of the layer at this index, in raw space."""
        of_layer = replace(
            acts, mean=acts.mean[..., layer, :], std=acts.std[..., layer, :]
        )
        b_dec = self.b_dec.view(self.n_layers, self.cfg.d_in)[layer]
        z_hat = sparse.decode_topk(of_layer, self.decoders[layer], b_dec)
        return self.out_of_lens(z_hat, layer)

    @override
    @torch.no_grad()
    def acts_at(self, acts: sparse.TopKActs, layer: int) -> Float[Tensor, "*batch k"]:
        """The activation times the norm of the latent's decoder at the layer.

        This is the length of what the latent adds to the layer's standardised vector,
        as the activation of a multi-layer SAE is, whose decoder rows have unit norm.
        """
        return acts.values * self.decoders[layer].norm(dim=-1)[acts.indices]


class CrosscoderSAE(_CrosscoderWeights[CrosscoderSAEConfig]):
    """A TopK SAE with one latent vector per token, for all layers.

    `u_l = (z_l - mean_l) / (std_l + 1e-5); a = ReLU(TopK(sum_l (u_l - b_l) W_enc_l));
    z_hat_l = (a W_dec_l + b_l) * std_l + mean_l`, with an encoder and a decoder for
    each layer. It is called feature-stacked, the multi-layer SAE data-stacked. The
    weights are stacked: `W_enc [n_layers * d_in, d_sae]`, `W_dec` and `b_dec` likewise.
    The row of a latent in `W_dec` has unit norm, its parts at the layers any norm.

    An activation is the token's; `acts_at` is that of a layer.

    References:
        Lindsey et al. (2024), "Sparse Crosscoders for Cross-Layer Features and Model
        Diffing". Theirs has a penalty on activations times decoder norms instead of
        TopK.
    """


class CrosscoderTrainingSAE(
    _CrosscoderWeights[CrosscoderTrainingSAEConfig],
    SparseTrainingSAE[CrosscoderTrainingSAEConfig],
):
    """The crosscoder in training; see `SparseTrainingSAE`."""

    dense_loss = staticmethod(reference.crosscoder_loss)
