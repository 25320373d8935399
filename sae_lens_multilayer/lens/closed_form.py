"""Lenses in closed form: maps of each layer's vectors to those of the last layer."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_multilayer.lens.config import LensConfig
from sae_lens_multilayer.lens.lens import LayerLens

Fit = Callable[
    [Float[Tensor, "token d_in"], Float[Tensor, "token d_in"]],
    Float[Tensor, "d_in d_in"],
]
"""The matrix A for which `x A` is nearest to y, both without their means."""


def procrustes(
    x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_in"]
) -> Float[Tensor, "d_in d_in"]:
    """A rotation or reflection times a scale: minimises `|x A - y|^2` over these."""
    u, s, v = torch.linalg.svd(x.T @ y)
    return (u @ v) * (s.sum() / x.square().sum())


def least_squares(
    x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_in"]
) -> Float[Tensor, "d_in d_in"]:
    """Any matrix: minimises `|x A - y|^2`."""
    return torch.linalg.lstsq(x, y).solution


def fit_to_last(
    x: Float[Tensor, "token layer d_in"], hook_names: Sequence[str], fit: Fit
) -> LayerLens:
    """Fit a lens that maps each layer's vectors to the same tokens' at the last one.

    Args:
        x: Vectors of all blocks' outputs.
        hook_names: Their hooks.
        fit: `procrustes` or `least_squares`.
    """
    x = x.double()
    mean = x.mean(0)
    centred = x - mean
    maps = [fit(centred[:, layer], centred[:, -1]) for layer in range(x.shape[1] - 1)]
    biases = [mean[-1] - mean[layer] @ a for layer, a in enumerate(maps)]
    return lens_of_maps(maps, biases, hook_names)


def lens_of_maps(
    maps: Sequence[Float[Tensor, "d_in d_in"]],
    biases: Sequence[Float[Tensor, " d_in"]],
    hook_names: Sequence[str],
) -> LayerLens:
    """The lens `z = x A + b` of all layers but the last, which has the identity."""
    config = LensConfig(list(hook_names), len(hook_names), len(maps[0]))
    tensors: dict[str, Tensor] = {}
    for layer, (a, b) in enumerate(zip(maps, biases, strict=True)):
        tensors[f"{layer}.weight"] = (a.T - torch.eye(len(a))).float().contiguous()
        tensors[f"{layer}.bias"] = b.float()
    return LayerLens.from_tensors(config, tensors)
