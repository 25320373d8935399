"""The interface of SAEs that encode the vectors of all layers of a token together."""

from abc import abstractmethod
from typing import Any

from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from sae_lens_multilayer.topk.sparse import TopKActs


class TokenSAE(SAE[Any]):
    """An SAE of tokens, not of vectors: one set of activations for all layers.

    It has no views, as no vector alone has activations.
    """

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
        shape = self.cfg.n_layers, self.cfg.d_in
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
