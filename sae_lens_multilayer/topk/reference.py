"""Definitions of the TopK autoencoders of many layers: dense, with autograd, slow.

`sparse.py` and `step.py` compute the same numbers fast; tests compare every value and
gradient with this file.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

STANDARDIZE_EPS = 1e-5
"""Added to the standard deviation of a vector before dividing by it."""


@dataclass
class TopKLosses:
    """Losses of one training batch: scalars, dimensionless."""

    loss: Float[Tensor, ""]
    """`mse_loss + aux_coefficient * aux_loss`."""
    mse_loss: Float[Tensor, ""]
    """Mean over layers of the mean squared error over the layer's variance."""
    aux_loss: Float[Tensor, ""]
    """AuxK loss, not multiplied by its coefficient; 0 if no latent is dead."""


def standardize(
    z: Float[Tensor, "*batch d_in"],
) -> tuple[
    Float[Tensor, "*batch d_in"], Float[Tensor, "*batch 1"], Float[Tensor, "*batch 1"]
]:
    """Centre each vector on its mean and divide it by its standard deviation.

    `u = (z - mean) / (std + 1e-5)`, mean and std over `d_in`, std with `d_in - 1`.

    Returns:
        `u`, the mean and the standard deviation (without the 1e-5).

    Example:
        >>> u, mean, std = standardize(torch.tensor([1.0, 2.0, 3.0]))
        >>> mean, std
        (tensor([2.]), tensor([1.]))
    """
    mean = z.mean(dim=-1, keepdim=True)
    std = z.std(dim=-1, keepdim=True)
    return (z - mean) / (std + STANDARDIZE_EPS), mean, std


def topk_acts(
    h: Float[Tensor, "*batch d_sae"], k: int
) -> Float[Tensor, "*batch d_sae"]:
    """Keep the k largest pre-activations of each vector, through a ReLU; zero the rest.

    Example:
        >>> topk_acts(torch.tensor([3.0, -1.0, 2.0, 1.0]), k=2)
        tensor([3., 0., 2., 0.])
        >>> topk_acts(torch.tensor([-3.0, -1.0, 2.0, -4.0]), k=2)
        tensor([0., 0., 2., 0.])
    """
    values, indices = h.topk(k, dim=-1)
    return torch.zeros_like(h).scatter(-1, indices, values.relu())


