"""Lenses in closed form, from means and covariances of each layer's vectors."""

from collections.abc import Callable, Iterable
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_multilayer.lens.affine import MAX_CONDITION_NUMBER
from sae_lens_multilayer.lens.config import LensConfig, LensKind
from sae_lens_multilayer.lens.lens import LayerLens

Fit = Callable[
    [Float[Tensor, "d_in d_in"], Float[Tensor, "d_in d_in"]], Float[Tensor, "d_in d_in"]
]
"""The matrix A of `z = x A + b`, from `x^T x` and `x^T y` without their means."""


def rotation(
    cross: Float[Tensor, "d_in d_in"],
) -> Float[Tensor, "d_in d_in"]:
    """The rotation or reflection Q that minimises `|x Q - y|^2`, from `x^T y`.

    References:
        Schönemann (1966), "A generalized solution of the orthogonal Procrustes
        problem"; `scipy.linalg.orthogonal_procrustes`.
    """
    u, _, v = torch.linalg.svd(cross)
    return u @ v


def procrustes(
    own: Float[Tensor, "d_in d_in"], cross: Float[Tensor, "d_in d_in"]
) -> Float[Tensor, "d_in d_in"]:
    """A rotation or reflection times a scale: minimises `|x A - y|^2` over these."""
    turn = rotation(cross)
    return turn * ((turn * cross).sum() / own.trace())


def least_squares(
    own: Float[Tensor, "d_in d_in"], cross: Float[Tensor, "d_in d_in"]
) -> Float[Tensor, "d_in d_in"]:
    """Any matrix: minimises `|x A - y|^2`."""
    return torch.linalg.solve(own, cross)


def whitening(
    own: Float[Tensor, "d_in d_in"], cross: Float[Tensor, "d_in d_in"]
) -> Float[Tensor, "d_in d_in"]:
    """The symmetric `own^-1/2` (ZCA): `x A` has the identity as `own`.

    Of all whitening matrices it is the one that changes the vectors least, so a
    direction stays near itself at every layer. `cross` is not used.

    References:
        Kessy, Lewin, Strimmer (2018), arXiv:1512.00809.
    """
    del cross
    values, vectors = torch.linalg.eigh(own)
    return (vectors * values.rsqrt()) @ vectors.T


CLOSED_FORMS: dict[str, Fit] = {
    "procrustes": procrustes,
    "least_squares": least_squares,
    "whitening": whitening,
}


class Moments:
    """Means of each hook's vectors and covariances, added up over batches in float64.

    The covariances are of each hook with itself and with the last hook: means over
    tokens of products of deviations from the means. Batches are combined as in Chan et
    al. (1979), so large means cost no precision. Memory: two matrices per hook.
    """

    def __init__(self, n_hooks: int, d_in: int) -> None:
        """Start with no tokens."""
        self.n_tokens = 0
        self.mean = torch.zeros(n_hooks, d_in, dtype=torch.float64)
        self._own = torch.zeros(n_hooks, d_in, d_in, dtype=torch.float64)
        self._cross = torch.zeros_like(self._own)

    def update(self, x: Float[Tensor, "token layer d_in"]) -> None:
        """Add the vectors of some tokens."""
        x = x.cpu().double().movedim(1, 0)  # [layer, token, d_in]
        n, total = x.shape[1], self.n_tokens + x.shape[1]
        if n == 0:
            return
        mean = x.mean(1)
        centred, shift = x - mean[:, None], mean - self.mean
        weight = self.n_tokens * n / total
        for layer, (rows, delta) in enumerate(zip(centred, shift, strict=True)):
            outer = weight * delta[:, None]
            self._own[layer] += rows.T @ rows + outer * delta
            self._cross[layer] += rows.T @ centred[-1] + outer * shift[-1]
        self.mean += shift * (n / total)
        self.n_tokens = total

    def covariances(
        self, layer: int
    ) -> tuple[Float[Tensor, "d_in d_in"], Float[Tensor, "d_in d_in"]]:
        """Covariance of a hook's vectors (rows) with themselves and the last hook's."""
        return self._own[layer] / self.n_tokens, self._cross[layer] / self.n_tokens


