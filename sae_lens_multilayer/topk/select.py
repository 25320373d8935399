"""Encoder products and the selection of their k largest entries, exactly.

`Encoder` multiplies and selects in the dtype of the weights; `CertifiedEncoder` chooses
candidates from a bfloat16 product and proves, row by row, that nothing was missed.
"""

from dataclasses import dataclass
from functools import cache, cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_multilayer.topk.products import row_dots
from sae_lens_multilayer.topk.tile import row_chunks

_GROUPS_PER_K = 8
_MIN_DEPTH = 2
_BLOCK_ELEMENTS = {"cpu": 2**23, "cuda": 2**28}
_MIN_CERTIFIED_ROWS = 256


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
    h: Float[Tensor, "act latent"], k: int
) -> tuple[Float[Tensor, "act k"], Int[Tensor, "act k"]]:
    """The k largest entries of each row, exactly, in no particular order.

    Entries are put into groups, strided so that the maxima of all groups are the
    maximum of contiguous pieces. The k groups with the largest maxima hold k largest
    entries: an entry of any other group is no larger than each of those k maxima. Among
    their entries the same is done again, until few are left. Equal entries are
    interchangeable and NaN is largest, as in `torch.topk`.

    Returns:
        Values, in float32 if `h` has less than 32 bits, and their places.

    Example:
        >>> exact_topk(torch.tensor([[1.0, 3.0, 2.0]]), k=1)
        (tensor([[3.]]), tensor([[1]]))
    """
    n_latents = h.shape[1]
    depth = n_latents // (_GROUPS_PER_K * k)
    if depth < _MIN_DEPTH:
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        values, indices = wide.topk(k, dim=1, sorted=False)
        return values, indices
    n_groups = n_latents // depth
    grouped = h[:, : depth * n_groups].unflatten(1, (depth, n_groups))
    _, groups = exact_topk(grouped.amax(dim=1), k)
    kept = grouped.gather(2, groups.unsqueeze(1).expand(-1, depth, -1)).flatten(1)
    n_grouped, n_kept = depth * n_groups, depth * k
    values, places = exact_topk(torch.cat([kept, h[:, n_grouped:]], dim=1), k)
    indices = places // k * n_groups + groups.gather(1, places % k)
    beyond_groups = places - n_kept + n_grouped
    return values, torch.where(places < n_kept, indices, beyond_groups)


