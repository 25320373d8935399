"""Encoder products and the exact selection of their k largest entries.

`Encoder` multiplies and selects in the dtype of the weights; `CertifiedEncoder` chooses
candidates from a bfloat16 product and proves for each vector that none is missing.
"""

import math
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from typing_extensions import override

from sae_lens_multilayer.topk import native
from sae_lens_multilayer.topk.products import row_dots
from sae_lens_multilayer.topk.tile import row_chunks

_GROUPS_PER_K = 8
_MIN_DEPTH = 2
_BLOCK_ELEMENTS = {"cpu": 2**23, "cuda": 2**28}
_MIN_BLOCK_ROWS = 512
_MIN_CERTIFIED_ROWS = 256
_MAX_CERTIFIED = 2**13
"""Width of vectors above which most are not proven."""
_UNPROVEN_ROWS = 256
_BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


@dataclass
class DeadLatents:
    """The dead latents of a step; AuxK uses `k` of them for each vector."""

    indices: Int[Tensor, " n_dead"]
    W_enc_rows: Float[Tensor, "n_dead d_in"]
    W_dec: Float[Tensor, "n_dead d_in"]
    k: int


@dataclass
class Selection:
    """The k largest pre-activations of each vector, in no particular order."""

    values: Float[Tensor, "act k"]
    indices: Int[Tensor, "act k"]
    dead: "Selection | None" = None
    """The k_aux largest of the dead latents; indices into `DeadLatents.indices`."""


def exact_topk(
    h: Shaped[Tensor, "act latent"], k: int
) -> tuple[Shaped[Tensor, "act k"], Int[Tensor, "act k"]]:
    """The k largest entries of each row, in no particular order, NaN first.

    Splits a row into strided groups, keeps the k groups with the largest maxima (an
    entry of any other group is no larger than each of these k maxima), and repeats this
    on their entries until few are left.

    Example:
        >>> exact_topk(torch.tensor([[1.0, 3.0, 2.0]]), k=1)
        (tensor([[3.]]), tensor([[1]]))
    """
    n_latents = h.shape[1]
    depth = n_latents // (_GROUPS_PER_K * k)
    if depth < _MIN_DEPTH:
        values, indices = h.topk(k, dim=1, sorted=False)
        return values, indices
    n_groups = n_latents // depth
    grouped = h[:, : depth * n_groups].unflatten(1, (depth, n_groups))
    _, groups = exact_topk(grouped.amax(dim=1), k)
    kept = grouped.gather(2, groups.unsqueeze(1).expand(-1, depth, -1)).flatten(1)
    n_grouped, n_kept = depth * n_groups, depth * k
    if n_grouped < n_latents:
        kept = torch.cat([kept, h[:, n_grouped:]], dim=1)
    values, kept_indices = exact_topk(kept, k)
    indices = kept_indices // k * n_groups + groups.gather(1, kept_indices % k)
    if n_grouped == n_latents:
        return values, indices
    ungrouped_indices = kept_indices - n_kept + n_grouped
    return values, torch.where(kept_indices < n_kept, indices, ungrouped_indices)


