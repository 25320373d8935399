"""Encoder products and the selection of their k largest entries, exactly.

`Encoder` multiplies and selects in the dtype of the weights; `CertifiedEncoder` chooses
candidates from a bfloat16 product and proves, row by row, that nothing was missed.
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
_UNPROVEN_ROWS = 256
_BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


@dataclass
class DeadLatents:
    """The dead latents of a step, and how many of them AuxK uses for each vector."""

    indices: Int[Tensor, " n_dead"]
    W_enc_rows: Float[Tensor, "n_dead d_in"]
    W_dec: Float[Tensor, "n_dead d_in"]
    k: int


@dataclass
class Selection:
    """The k largest pre-activations of each vector, in no particular order."""

    values: Float[Tensor, "act k"]
    indices: Int[Tensor, "act k"]
    dead_values: Float[Tensor, "act k_aux"] | None = None
    dead_indices: Int[Tensor, "act k_aux"] | None = None
    """Places within `DeadLatents.indices`."""


def exact_topk(
    h: Shaped[Tensor, "act latent"], k: int
) -> tuple[Shaped[Tensor, "act k"], Int[Tensor, "act k"]]:
    """The k largest entries of each row, exactly, in no particular order.

    Entries are put into groups, strided so that the maxima of all groups are the
    maximum of contiguous pieces. The k groups with the largest maxima hold k largest
    entries: an entry of any other group is no larger than each of those k maxima. Among
    their entries the same is done again, until few are left. Equal entries are
    interchangeable and NaN is largest, as in `torch.topk`.

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
    values, places = exact_topk(kept, k)
    indices = places // k * n_groups + groups.gather(1, places % k)
    if n_grouped == n_latents:
        return values, indices
    beyond_groups = places - n_kept + n_grouped
    return values, torch.where(places < n_kept, indices, beyond_groups)


