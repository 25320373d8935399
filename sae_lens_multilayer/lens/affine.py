"""An invertible affine map of the vectors of one hook."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_multilayer.topk.tile import wide_dtype

MAX_CONDITION_NUMBER = 1e6
"""Of I + W in the 2-norm. Above it, float32 activations do not survive the inverse."""


class AffineMap(nn.Module):
    """`x + x W^T + b` and its inverse, with W and b as buffers: nothing trains them.

    Conversion to a dtype narrower than float32, such as with an SAE, is to float32.

    The inverse uses LU factors of I + W, computed at its first call and again after
    W was loaded or converted. Change W with `load_state_dict`, not in place.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, hook_name: str, weight: Tensor, bias: Tensor) -> None:
        """`hook_name` is for error messages."""
        super().__init__()
        self._hook_name = hook_name
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self._factors: list[Tensor] = []

    def shared(self) -> "AffineMap":
        """A second module with the same tensors until one is loaded or converted."""
        other = AffineMap(self._hook_name, self.weight, self.bias)
        other._factors = self._factors
        return other

    @override
    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        # Autocast to bfloat16 would make the inverse inexact.
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(dtype)
            z = wide + F.linear(wide, self.weight.to(dtype), self.bias.to(dtype))
        return z.to(x.dtype)

    def invert(self, z: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Solve `x (I + W)^T = z - b` in float64 (float32 on MPS)."""
        if not self._factors:
            # Tensors made in inference mode could not be used by autograd later.
            with torch.inference_mode(False), torch.no_grad():
                self._factors.extend(self.factorize())
        lu, pivots = self._factors
        rows = (z.to(lu.dtype) - self.bias.to(lu.dtype)).reshape(-1, z.shape[-1])
        with torch.autocast(z.device.type, enabled=False):
            x = torch.linalg.lu_solve(lu, pivots, rows, left=False, adjoint=True)
        return x.reshape(z.shape).to(z.dtype)

    def factorize(self) -> tuple[Tensor, Tensor]:
        """LU factors of I + W; ValueError if its condition number is above 1e6."""
        # float64 for any dtype of W: the error is the condition number times epsilon.
        dtype = torch.float32 if self.weight.device.type == "mps" else torch.float64
        identity = torch.eye(len(self.weight), dtype=dtype, device=self.weight.device)
        matrix = identity + self.weight.to(dtype)
        lu, pivots, _ = torch.linalg.lu_factor_ex(matrix)
        inverse = torch.linalg.lu_solve(lu, pivots, identity)
        # The Frobenius norms give a cheap upper bound, enough for most matrices.
        if not matrix.norm() * inverse.norm() <= MAX_CONDITION_NUMBER:
            self._check_condition(matrix)
        return lu, pivots

    def _check_condition(self, matrix: Float[Tensor, "d_in d_in"]) -> None:
        condition = math.nan
        if matrix.isfinite().all():
            values = torch.linalg.svdvals(matrix.cpu().double())
            condition = (values[0] / values[-1]).item() if values[-1] > 0 else math.inf
        if not condition <= MAX_CONDITION_NUMBER:
            raise ValueError(
                f"The lens at {self._hook_name!r} cannot be inverted accurately: "
                f"cond(I + W) = {condition:.3g} in {self.weight.dtype}, above "
                f"{MAX_CONDITION_NUMBER:.0e}. Leave out this hook or use a wider dtype."
            )

    @override
    def _apply(self, fn: Any, recurse: bool = True) -> "AffineMap":
        def convert(tensor: Tensor) -> Tensor:
            # W = A - I may be near -I: in bfloat16 nothing of A would be left.
            found = fn(tensor)
            dtype = wide_dtype(found.dtype)
            return found if found.dtype == dtype else tensor.to(found.device, dtype)

        before = self.weight
        super()._apply(convert, recurse)
        if self.weight is not before:
            self._factors = []
        return self

    @override
    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # New tensors, since another lens may share the present ones.
        self.weight, self.bias = self.weight.clone(), self.bias.clone()
        self._factors = []
        super()._load_from_state_dict(*args, **kwargs)
