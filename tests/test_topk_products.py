"""Sparse products: the C++ kernel and PyTorch against dense products in float64."""

import pytest
import torch
from engines import ENGINES, engine, requires_kernel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae_lens_multilayer.topk import native, products
from sae_lens_multilayer.topk.products import DenseActs, SparseActs, make_acts
from sae_lens_multilayer.topk.select import CertifiedEncoder, select_topk

# (vectors, k, latents, width): one of each; odd; several blocks of columns, of both
# the matrix and its transpose.
SIZES = [(1, 1, 1, 1), (5, 3, 11, 70), (37, 9, 101, 19), (2049, 64, 2100, 150)]


def make_case(n: int, k: int, n_latents: int, d: int, seed: int = 0):
    """Sparse activations, and dense rows of vectors and of latents."""
    g = torch.Generator().manual_seed(seed)
    values, indices = torch.rand(n, n_latents, generator=g).topk(k, dim=1, sorted=False)
    x = torch.randn(n, d, generator=g)
    return (
        SparseActs(values, indices, n_latents),
        x,
        torch.randn(n_latents, d, generator=g),
    )


def all_products(acts: SparseActs, x: Tensor, rows: Tensor) -> list[Tensor]:
    """The four products; sums are added to ones."""
    decoded, dots = acts.matmul(rows), acts.dots(x, rows)
    gradient, sums = torch.ones_like(rows), torch.ones(len(rows))
    acts.add_transposed_matmul(gradient, dots, x)
    acts.add_sums(sums, dots)
    return [decoded, dots, gradient, sums]


def expected_products(acts: SparseActs, x: Tensor, rows: Tensor) -> list[Tensor]:
    dense = x.new_zeros(len(x), len(rows), dtype=torch.float64)
    dense.scatter_add_(1, acts.indices, acts.values.double())
    dots = (x.double() @ rows.double().T).gather(1, acts.indices)
    h = torch.zeros_like(dense).scatter_add_(1, acts.indices, dots)
    return [dense @ rows.double(), dots, 1 + h.T @ x.double(), 1 + h.sum(0)]


def assert_right(acts: SparseActs, x: Tensor, rows: Tensor) -> None:
    """Relative to the sums of absolute values, since terms may cancel."""
    expected = expected_products(acts, x, rows)
    sizes = expected_products(acts.with_values(acts.values.abs()), x.abs(), rows.abs())
    found = all_products(acts, x, rows)
    for actual, wanted, size in zip(found, expected, sizes, strict=True):
        assert ((actual.double() - wanted).abs() <= 1e-6 * size).all()


@pytest.mark.parametrize("is_native", ENGINES)
@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_products_are_those_of_dense_matrices(is_native, n_threads, size):
    with engine(is_native, n_threads):
        assert_right(*make_case(*size))


@requires_kernel
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 40),
    n_latents=st.integers(1, 90),
    d=st.integers(1, 150),
    data=st.data(),
)
def test_the_kernel_multiplies_any_sizes(n, n_latents, d, data):
    k = data.draw(st.integers(1, n_latents))
    assert_right(*make_case(n, k, n_latents, d, data.draw(st.integers(0, 99))))