def training_loss(
    z: Float[Tensor, "token layer d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    *,
    k: int,
    dead_latents: Bool[Tensor, " d_sae"] | None,
    k_aux: int,
    aux_coefficient: float,
    standardize_inputs: bool = True,
) -> TopKLosses:
    """Training loss of a batch, differentiable in the three parameters.

        u = (z - mean) / (std + eps)       h = (u - b_dec) W_enc
        z_hat = (ReLU(TopK(h)) W_dec + b_dec) std + mean
        mse_loss = (1/L) sum_l mean((z_hat_l - z_l)^2) / Var(z_l)
        aux_loss = (1/L) sum_l mean((e_hat_l - e_l)^2) / Var(e_l)

    `e = z - z_hat` is a constant; `e_hat` is its reconstruction from the
    `min(k_aux, n_dead)` largest pre-activations of dead latents, through a ReLU,
    decoded without bias and multiplied by std. `Var` is the unbiased variance of all
    entries of a layer about one scalar mean; means are over tokens and dimensions. Both
    losses are in the space of `z`.

    Args:
        dead_latents: True for dead latents; None if there are none.
        standardize_inputs: False uses u = z, mean 0 and std 1.

    References:
        Lawson et al. (2024), arXiv:2409.04185, section 3; AuxK is Gao et al. (2024),
        arXiv:2406.04093, appendix A.2. Unlike here, the paper's code adds the bias to
        `e_hat` and does not multiply it by std, so it is in another space than `e`.
    """
    u, mean, std = _standardized(z, standardize_inputs)
    h = (u - b_dec) @ W_enc
    z_hat = (topk_acts(h, k) @ W_dec + b_dec) * std + mean
    mse_loss = _normalized_mse(z_hat, z)
    aux_loss = torch.zeros_like(mse_loss)
    if dead_latents is not None and dead_latents.any() and k_aux > 0:
        acts = _dead_acts(h, dead_latents, k_aux)
        e_hat = (acts @ W_dec[dead_latents]) * std
        aux_loss = _normalized_mse(e_hat, (z - z_hat).detach())
    return TopKLosses(mse_loss + aux_coefficient * aux_loss, mse_loss, aux_loss)


def crosscoder_loss(
    z: Float[Tensor, "token layer d_in"],
    W_enc: Float[Tensor, "layer_d_in d_sae"],
    W_dec: Float[Tensor, "d_sae layer_d_in"],
    b_dec: Float[Tensor, " layer_d_in"],
    *,
    k: int,
    dead_latents: Bool[Tensor, " d_sae"] | None,
    k_aux: int,
    aux_coefficient: float,
    standardize_inputs: bool = True,
) -> TopKLosses:
    """Training loss of a crosscoder: one latent vector per token for all layers.

        h = sum_l (u_l - b_l) W_enc_l      a = ReLU(TopK(h))
        z_hat_l = (a W_dec_l + b_l) std_l + mean_l

    The losses, `u` and the arguments are those of `training_loss`, the same at one
    layer. Weights are stacked: layer l has the entries from `l * d_in` on.

    References:
        Lindsey et al. (2024), "Sparse Crosscoders for Cross-Layer Features and Model
        Diffing", with TopK instead of its penalty on decoder norms.
    """
    layers = (z.shape[1], z.shape[2])
    W_enc, W_dec = W_enc.unflatten(0, layers), W_dec.unflatten(1, layers)
    b_dec = b_dec.unflatten(0, layers)
    u, mean, std = _standardized(z, standardize_inputs)
    h = torch.einsum("tld,lds->ts", u - b_dec, W_enc)
    z_hat = (torch.einsum("ts,sld->tld", topk_acts(h, k), W_dec) + b_dec) * std + mean
    mse_loss = _normalized_mse(z_hat, z)
    aux_loss = torch.zeros_like(mse_loss)
    if dead_latents is not None and dead_latents.any() and k_aux > 0:
        acts = _dead_acts(h, dead_latents, k_aux)
        e_hat = torch.einsum("ts,sld->tld", acts, W_dec[dead_latents]) * std
        aux_loss = _normalized_mse(e_hat, (z - z_hat).detach())
    return TopKLosses(mse_loss + aux_coefficient * aux_loss, mse_loss, aux_loss)


@dataclass
class Route:
    """The layer that a router chooses for each token."""

    vectors: Float[Tensor, "*batch d_in"]
    """The vector of the chosen layer, times its weight."""
    layer: Int[Tensor, "*batch"]
    """Index of the chosen layer."""
    weight: Float[Tensor, "*batch"]
    """Its probability."""
    pooled: Float[Tensor, "*batch d_in"]
    """Input of the router."""
    probabilities: Float[Tensor, "*batch layer"]

    def router_gradient(
        self, vector_gradient: Float[Tensor, "token d_in"]
    ) -> Float[Tensor, "d_in layer"]:
        """The gradient of `W_router`, given that of `vectors`."""
        # vectors = weight * u, so this is the gradient of the weight times the weight.
        along = (vector_gradient * self.vectors).sum(1, keepdim=True)
        logits = -along * self.probabilities
        logits.scatter_add_(1, self.layer.unsqueeze(1), along)
        return self.pooled.T @ logits


def route(
    u: Float[Tensor, "*batch layer d_in"], W_router: Float[Tensor, "d_in layer"]
) -> Route:
    """Choose the layer with the largest of `softmax(mean_l(u_l) W_router)`."""
    pooled = u.mean(-2)
    probabilities = (pooled @ W_router).softmax(-1)
    weight, layer = probabilities.max(-1)
    index = layer[..., None, None].expand(*layer.shape, 1, u.shape[-1])
    vectors = weight.unsqueeze(-1) * u.gather(-2, index).squeeze(-2)
    return Route(vectors, layer, weight, pooled, probabilities)


def routed_loss(
    z: Float[Tensor, "token layer d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    W_router: Float[Tensor, "d_in layer"],
    *,
    standardize_inputs: bool = True,
    **options: Any,
) -> TopKLosses:
    """Training loss of a routed SAE: `training_loss` of the chosen vectors.

    They are `p u` with u standardised and p the routing weight, which gives the router
    its gradient. `options` are those of `training_loss`.

    References:
        Shi et al. (2025), arXiv:2503.08200.
    """
    u, _, _ = _standardized(z, standardize_inputs)
    v = route(u, W_router).vectors.unsqueeze(1)
    return training_loss(v, W_enc, W_dec, b_dec, standardize_inputs=False, **options)


def _standardized(
    z: Float[Tensor, "token layer d_in"], standardize_inputs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if standardize_inputs:
        return standardize(z)
    return z, z.new_zeros(()), z.new_ones(())


def _dead_acts(
    h: Float[Tensor, "*batch d_sae"], dead_latents: Bool[Tensor, " d_sae"], k_aux: int
) -> Float[Tensor, "*batch n_dead"]:
    h_dead = h[..., dead_latents]
    return topk_acts(h_dead, min(k_aux, h_dead.shape[-1]))


def _normalized_mse(
    prediction: Float[Tensor, "token layer d_in"],
    target: Float[Tensor, "token layer d_in"],
) -> Float[Tensor, ""]:
    """Mean over layers of the mean squared error over the variance of the target."""
    mse = (prediction - target).square().mean(dim=(0, 2))
    return (mse / target.var(dim=(0, 2))).mean()