def block_rows(n_columns: int, device_type: str) -> int:
    """Vectors whose pre-activations are computed at a time: as many as fit the cache.

    And 512 at least, as each block reads all weights once, for which few vectors would
    wait.

    Args:
        n_columns: Pre-activations of a vector.
    """
    budget = _BLOCK_ELEMENTS.get(device_type, 2**24)
    return max(_MIN_BLOCK_ROWS, budget // n_columns)


def select_topk(
    h: Float[Tensor, "act latent"], k: int
) -> tuple[Float[Tensor, "act k"], Int[Tensor, "act k"]]:
    """`exact_topk` in the fastest way that is right for activations.

    Entries at or below 0 are no activations: which of them fill up is not defined.
    """
    if h.dtype == torch.float32 and native.is_available(h):
        return native.largest_positive(h, k)
    return exact_topk(h, k)


class Encoder:
    """Selects the k largest entries of `W_enc_rows v` for many vectors v.

    One block of pre-activations is allocated, [block, d_sae], and used for one block of
    vectors after the other; it is small enough to stay in the cache, if d_sae is not
    very large. With those of the dead latents, which are gathered from it, it is no
    more than [max_rows, d_sae].
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
        most = max(1, max_rows * d_sae // n_columns)
        self.block_rows = min(most, block_rows(n_columns, W_enc_rows.device.type))

    def __call__(self, v: Float[Tensor, "act d_in"]) -> Selection:
        """Select from all latents and, where there are any, from the dead ones."""
        return _concatenate([self._select(block) for block in v.split(self.block_rows)])

    def _select(self, v: Float[Tensor, "act d_in"]) -> Selection:
        h = _product(v, self.W_enc_rows, self._block)
        values, indices = select_topk(h, self.k)
        if self.dead is None:
            return Selection(values, indices)
        h_dead = h.index_select(1, self.dead.indices)
        return Selection(values, indices, *select_topk(h_dead, self.dead.k))

    @cached_property
    def _block(self) -> Tensor:
        return self.W_enc_rows.new_empty(self.block_rows, len(self.W_enc_rows))


class CertifiedEncoder(Encoder):
    """Selects from a bfloat16 product and proves that the float32 top k is the same.

    An entry of the product of rounded numbers is off by no more than

        |v.w - v'.w'| <= |v - v'| |w| + |v'| |w - w'|        v', w' rounded

    plus the rounding of the stored product (2^-8 of it) and of float32 sums (in all
    d_in 2^-22 |v| |w|, which covers tensor cores that truncate). Norms of rounding
    errors are measured, and the largest over latents taken. Candidates are computed in
    float32, and a vector is proven if no entry that was left out can be among its k
    largest; see `_certify` and `native.certified_topk`. Vectors without proof are
    multiplied in float32.
    """

    def __init__(
        self,
        W_enc_rows: Float[Tensor, "d_sae d_in"],
        k: int,
        *,
        max_rows: int,
        dead: DeadLatents | None = None,
    ) -> None:
        super().__init__(W_enc_rows, k, max_rows=max_rows, dead=dead)
        self.rounded, norms, errors = _round_rows(W_enc_rows)
        self.norm, self.rounding_norm = norms.amax(), errors.amax()
        self.n_unproven = 0

    @override
    def _select(self, v: Float[Tensor, "act d_in"]) -> Selection:
        h, errors = self._approximate(v)
        values, indices = self._certified(h, errors, v, self.W_enc_rows, self.k)
        if self.dead is None:
            return Selection(values, indices)
        rows, k = self.dead.W_enc_rows, self.dead.k
        if not (native.is_available(h) and 2 * k < len(rows)):
            return Selection(values, indices, *select_topk(v @ rows.T, k))
        h_dead = h.index_select(1, self.dead.indices)
        dead_values, dead_indices = self._certified(h_dead, errors, v, rows, k)
        return Selection(values, indices, dead_values, dead_indices)

    def _approximate(
        self, v: Float[Tensor, "act d_in"]
    ) -> tuple[Float[Tensor, "act latent"], Float[Tensor, " act"]]:
        """Products of rounded numbers, and how far those of a vector can be off."""
        rounded, norms, of_rounding = _round_rows(v)
        of_v = of_rounding * self.norm
        of_w = (norms + of_rounding) * self.rounding_norm
        of_sums = norms * self.norm * (v.shape[1] * 2**-22)
        errors = (of_v + of_w + of_sums) * 1.001  # the norms are themselves rounded
        h = _product(rounded, self.rounded, self._block)
        return h, errors

    def _certified(
        self,
        h: Float[Tensor, "act latent"],
        errors: Float[Tensor, " act"],
        v: Float[Tensor, "act d_in"],
        rows: Float[Tensor, "latent d_in"],
        k: int,
    ) -> tuple[Float[Tensor, "act k"], Int[Tensor, "act k"]]:
        """The k largest float32 products with `rows`, of which `h` is near."""
        certify = native.certified_topk if native.is_available(h) else _certify
        values, indices, proven = certify(h, errors, v, rows, k)
        unproven = (~proven).nonzero().flatten()
        self.n_unproven += len(unproven)
        if len(unproven) > 0:
            # few at a time: each has as many products as there are latents
            for places in unproven.split(_UNPROVEN_ROWS):
                values[places], indices[places] = select_topk(v[places] @ rows.T, k)
        return values, indices

    @cached_property
    def _block(self) -> Tensor:
        return self.rounded.new_empty(self.block_rows, len(self.rounded))


def _certify(
    h: Float[Tensor, "act latent"],
    errors: Float[Tensor, " act"],
    v: Float[Tensor, "act d_in"],
    rows: Float[Tensor, "latent d_in"],
    k: int,
) -> tuple[Float[Tensor, "act k"], Int[Tensor, "act k"], Bool[Tensor, " act"]]:
    """`native.certified_topk` in PyTorch, with 2k candidates for each vector.

    A vector is proven if its k-th float32 value exceeds the largest entry left out by
    more than that can be off.
    """
    # Numbers above 0 are in the order of their bits, which are compared faster. A
    # negative NaN is overlooked, but leaves the errors NaN.
    bits, candidates = exact_topk(h.view(_BITS[h.dtype]), 2 * k)
    left_out = bits.amin(dim=1).clamp_min(0).view(h.dtype).to(v.dtype)
    exact = row_dots(v, rows, candidates)
    values, places = exact.topk(k, dim=1, sorted=False)
    # not "no more than": NaN is no proof
    proven = values.amin(dim=1) > left_out + left_out * 2**-8 + errors
    return values, candidates.gather(1, places), proven


def make_encoder(
    W_enc_rows: Float[Tensor, "d_sae d_in"],
    k: int,
    *,
    n_acts: int,
    certified: bool | None,
    max_rows: int | None = None,
    dead: DeadLatents | None = None,
) -> Encoder:
    """The encoder asked for; None takes the certified one where it is faster.

    Raises:
        ValueError: If k is not in [1, d_sae], or a certified selection is asked for
            with float64 weights.
    """
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

    It does for float32 weights, on a CPU with bfloat16 instructions (AVX-512 BF16 or
    AMX), or on a CUDA device of capability 8 or more with a torch that can give a
    float32 product of bfloat16 matrices there; if k is at most d_sae / 32 and there are
    at least 256 vectors for which to round the weights.
    """
    enough = n_acts >= _MIN_CERTIFIED_ROWS and 32 * k <= len(W_enc_rows)
    if W_enc_rows.dtype != torch.float32 or not enough:
        return False
    if W_enc_rows.device.type == "cuda":
        has_wide_product = "dtype" in torch.ops.aten.mm.overloads()
        capability = torch.cuda.get_device_capability(W_enc_rows.device)
        return has_wide_product and capability >= (8, 0)
    return W_enc_rows.device.type == "cpu" and _cpu_has_bfloat16()


@cache
def _cpu_has_bfloat16() -> bool:
    # torch before 2.10 does not tell
    find = getattr(torch.cpu, "get_capabilities", dict)
    capabilities = find()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def _product(
    v: Float[Tensor, "act d_in"], rows: Float[Tensor, "d_sae d_in"], block: Tensor
) -> Float[Tensor, "act d_sae"]:
    """`v rows^T`, written to the start of `block`, with sums in float32 or wider."""
    if rows.dtype == torch.bfloat16 and rows.device.type == "cuda":
        # sums for a bfloat16 result may be in bfloat16 there
        return torch.mm(v, rows.T, out_dtype=torch.float32)
    return torch.mm(v, rows.T, out=block[: len(v)])


def _round_rows(
    x: Float[Tensor, "row d_in"],
) -> tuple[Float[Tensor, "row d_in"], Float[Tensor, " row"], Float[Tensor, " row"]]:
    """Rows in bfloat16, and at least their norms and those of the rounding errors."""
    # The most that squares too small for float32 can take from a norm.
    lost = math.sqrt(x.shape[1]) * 2**-63
    if native.is_available(x):
        rounded, norms, errors = native.round_rows(x)
        return rounded, norms + lost, errors + lost
    rounded = x.to(torch.bfloat16)
    parts = zip(row_chunks(x), row_chunks(rounded), strict=True)
    errors = [torch.linalg.vector_norm(part - near, dim=1) for part, near in parts]
    norms = torch.linalg.vector_norm(x, dim=1)
    return rounded, norms + lost, torch.cat(errors) + lost


def _concatenate(parts: list[Selection]) -> Selection:
    if len(parts) == 1:
        return parts[0]
    dead_values = [p.dead_values for p in parts if p.dead_values is not None]
    dead_indices = [p.dead_indices for p in parts if p.dead_indices is not None]
    return Selection(
        torch.cat([p.values for p in parts]),
        torch.cat([p.indices for p in parts]),
        torch.cat(dead_values) if dead_values else None,
        torch.cat(dead_indices) if dead_indices else None,
    )
