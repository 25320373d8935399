"""The routed SAE: a router chooses one layer of each token for one shared SAE."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_multilayer.ranks import ALONE, Ranks
from sae_lens_multilayer.sae.config import (
    RoutedSAEConfig,
    RoutedTrainingSAEConfig,
)
from sae_lens_multilayer.sae.sparse_training import SparseTrainingSAE
from sae_lens_multilayer.sae.token_sae import T_TOKEN_CONFIG, TokenSAE
from sae_lens_multilayer.topk import reference, sparse
from sae_lens_multilayer.topk.reference import Route, route, standardize
from sae_lens_multilayer.topk.step import TopKStep, training_step

_TOKENS_AT_A_TIME = 4096


@dataclass
class RoutedActs(sparse.TopKActs):
    """The k activations of each token, with the layer that was chosen."""

    layer: Int[Tensor, "*batch"]
    """Index of the layer whose vector was encoded."""
    weight: Float[Tensor, "*batch"]
    """Its routing weight."""


class _RoutedWeights(TokenSAE[T_TOKEN_CONFIG]):
    """Base of the inference and the training class."""

    W_router: nn.Parameter
    """[d_in, n_layers]"""
    _route: Route | None = None
    """Of the last `encode`, for `decode`, as SAELens' mean and standard deviation."""

    def __getstate__(self) -> dict[str, Any]:
        # For copies and pickles; tensors of a graph cannot be copied.
        return {**self.__dict__, "_route": None}

    @override
    def initialize_weights(self) -> None:
        n_layers = self.n_layers
        super().initialize_weights()
        rows = self.W_dec.new_empty(n_layers, self.cfg.d_in)
        nn.init.kaiming_uniform_(rows, a=5**0.5)  # as torch.nn.Linear
        self.W_router = nn.Parameter(rows.T.contiguous())

    @override
    def encoded_at_once(
        self, u: Float[Tensor, "token layer d_in"]
    ) -> Float[Tensor, "token d_in"]:
        return route(u, self.W_router).vectors

    @override
    def joined(
        self, u: Float[Tensor, "*batch layer d_in"]
    ) -> Float[Tensor, "*batch d_in"]:
        """The weighted vector of the chosen layer, which is stored for `decode`."""
        self._route = route(u, self.W_router)
        return self._route.vectors

    @override
    def decode(
        self, feature_acts: Float[Tensor, "*batch d_sae"]
    ) -> Float[Tensor, "*batch layer d_in"]:
        """The vectors of all layers that were last encoded, in raw space.

        That of the chosen layer is reconstructed; the others are those of no active
        latent, `b_dec * std + mean`.
        """
        if self._route is None:
            raise RuntimeError("Call `encode` before each `decode`.")
        chosen, self._route = self._route, None
        recons = self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)
        routed = (recons / chosen.weight.unsqueeze(-1)).unsqueeze(-2)
        layers = torch.arange(self.n_layers, device=recons.device)
        is_chosen = (chosen.layer.unsqueeze(-1) == layers).unsqueeze(-1)
        by_layer = torch.where(is_chosen, routed, self.b_dec)
        return self.out_of_lens(self.run_time_activation_norm_fn_out(by_layer))

    @override
    @torch.no_grad()
    def encode_topk(self, x: Float[Tensor, "*batch layer d_in"]) -> RoutedActs:
        """The k largest latents of each token's chosen vector, after ReLU."""
        self.check_is_stacked(x)
        u = z = self.into_lens(x.to(self.dtype))
        mean, std = torch.zeros_like(z[..., :1]), torch.ones_like(z[..., :1])
        if self.standardizes:
            u, mean, std = standardize(z)
        chosen = route(u, self.W_router)
        acts = sparse.encode_topk(
            chosen.vectors, self.W_enc, self.b_dec, self.cfg.k, standardize_inputs=False
        )
        return RoutedActs(
            acts.values, acts.indices, mean, std, chosen.layer, chosen.weight
        )

    @torch.no_grad()
    def decode_topk(self, acts: RoutedActs) -> Float[Tensor, "*batch layer d_in"]:
        """The vectors of all layers in raw space, as `decode`."""
        layers = range(self.n_layers)
        return torch.stack([self.decode_layer(acts, i) for i in layers], dim=-2)

    @override
    @torch.no_grad()
    def decode_layer(
        self, acts: sparse.TopKActs, layer: int
    ) -> Float[Tensor, "*batch d_in"]:
        """The vectors of the layer at this index, in raw space, as `decode`."""
        assert isinstance(acts, RoutedActs)
        weight = torch.where(acts.layer == layer, acts.weight, 1).unsqueeze(-1)
        at_layer = sparse.TopKActs(
            self.acts_at(acts, layer),
            acts.indices,
            acts.mean[..., layer, :],
            acts.std[..., layer, :] / weight,
        )
        return self.out_of_lens(
            sparse.decode_topk(at_layer, self.W_dec, self.b_dec), layer
        )

    @override
    @torch.no_grad()
    def acts_at(self, acts: sparse.TopKActs, layer: int) -> Float[Tensor, "*batch k"]:
        """The activations if the layer was chosen, else zeros."""
        assert isinstance(acts, RoutedActs)
        return acts.values * (acts.layer == layer).unsqueeze(-1)


