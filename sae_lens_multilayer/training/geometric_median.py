"""Where b_dec starts: the point with the least total distance to a set of vectors."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_multilayer.ranks import ALONE, Ranks
from sae_lens_multilayer.sae.sparse_training import SparseTrainingSAE
from sae_lens_multilayer.topk.reference import standardize

_ROWS_AT_A_TIME = 8192


@torch.no_grad()
def geometric_median(
    points: Float[Tensor, "act d_in"],
    max_iter: int = 100,
    tol: float = 1e-5,
    ranks: Ranks = ALONE,
) -> Float[Tensor, " d_in"]:
    """Geometric median by Weiszfeld's algorithm, from the mean.

    `argmin_m sum_i |points[i] - m|`, computed on blocks of rows to save memory. A step
    that starts on a point, where Weiszfeld's divides by zero, is Vardi and Zhang's.

    Args:
        tol: Step length (in the points' unit) below which it stops.
        ranks: Each holds as many other points.

    References:
        Initialisation of the pre-encoder bias: Bricken et al. (2023); Lawson et al.
        (2025), section 3. Steps from a point: Vardi and Zhang (2000),
        doi:10.1073/pnas.97.4.1423.
    """
    median = points.mean(0)
    ranks.mean_(median)
    for _ in range(max_iter):
        previous, median = median, _step(points, median, ranks)
        if (median - previous).norm() < tol:
            break
    return median


def median_of_inputs(
    sae: SparseTrainingSAE[Any],
    batch: Float[Tensor, "token layer d_in"],
    ranks: Ranks = ALONE,
) -> Float[Tensor, " d_enc"]:
    """Geometric median of the vectors that the encoder receives for a batch."""
    vectors = torch.empty_like(batch, dtype=torch.float32)
    for layer in range(batch.shape[1]):
        of_layer = batch[:, layer], vectors[:, layer]
        blocks = (rows.split(_ROWS_AT_A_TIME) for rows in of_layer)
        for rows, into in zip(*blocks, strict=True):
            z = sae.into_lens(rows.float(), layer)
            into.copy_(standardize(z)[0] if sae.standardizes else z)
    return geometric_median(sae.encoded_at_once(vectors), ranks=ranks)


def _step(
    points: Float[Tensor, "act d_in"], median: Float[Tensor, " d_in"], ranks: Ranks
) -> Float[Tensor, " d_in"]:
    total, weight = torch.zeros_like(median), torch.zeros_like(median[0])
    n_here = torch.zeros_like(median[0])
    for rows in points.split(_ROWS_AT_A_TIME):
        distance = (rows - median).norm(dim=1)
        here = distance == 0
        inverse = torch.where(here, 0.0, 1 / distance)
        total += inverse @ rows
        weight += inverse.sum()
        n_here += here.sum()
    ranks.sum_(total, weight, n_here)
    if n_here == 0:
        return total / weight
    # The points elsewhere pull with this force; those here hold with one unit each.
    force = (total - weight * median).norm()
    if force <= n_here:
        return median
    return median + (1 - n_here / force) * (total / weight - median)