def fit_closed_form(
    batches: Iterable[Float[Tensor, "token layer d_in"]],
    config: LensConfig,
    shrinkage: float = 0.0,
) -> LayerLens:
    """Fit a lens in closed form from one pass over vectors.

    "procrustes" and "least_squares" map each hook's vectors to those of the same tokens
    at the last hook, which keeps the identity; "whitening" makes the covariance of each
    hook's vectors the identity and their mean 0.

    Args:
        batches: Vectors of the hooks of `config`, in its order.
        config: Its `kind` is the form.
        shrinkage: In [0, 1): covariances C become `(1 - s) C + s tr(C) / d_in I`, for
            "least_squares" and "whitening" of vectors that do not fill all dimensions.

    Raises:
        ValueError: If there are not more tokens than `d_in`, a vector is not finite,
            or a covariance has a condition number above 1e12, so that its root
            or inverse would not survive float32.
    """
    if config.kind not in CLOSED_FORMS:
        raise ValueError(
            f"`kind` of a lens in closed form must be in {list(CLOSED_FORMS)}; got "
            f"{config.kind!r} of {get_args(LensKind)}."
        )
    if not 0 <= shrinkage < 1:
        raise ValueError(f"`shrinkage` must be in [0, 1); got {shrinkage}.")
    moments = Moments(len(config.hook_names), config.d_in)
    for x in batches:
        moments.update(x)
    _check_moments(moments, config.hook_names)
    return _lens_of_moments(moments, config, shrinkage)


def _check_moments(moments: Moments, hook_names: list[str]) -> None:
    d_in = moments.mean.shape[1]
    if moments.n_tokens <= d_in:
        raise ValueError(
            f"A lens in closed form needs more tokens than d_in = {d_in}; got "
            f"{moments.n_tokens}. Give more text, or a higher `n_tokens`."
        )
    # NaN and infinity of one vector are in the mean.
    if bad := [
        n
        for n, m in zip(hook_names, moments.mean, strict=True)
        if not m.isfinite().all()
    ]:
        raise ValueError(
            f"The vectors at {bad} must not hold NaN or infinity. Look for "
            "an overflow in the model's dtype, or leave out these hooks."
        )


def _lens_of_moments(
    moments: Moments, config: LensConfig, shrinkage: float
) -> LayerLens:
    fit, last = CLOSED_FORMS[config.kind], len(config.hook_names) - 1
    target = moments.mean[-1]
    if not config.maps_to_last_layer:
        last, target = last + 1, torch.zeros_like(target)
    maps: list[Tensor] = []
    for layer, hook_name in enumerate(config.hook_names):
        if layer == last:
            maps.append(torch.eye(config.d_in, dtype=torch.float64))
            continue
        own, cross = moments.covariances(layer)
        own = _shrunk(own, shrinkage)
        if fit is not procrustes:
            _check_rank(own, hook_name, moments.n_tokens)
        maps.append(fit(own, cross))
    biases = [target - m @ a for m, a in zip(moments.mean, maps, strict=True)]
    return LayerLens.from_maps(config, maps, biases)


def _shrunk(
    covariance: Float[Tensor, "d_in d_in"], shrinkage: float
) -> Float[Tensor, "d_in d_in"]:
    identity = torch.eye(len(covariance), dtype=covariance.dtype)
    size = covariance.trace() / len(covariance)
    return torch.lerp(covariance, size * identity, shrinkage)


def _check_rank(
    covariance: Float[Tensor, "d_in d_in"], hook_name: str, n_tokens: int
) -> None:
    values = torch.linalg.eigvalsh(covariance)
    if not values[0] * MAX_CONDITION_NUMBER**2 >= values[-1]:
        raise ValueError(
            f"The vectors of {n_tokens} tokens at {hook_name!r} must vary in all "
            f"{len(covariance)} dimensions: their covariance has eigenvalues from "
            f"{values[0]:.3g} to {values[-1]:.3g}. Give more tokens than dimensions, "
            "or a `shrinkage` such as 1e-4."
        )
