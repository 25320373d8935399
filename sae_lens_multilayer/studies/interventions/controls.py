"""What each edit is compared with: other vectors of the same length."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lens_multilayer.evaluation.edits import latent_vector
from sae_lens_multilayer.evaluation.encoder import LayerEncoder
from sae_lens_multilayer.studies.interventions.runners import Additions
from sae_lens_multilayer.topk.sparse import TopKActs

CONTROLS = {
    "other_latent": "another active latent, changed by the same length",
    "random": "a random direction of the same length",
    "silent_token": "the latent added at a token where it is not active",
    "error": "the reconstruction error removed",
}


@dataclass
class Clean:
    """The clean run of one prompt."""

    x: Float[Tensor, "pos layer d_in"]
    acts: TopKActs
    """Of `x`."""
    counted: Bool[Tensor, " pos"]

    def upto(self, end: int) -> "Clean":
        """The positions before `end`."""
        return Clean(self.x[:end], self.acts[:end], self.counted[:end])


def make_controls(
    encoder: LayerEncoder,
    edits: Additions,
    latent: Int[Tensor, " edit"],
    clean: Clean,
    sign: float,
    generator: torch.Generator,
) -> list[tuple[Additions, Bool[Tensor, " edit"]]]:
    """The additions of each of `CONTROLS`, and for which edits there is one.

    Args:
        latent: The latent of each edit.
        sign: 1 if edits add to activations, -1 if they take away.
    """
    position, layer, acts = edits.position, edits.layer, clean.acts
    norm = edits.dx.norm(dim=1, keepdim=True).to(clean.x)
    of_latent = latent.view(-1, 1).to(clean.x.device)
    values, indices = acts.values[position, layer], acts.indices[position, layer]
    is_other = (values > 0) & (indices != of_latent)
    other = indices.gather(1, _draw(is_other, generator))[:, 0].cpu()
    noise = torch.randn(edits.dx.shape, generator=generator).to(clean.x)
    # [pos, edit, k], at the layer of each edit
    is_active = (acts.indices[:, layer] == of_latent) & (acts.values[:, layer] > 0)
    silent = ~is_active.any(-1).T & clean.counted.to(clean.x.device)
    elsewhere = _draw(silent, generator)[:, 0].cpu()
    error = encoder.saes[0].decode_topk(acts) - clean.x
    all_exist = torch.ones(len(layer), dtype=torch.bool)
    of_other = sign * norm * _unit(latent_vectors(encoder, layer, other))
    of_silent = norm * _unit(latent_vectors(encoder, layer, latent))
    found = {
        "other_latent": (position, of_other, is_other.any(1)),
        "random": (position, norm * _unit(noise), all_exist),
        "silent_token": (elsewhere, of_silent, silent.any(1)),
        "error": (position, error[position, layer], all_exist),
    }
    return [
        (Additions(layer, at, dx.to(edits.dx)), exists.cpu())
        for at, dx, exists in (found[name] for name in CONTROLS)
    ]


def latent_vectors(
    encoder: LayerEncoder, layer: Int[Tensor, " edit"], latent: Int[Tensor, " edit"]
) -> Float[Tensor, "edit d_in"]:
    """`T_l^-1 W_dec[j]` of each edit."""
    sae = encoder.saes[0]
    rows = sae.W_dec.new_empty(len(layer), sae.cfg.d_in)
    for one in layer.unique().tolist():
        rows[layer == one] = latent_vector(encoder, one, latent[layer == one])
    return rows


def _draw(
    allowed: Bool[Tensor, "row choice"], generator: torch.Generator
) -> Int[Tensor, "row 1"]:
    """A random one of the allowed choices of each row; any if there is none."""
    keys = torch.rand(allowed.shape, generator=generator).to(allowed.device)
    return (keys * allowed).argmax(1, keepdim=True)


def _unit(x: Float[Tensor, "row d_in"]) -> Float[Tensor, "row d_in"]:
    return torch.nn.functional.normalize(x, dim=1)