class Encoder:
    """Selects the k largest entries of `W_enc_rows v` for many vectors v.

    One block of pre-activations is allocated, [d_sae, block], and used for one block of
    vectors after the other; it is small enough to stay in the cache.
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
        budget = _BLOCK_ELEMENTS.get(W_enc_rows.device.type, 2**24)
        self.block_rows = min(max_rows, max(64, budget // len(W_enc_rows)))

    def __call__(self, v: Float[Tensor, "act d_in"]) -> Selection:
        """Select from all latents and, where there are any, from the dead ones."""
        return _concatenate([self._select(block) for block in v.split(self.block_rows)])

    def _select(self, v: Float[Tensor, "act d_in"]) -> Selection:
        h = _product(v, self.W_enc_rows, self._block)
        values, indices = exact_topk(h, self.k)
        if self.dead is None:
            return Selection(values, indices)
        h_dead = h.index_select(1, self.dead.indices)
        return Selection(values, indices, *exact_topk(h_dead, self.dead.k))

    @cached_property
    def _block(self) -> Tensor:
        return self.W_enc_rows.new_empty(self.block_rows, len(self.W_enc_rows))


class CertifiedEncoder(Encoder):
    """Selects from a bfloat16 product and proves that the float32 top k is the same.

    Of the 2k largest entries of the product of rounded numbers the values are computed
    in float32. A vector is proven if its k-th value exceeds the largest entry left out
    by more than the two can differ:

        |v.w - v'.w'| <= |v - v'| |w| + |v'| |w - w'|        v', w' rounded

    plus the rounding of the stored product (2^-8 of it) and of float32 sums (in all
    d_in 2^-22 |v| |w|, which covers tensor cores that truncate). Norms of rounding
    errors are measured, and the largest over latents taken. Vectors without proof go
    through `Encoder`. An entry at or below 0 is no activation, so a k-th value below 0
    counts as 0.
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
        self.exact = Encoder(W_enc_rows, k, max_rows=max_rows)
        self.rounded = W_enc_rows.to(torch.bfloat16)
        self.norm, self.rounding_norm = _largest_norms(W_enc_rows, self.rounded)
        self.n_unproven = 0

    def __call__(self, v: Float[Tensor, "act d_in"]) -> Selection:
        """As `Encoder`; values differ by the order of float32 sums alone."""
        parts, margins = zip(
            *(self._select_with_margin(b) for b in v.split(self.block_rows)),
            strict=True,
        )
        selection = _concatenate(list(parts))
        # not "margin <= 0": NaN is no proof
        unproven = (~(torch.cat(margins) > 0)).nonzero().flatten()
        if len(unproven) > 0:
            exact = self.exact(v[unproven])
            selection.values[unproven] = exact.values
            selection.indices[unproven] = exact.indices
        self.n_unproven += len(unproven)
        return selection

    def _select_with_margin(
        self, v: Float[Tensor, "act d_in"]
    ) -> tuple[Selection, Float[Tensor, " act"]]:
        rounded = v.to(torch.bfloat16)
        approximate, candidates = exact_topk(
            _product(rounded, self.rounded, self._block), 2 * self.k
        )
        h = row_dots(v, self.W_enc_rows, candidates)
        values, places = h.topk(self.k, dim=1, sorted=False)
        left_out = approximate.amin(dim=1)
        bound = left_out + left_out.abs() * 2**-8 + self._product_error(v, rounded)
        selection = Selection(values, candidates.gather(1, places))
        if self.dead is not None:
            h_dead = v @ self.dead.W_enc_rows.T
            dead_values, dead_indices = exact_topk(h_dead, self.dead.k)
            selection = Selection(values, selection.indices, dead_values, dead_indices)
        return selection, values.amin(dim=1).clamp_min(0) - bound

    def _product_error(
        self, v: Float[Tensor, "act d_in"], rounded: Float[Tensor, "act d_in"]
    ) -> Float[Tensor, " act"]:
        wide = rounded.to(v.dtype)
        norm = torch.linalg.vector_norm(v, dim=1)
        of_v = torch.linalg.vector_norm(v - wide, dim=1) * self.norm
        of_w = torch.linalg.vector_norm(wide, dim=1) * self.rounding_norm
        sums = norm * self.norm * (v.shape[1] * 2**-22)
        return (of_v + of_w + sums) * 1.001  # the norms are themselves rounded

    @cached_property
    def _block(self) -> Tensor:
        return self.rounded.new_empty(self.block_rows, len(self.rounded))


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
    AMX) or a CUDA device of capability 8 or more, if k is at most d_sae / 32 and there
    are at least 256 vectors for which to round the weights.
    """
    enough = n_acts >= _MIN_CERTIFIED_ROWS and 32 * k <= len(W_enc_rows)
    if W_enc_rows.dtype != torch.float32 or not enough:
        return False
    if W_enc_rows.device.type == "cuda":
        return torch.cuda.get_device_capability(W_enc_rows.device) >= (8, 0)
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


def _largest_norms(
    rows: Float[Tensor, "d_sae d_in"], rounded: Float[Tensor, "d_sae d_in"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Largest norm of a row, and of its difference from the rounded row."""
    norms, errors = [], []
    for row, near in zip(row_chunks(rows), row_chunks(rounded), strict=True):
        norms.append(torch.linalg.vector_norm(row, dim=1).amax())
        errors.append(torch.linalg.vector_norm(row - near, dim=1).amax())
    return torch.stack(norms).amax(), torch.stack(errors).amax()


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