def block_rows(n_columns: int, device_type: str) -> int:
    """Vectors per block, so that their `n_columns` pre-activations fit the cache.

    At least 512, since each block reads all weights once.
    """
    budget = _BLOCK_ELEMENTS.get(device_type, 2**24)
    return max(_MIN_BLOCK_ROWS, budget // n_columns)


def select_topk(
    h: Float[Tensor, "act column"],
    k: int,
    latents: Int[Tensor, " latent"] | None = None,
) -> tuple[Float[Tensor, "act k"], Int[Tensor, "act k"]]:
    """The k largest positive entries; if there are fewer, others at or below 0.

    Indices are those among the columns of `latents`, if given.
    """
    if h.dtype == torch.float32 and native.is_available(h):
        return native.largest_positive(h, k, latents)
    return exact_topk(h if latents is None else h.index_select(1, latents), k)


class Encoder:
    """Selects the k largest entries of `W_enc_rows v` for many vectors v.

    All blocks of vectors share one buffer of pre-activations, [block, d_sae]. Together
    with a copy of those of the dead latents it has at most `max_rows * d_sae` entries.
    """

    def __init__(
        self,
        W_enc_rows: Float[Tensor, "d_sae d_in"],
        k: int,
        *,
        max_rows: int,
        dead: DeadLatents | None = None,
    ) -> None:
        self.W_enc_rows = W_enc_rows
        self.k = k
        self.dead = dead
        d_sae = len(W_enc_rows)
        n_columns = d_sae if dead is None else d_sae + len(dead.indices)
        limit = max(1, max_rows * d_sae // n_columns)
        self.block_rows = min(limit, block_rows(n_columns, W_enc_rows.device.type))

    n_unproven = 0
    """Selections computed again in float32, since a bfloat16 product proved nothing."""

    def __call__(self, v: Float[Tensor, "act d_in"]) -> Selection:
        """Select from all latents and, if there are any, from the dead latents."""
        return _concatenate([self._select(block) for block in v.split(self.block_rows)])

    def _select(self, v: Float[Tensor, "act d_in"]) -> Selection:
        h = _product(v, self.W_enc_rows, self._block)
        values, indices = select_topk(h, self.k)
        if self.dead is None:
            return Selection(values, indices)
        dead = select_topk(h, self.dead.k, self.dead.indices)
        return Selection(values, indices, Selection(*dead))

    @cached_property
    def _block(self) -> Tensor:
        return self.W_enc_rows.new_empty(self.block_rows, len(self.W_enc_rows))


class CertifiedEncoder(Encoder):
    """Selects from a bfloat16 product and proves that the float32 top k is the same.

    The error of the product of rounded vectors v', w' is at most

        |v.w - v'.w'| <= |v - v'| |w| + |v'| |w - w'|

    plus the rounding of the stored product (2^-8 of it) and of float32 sums (d_in 2^-22
    |v| |w|, which covers tensor cores that truncate). Norms are measured; those of w
    are the largest over latents. The values of the candidates are computed in float32.
    A vector is proven if no other entry can be among its k largest; see `_certify` and
    `native.certified_topk`. Vectors without proof are multiplied in float32.
    """

    @override
    def _select(self, v: Float[Tensor, "act d_in"]) -> Selection:
        h, errors = self._approximate(v)
        values, indices = self._certified(h, errors, v, self.W_enc_rows, self.k)
        if self.dead is None:
            return Selection(values, indices)
        rows, k = self.dead.W_enc_rows, self.dead.k
        if not (native.is_available(h) and 2 * k < len(rows)):
            return Selection(values, indices, Selection(*select_topk(v @ rows.T, k)))
        dead = self._certified(h, errors, v, rows, k, self.dead.indices)
        return Selection(values, indices, Selection(*dead))

    def _approximate(
        self, v: Float[Tensor, "act d_in"]
    ) -> tuple[Float[Tensor, "act latent"], Float[Tensor, " act"]]:
        """The bfloat16 product, and a bound on its error for each vector."""
        rounded_w, w_norm, w_rounding = self._rounded_weights
        rounded_v, v_norms, v_roundings = _round_rows(v)
        error_v = v_roundings * w_norm
        error_w = (v_norms + v_roundings) * w_rounding
        error_sums = v_norms * w_norm * (v.shape[1] * 2**-22)
        # 1.001: the norms are themselves rounded.
        errors = (error_v + error_w + error_sums) * 1.001
        return _product(rounded_v, rounded_w, self._block), errors

    def _certified(
        self,
        h: Float[Tensor, "act column"],
        errors: Float[Tensor, " act"],
        v: Float[Tensor, "act d_in"],
        rows: Float[Tensor, "latent d_in"],
        k: int,
        latents: Int[Tensor, " latent"] | None = None,
    ) -> tuple[Float[Tensor, "act k"], Int[Tensor, "act k"]]:
        """The k largest float32 products with `rows`, approximated by `h`.

        With the kernel, `rows` may be those of some `latents` only.
        """
        if native.is_available(h):
            found = native.certified_topk(h, errors, v, rows, k, latents)
        else:
            assert latents is None
            found = _certify(h, errors, v, rows, k)
        values, indices, proven = found
        unproven = (~proven).nonzero().flatten()
        self.n_unproven += len(unproven)
        if len(unproven) > 0:
            # Few at a time, since each has one product per latent.
            for part in unproven.split(_UNPROVEN_ROWS):
                values[part], indices[part] = select_topk(v[part] @ rows.T, k)
        return values, indices

    @cached_property
    def _rounded_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """The encoder in bfloat16, and the largest norms of its rows and roundings."""
        rounded, norms, roundings = _round_rows(self.W_enc_rows)
        return rounded, norms.amax(), roundings.amax()

    @cached_property
    def _block(self) -> Tensor:
        rounded = self._rounded_weights[0]
        return rounded.new_empty(self.block_rows, len(rounded))


def _certify(
    h: Float[Tensor, "act latent"],
    errors: Float[Tensor, " act"],
    v: Float[Tensor, "act d_in"],
    rows: Float[Tensor, "latent d_in"],
    k: int,
) -> tuple[Float[Tensor, "act k"], Int[Tensor, "act k"], Bool[Tensor, " act"]]:
    """`native.certified_topk` in PyTorch, with 2k candidates for each vector.

    A vector is proven if its k-th float32 value exceeds the error bound of the smallest
    candidate, which is no smaller than any other entry.
    """
    # Positive floats have the order of their bits, and integers are compared faster. A
    # negative NaN is overlooked here, but makes the errors NaN.
    bits, candidates = exact_topk(h.view(_BITS[h.dtype]), 2 * k)
    smallest = bits.amin(dim=1).clamp_min(0).view(h.dtype).to(v.dtype)
    exact = row_dots(v, rows, candidates)
    values, selected = exact.topk(k, dim=1, sorted=False)
    # This comparison is false for NaN, as it must be.
    proven = values.amin(dim=1) > smallest + smallest * 2**-8 + errors
    return values, candidates.gather(1, selected), proven


def make_encoder(
    W_enc_rows: Float[Tensor, "d_sae d_in"],
    k: int,
    *,
    n_acts: int,
    certified: bool | None,
    max_rows: int | None = None,
    dead: DeadLatents | None = None,
) -> Encoder:
    """Make the certified encoder or not; None chooses the faster one."""
    d_sae = len(W_enc_rows)
    if not 1 <= k <= d_sae:
        raise ValueError(f"`k` must be in [1, d_sae={d_sae}]; got {k}.")
    if certified and W_enc_rows.dtype == torch.float64:
        raise ValueError(
            "`certified=True` chooses candidates for a float32 result; got float64 "
            "weights. Use `certified=False` or None."
        )
    if certified is None:
        certified = is_certified_faster(W_enc_rows, k, n_acts)
    kind = CertifiedEncoder if certified and 2 * k < d_sae else Encoder
    return kind(W_enc_rows, k, max_rows=max_rows or n_acts or 1, dead=dead)


def is_certified_faster(
    W_enc_rows: Float[Tensor, "d_sae d_in"], k: int, n_acts: int
) -> bool:
    """Whether `certified=None` means True.

    Needs float32 weights, k <= d_sae / 32, at least 256 vectors of at most 2^13 entries
    (the error bound grows with the width, so that most longer ones are not proven), and
    either a CPU with bfloat16 instructions (AVX-512 BF16 or AMX) or a CUDA device of
    capability 8 or more with a torch that returns float32 products of bfloat16
    matrices.
    """
    d_sae, d_in = W_enc_rows.shape
    fits = n_acts >= _MIN_CERTIFIED_ROWS and 32 * k <= d_sae and d_in <= _MAX_CERTIFIED
    if W_enc_rows.dtype != torch.float32 or not fits:
        return False
    if W_enc_rows.device.type == "cuda":
        has_wide_product = "dtype" in torch.ops.aten.mm.overloads()
        capability = torch.cuda.get_device_capability(W_enc_rows.device)
        return has_wide_product and capability >= (8, 0)
    return W_enc_rows.device.type == "cpu" and cpu_has_bfloat16()


@cache
def cpu_has_bfloat16() -> bool:
    """Whether the CPU has instructions for products of bfloat16 numbers."""
    # torch before 2.10 lacks this function.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def _product(
    v: Float[Tensor, "act d_in"], rows: Float[Tensor, "d_sae d_in"], block: Tensor
) -> Float[Tensor, "act d_sae"]:
    """`v rows^T`, written to the start of `block`, with sums in float32 or wider."""
    if rows.dtype == torch.bfloat16 and rows.device.type == "cuda":
        # For a bfloat16 result, CUDA may also sum in bfloat16.
        return torch.mm(v, rows.T, out_dtype=torch.float32)
    return torch.mm(v, rows.T, out=block[: len(v)])


def _round_rows(
    x: Float[Tensor, "row d_in"],
) -> tuple[Float[Tensor, "row d_in"], Float[Tensor, " row"], Float[Tensor, " row"]]:
    """Rows in bfloat16, and upper bounds of their norms and rounding errors' norms."""
    # The largest error of a norm due to squares that underflow in float32.
    underflow = math.sqrt(x.shape[1]) * 2**-63
    if native.is_available(x):
        rounded, norms, errors = native.round_rows(x)
    else:
        rounded = x.to(torch.bfloat16)
        parts = zip(row_chunks(x), row_chunks(rounded), strict=True)
        errors = torch.cat([torch.linalg.vector_norm(a - b, dim=1) for a, b in parts])
        norms = torch.linalg.vector_norm(x, dim=1)
    return rounded, norms + underflow, errors + underflow


def _concatenate(parts: list[Selection]) -> Selection:
    if len(parts) == 1:
        return parts[0]
    dead = [part.dead for part in parts if part.dead is not None]
    return Selection(
        torch.cat([part.values for part in parts]),
        torch.cat([part.indices for part in parts]),
        _concatenate(dead) if dead else None,
    )
