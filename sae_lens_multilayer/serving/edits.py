"""Replacements of activations: reconstructions, and changes of one latent."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from sae_lens_multilayer.evaluation.encoder import LayerEncoder, is_multi_layer
from sae_lens_multilayer.models.model import Replace

Kind = Literal["add", "set", "reconstruct"]


@dataclass(frozen=True)
class Edit:
    """A change of the vectors of some layers, at all positions but the first.

    Activations are in the SAE's units: of standardised vectors if it standardises its
    input, so that the same value has the same relative effect at every layer. The first
    position, the attention sink of most models, keeps its own vectors.
    """

    kind: Kind
    """"add" to the latent's activation, "set" it, or "reconstruct" by the SAE."""
    layers: Sequence[int]
    """Indices into the layer axis."""
    latent: int = 0
    """For "add" and "set"."""
    value: float = 0.0
    """Of the activation; "set" to 0 ablates the latent where it is active."""

    def replacements(self, encoder: LayerEncoder) -> dict[str, Replace]:
        """The replacement at each hook of the edited layers."""
        names = encoder.hook_names
        return {names[layer]: self._replace(encoder, layer) for layer in self.layers}

    def _replace(self, encoder: LayerEncoder, layer: int) -> Replace:
        @torch.no_grad()
        def replace(
            x: Float[Tensor, "prompt pos d_in"],
        ) -> Float[Tensor, "prompt pos d_in"]:
            flat = x[:, 1:].flatten(0, 1).to(encoder.saes[layer].device)
            if not len(flat):
                return x
            if self.kind == "reconstruct":
                after = encoder.reconstruct(layer, flat)[1]
            else:
                after = self._change_latent(encoder.saes[layer], layer, flat)
            return torch.cat([x[:, :1], after.view_as(x[:, 1:]).to(x)], dim=1)

        return replace

    def _change_latent(
        self, sae: SAE[Any], layer: int, x: Float[Tensor, "row d_in"]
    ) -> Float[Tensor, "row d_in"]:
        """Vectors that differ by the latent's own part of the reconstruction."""
        if not is_multi_layer(sae):
            return x + self._decoded(sae, x, edited=True) - self._decoded(sae, x)
        acts = sae.encode_topk(x, layer)
        change = x.new_tensor(self.value)
        if self.kind == "set":
            is_latent = acts.indices == self.latent
            change = change - (acts.values * is_latent).sum(-1, keepdim=True)
        z = sae.into_lens(x, layer) + change * acts.std * sae.W_dec[self.latent]
        return sae.out_of_lens(z, layer)

    def _decoded(
        self, sae: SAE[Any], x: Float[Tensor, "row d_in"], edited: bool = False
    ) -> Float[Tensor, "row d_in"]:
        """The reconstruction of a stock SAE; decoding uses statistics of encoding."""
        acts = sae.encode(x)
        if edited:
            before = acts[:, self.latent] if self.kind == "add" else 0
            acts[:, self.latent] = before + self.value
        return sae.decode(acts)
