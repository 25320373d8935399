"""The interface of SAEs that encode the vectors of all layers of a token together."""

from abc import abstractmethod
from typing import Any, TypeVar

from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor
from typing_extensions import override

from sae_lens_multilayer.sae.config import (
    CrosscoderSAEConfig,
    CrosscoderTrainingSAEConfig,
    RoutedSAEConfig,
    RoutedTrainingSAEConfig,
    check_sizes,
)
from sae_lens_multilayer.sae.topk_weights import TopKWeights
from sae_lens_multilayer.topk.sparse import TopKActs

T_TOKEN_CONFIG = TypeVar(
    "T_TOKEN_CONFIG",
    bound=CrosscoderSAEConfig
    | CrosscoderTrainingSAEConfig
    | RoutedSAEConfig
    | RoutedTrainingSAEConfig,
)


class TokenSAE(TopKWeights[T_TOKEN_CONFIG]):
    """An SAE of tokens, not of vectors: one set of activations for all layers.

    It has no views, as no vector alone has activations.
    """

    @property
    def n_layers(self) -> int:
        """Number of layers of a token; ValueError if the configuration has none."""
        check_sizes(self.cfg, ["n_layers"])
        assert self.cfg.n_layers is not None
        return self.cfg.n_layers

    @override
    def process_sae_in(
        self, sae_in: Float[Tensor, "*batch layer d_in"], hook: int | str | None = None
    ) -> Float[Tensor, "*batch d_enc"]:
        """The encoder's input, from the layers' standardised vectors."""
        assert hook is None  # a token has all hooks
        self.check_is_stacked(sae_in)
        x = self.hook_sae_input(self.reshape_fn_in(sae_in.to(self.dtype)))
        u = self.run_time_activation_norm_fn_in(self.into_lens(x))
        return self.joined(u) - self.b_dec

    @abstractmethod
    def joined(
        self, u: Float[Tensor, "*batch layer d_in"]
    ) -> Float[Tensor, "*batch d_enc"]:
        """The vector that is encoded, from the layers' standardised vectors."""

    @override
    def encode(
        self, x: Float[Tensor, "*batch layer d_in"]
    ) -> Float[Tensor, "*batch d_sae"]:
        """Dense activations of all latents; `encode_topk` is the sparse version."""
        return self.encode_with_hidden_pre(x)[0]

    @abstractmethod
    def encode_topk(self, x: Float[Tensor, "*batch layer d_in"]) -> TopKActs:
        """The k largest latents of each token, after ReLU."""

    @abstractmethod
    def decode_layer(self, acts: TopKActs, layer: int) -> Float[Tensor, "*batch d_in"]:
        """Reconstruct the vectors of the layer at this index, in raw space."""

    @abstractmethod
    def acts_at(self, acts: TopKActs, layer: int) -> Float[Tensor, "*batch k"]:
        """The activations at a layer of the latents that are stored in `acts`."""

    def check_is_stacked(self, x: Tensor) -> None:
        """Raise ValueError unless `x` is [..., n_layers, d_in]."""
        shape = self.n_layers, self.cfg.d_in
        if tuple(x.shape[-2:]) != shape:
            raise ValueError(
                f"A {type(self).__name__} encodes a token's vectors of all layers: x "
                f"must be [..., n_layers, d_in] = [..., {shape[0]}, {shape[1]}]; got "
                f"{list(x.shape)}."
            )

    def view(self, layer_or_hook_name: int | str) -> SAE[Any]:
        """Raise ValueError: the vectors of one layer alone have no activations."""
        raise no_view(self)

    def views(self) -> list[SAE[Any]]:
        """Raise ValueError, as `view`."""
        raise no_view(self)


def no_view(sae: SAE[Any]) -> ValueError:
    """The error for a view of an SAE that needs all layers."""
    return ValueError(
        f"A {type(sae).__name__} has no SAE of a single hook, as its activations "
        "depend on the vectors of all layers. Use `encode_topk(x)` with x [token, "
        "layer, d_in] and `decode_layer(acts, layer)`."
    )