@requires_kernel
@pytest.mark.parametrize("size", SIZES)
def test_the_number_of_threads_changes_no_bit(size):
    found = []
    for n_threads in (1, 2, 3):
        with engine(True, n_threads):
            found.append(all_products(*make_case(*size)))
    for one, two, three in zip(*found, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.parametrize("is_native", ENGINES)
def test_repeated_latents_of_a_vector_add_up(is_native):
    _, x, rows = make_case(7, 3, 5, 20)
    indices = torch.tensor([[4, 4, 0]]).repeat(7, 1)
    with engine(is_native):
        assert_right(SparseActs(torch.rand(7, 3), indices, 5), x, rows)


@pytest.mark.parametrize("is_native", ENGINES)
def test_nan_and_infinity_reach_the_results_they_belong_to(is_native):
    acts, x, rows = make_case(6, 2, 9, 21)
    acts.indices[:] = torch.tensor([0, 1])
    acts.indices[3] = torch.tensor([7, 8])
    rows[7, 2], x[3, 4] = torch.nan, torch.inf
    with engine(is_native):
        decoded, dots, gradient, sums = all_products(acts, x, rows)
    assert decoded.isnan().nonzero().tolist() == [[3, 2]]
    assert (~dots.isfinite()).any(1).nonzero().flatten().tolist() == [3]
    assert (~gradient.isfinite()).any(1).nonzero().flatten().tolist() == [7, 8]
    assert (~sums.isfinite()).nonzero().flatten().tolist() == [7, 8]


@pytest.mark.parametrize("is_native", ENGINES)
def test_tiles_joined_have_the_products_of_all_vectors(is_native):
    whole, x, rows = make_case(30, 4, 50, 33)
    tiles = [
        SparseActs(values, indices, 50)
        for values, indices in zip(
            whole.values.split(11), whole.indices.split(11), strict=True
        )
    ]
    with engine(is_native):
        assert_right(SparseActs.cat(tiles), x, rows)
        assert SparseActs.cat(tiles[:1]) is tiles[0]


@requires_kernel
def test_the_kernel_is_used_for_float32_and_contiguous_tensors_only(monkeypatch):
    calls = []
    original = native.call
    monkeypatch.setattr(
        native, "call", lambda name, *a: (calls.append(name), original(name, *a))
    )
    acts, _, rows = make_case(5, 3, 11, 8)
    expected = acts.matmul(rows)
    assert calls == ["add_product"]
    calls.clear()
    wide = SparseActs(acts.values.double(), acts.indices, 11)
    torch.testing.assert_close(wide.matmul(rows.double()).float(), expected)
    strided = rows.T.contiguous().T
    torch.testing.assert_close(acts.matmul(strided), expected)
    assert calls == []


@pytest.mark.parametrize("is_native", ENGINES)
@pytest.mark.parametrize("share", ["_DENSE_SHARE", "_DENSE_SHARE_KERNEL"])
def test_the_form_depends_on_the_share_of_active_latents(is_native, share, monkeypatch):
    monkeypatch.setattr(products, share, 2)
    is_in_use = is_native == (share == "_DENSE_SHARE_KERNEL")
    expected = SparseActs if is_in_use else DenseActs
    acts, fewer = make_case(4, 3, 7, 5)[0], make_case(4, 3, 6, 5)[0]
    with engine(is_native):
        assert isinstance(make_acts(acts.values, acts.indices, 7), expected)
        assert isinstance(make_acts(fewer.values, fewer.indices, 6), DenseActs)


@requires_kernel
@pytest.mark.parametrize("n_threads", [1, 2])
def test_selecting_among_some_latents_is_selecting_among_their_columns(n_threads):
    # More vectors than one tile of the kernel.
    g = torch.Generator().manual_seed(0)
    v, rows = torch.randn(300, 48, generator=g), torch.randn(900, 48, generator=g)
    some = torch.randperm(900, generator=g)[:333].sort().values
    with engine(True, n_threads):
        h, errors = CertifiedEncoder(rows, 5, max_rows=300)._approximate(v)
        found = native.certified_topk(h, errors, v, rows[some], 5, some)
        columns = h[:, some].contiguous()
        expected = native.certified_topk(columns, errors, v, rows[some], 5)
    assert found[2].float().mean() > 0.9
    for actual, wanted in zip(found, expected, strict=True):
        assert torch.equal(actual, wanted)
    exact = (v.double() @ rows[some].double().T).topk(5, dim=1).values
    values = found[0].sort(descending=True).values.double()
    torch.testing.assert_close(values[found[2]], exact[found[2]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_native", ENGINES)
def test_the_largest_of_some_columns_are_those_of_their_copy(is_native):
    # Authority: torch.topk. Both NaN are largest; 0 is no positive number.
    g = torch.Generator().manual_seed(0)
    h, some = torch.randn(70, 900, generator=g), torch.randperm(900, generator=g)[:333]
    h[3, some[5]], h[4, some[9]], h[5, some] = torch.nan, -torch.nan, -1
    with engine(is_native):
        values, indices = select_topk(h, 20, some)
        expected = select_topk(h[:, some].contiguous(), 20)
    assert torch.equal(values.isnan(), expected[0].isnan())
    assert torch.equal(values.nan_to_num(), expected[0].nan_to_num())
    assert torch.equal(indices, expected[1])
    if is_native:  # Products read the rows of the latents in this order.
        assert (indices.diff(dim=1) > 0).all()
    assert values[[3, 4]].isnan().sum(1).tolist() == [1, 1]
    assert not values[5].relu().any()
    usual = values[6:].sort(descending=True).values
    torch.testing.assert_close(usual, h[6:, some].topk(20).values)