class RoutedSAE(_RoutedWeights[RoutedSAEConfig]):
    """A TopK SAE of one vector per token, whose layer a router chooses.

    `p = softmax(mean_l(u_l) W_router); l = argmax p; v = p_l u_l;
    a = ReLU(TopK((v - b_dec) W_enc)); v_hat = a W_dec + b_dec;
    z_hat_l = (v_hat / p_l) std_l + mean_l`, with u_l layer l's standardised vector.

    Only the vector of the chosen layer is reconstructed, and the loss is of v. At other
    layers no latent is active and the reconstruction is `b_dec * std + mean`: metrics
    by layer, such as FVU, and splices are of that. So FVU at a layer is near or above 1
    if few tokens are routed to it; it is no measure of the SAE at the chosen layer,
    which the training loss is.

    References:
        RouteSAE: Shi et al. (2025), arXiv:2503.08200, with hard routing over all layers
        given (theirs: the middle half) and the mean of standardised vectors as input of
        the router. The loss is over the batch's variance, theirs over each vector's
        norm.
    """


class RoutedTrainingSAE(
    _RoutedWeights[RoutedTrainingSAEConfig],
    SparseTrainingSAE[RoutedTrainingSAEConfig],
):
    """The routed SAE in training; see `SparseTrainingSAE`.

    The sums of a step are of the chosen vectors `v`, as of one layer.
    """

    dense_loss = staticmethod(reference.routed_loss)

    @override
    def loss_weights(self) -> tuple[Tensor, ...]:
        return *super().loss_weights(), self.W_router

    @override
    @torch.no_grad()
    def accumulate_gradients(
        self,
        x: Float[Tensor, "token layer d_in"],
        dead_latents: Bool[Tensor, " d_sae"] | None,
        micro_batch_size: int,
        ranks: Ranks = ALONE,
    ) -> TopKStep:
        """As `SparseTrainingSAE`; the router's gradient is that of its weight p."""
        routes = [self._routed(part) for part in x.split(_TOKENS_AT_A_TIME)]
        v = torch.cat([chosen.vectors for chosen in routes]).unsqueeze(1)
        v_gradient = torch.empty_like(v)
        options: dict[str, Any] = self.loss_options() | {"standardize_inputs": False}
        step = training_step(
            v,
            self.W_enc,
            self.W_dec,
            self.b_dec,
            **options,
            dead_latents=dead_latents,
            micro_batch_size=micro_batch_size,
            certified=self.cfg.certified_topk,
            ranks=ranks,
            z_gradient=v_gradient,
        )
        gradient = torch.zeros_like(self.W_router)
        parts = v_gradient.squeeze(1).split(_TOKENS_AT_A_TIME)
        for chosen, part in zip(routes, parts, strict=True):
            gradient += chosen.router_gradient(part)
        ranks.sum_(gradient)
        if self.W_router.grad is None:
            self.W_router.grad = torch.zeros_like(self.W_router)
        self.W_router.grad += gradient
        return step

    def _routed(self, x: Float[Tensor, "token layer d_in"]) -> Route:
        z = self.into_lens(x.to(self.dtype))
        return route(standardize(z)[0] if self.standardizes else z, self.W_router)
