"""The sparse step: parity with the definition, selection, and statistics."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from engines import ENGINES, engine, requires_kernel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from sae_lens_multilayer.topk import native, products, select
from sae_lens_multilayer.topk.reference import standardize, topk_acts, training_loss
from sae_lens_multilayer.topk.select import (
    CertifiedEncoder,
    Encoder,
    exact_topk,
    make_encoder,
    select_topk,
)
from sae_lens_multilayer.topk.sparse import TopKActs, decode_topk, encode_topk
from sae_lens_multilayer.topk.step import TopKStep, training_step

PAPER = Path(__file__).parent / "data" / "paper"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
Weights = tuple[Tensor, Tensor, Tensor]

CERTIFY = [
    pytest.param(native.certified_topk, id="kernel", marks=requires_kernel),
    select._certify,
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """One thread is fastest for small products, especially on a busy machine."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def poisoned(monkeypatch) -> None:
    """Fill newly allocated memory with NaN, or -1 for integers."""

    def poison(function):
        def filled(*args, **kwargs) -> Tensor:
            out = function(*args, **kwargs)
            return out.fill_(torch.nan if out.is_floating_point() else -1)

        return filled

    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (Tensor, "new_empty"),
    ]:
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


def make_case(
    n_tokens: int = 37,
    n_layers: int = 3,
    d_in: int = 19,
    d_sae: int = 101,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Weights]:
    """Vectors with a different mean and scale per layer, and random weights."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    scale = torch.arange(1, n_layers + 1)[:, None]
    z = normal(n_tokens, n_layers, d_in) * scale + 3 * normal(n_layers, d_in)
    W_enc = normal(d_sae, d_in).to(dtype).T
    weights = (W_enc, normal(d_sae, d_in).to(dtype), (0.1 * normal(d_in)).to(dtype))
    return z.to(dtype), weights


def some_dead(d_sae: int, share: float = 0.3) -> Tensor:
    return torch.rand(d_sae, generator=torch.Generator().manual_seed(1)) < share


def copies(weights: Weights) -> Weights:
    """Copies of the weights as leaves, with the same strides."""
    W_enc, W_dec, b_dec = (w.detach().clone().requires_grad_() for w in weights)
    return W_enc, W_dec, b_dec


def gradients(weights: Weights) -> Iterator[Tensor]:
    for weight in weights:
        assert weight.grad is not None
        yield weight.grad


def relative_error(actual: Tensor, expected: Tensor) -> float:
    difference = torch.linalg.vector_norm((actual - expected).double())
    norm = torch.linalg.vector_norm(expected.double())
    return (difference / norm.clamp_min(1e-9)).item()  # a gradient may be 0


def assert_parity(
    z: Tensor, weights: Weights, tolerance: float, micro_batch_size: int = 10, **changes
) -> TopKStep:
    """Compare losses and gradients with autograd of the dense definition."""
    options = {"k": 7, "dead_latents": None, "k_aux": 9, "aux_coefficient": 0.3}
    options = {**options, **changes}
    certified = options.pop("certified", None)
    dense, sparse = copies(weights), copies(weights)
    losses = training_loss(z, *dense, **options)
    losses.loss.backward()
    step = training_step(
        z, *sparse, micro_batch_size=micro_batch_size, certified=certified, **options
    )
    for actual, expected in zip(gradients(sparse), gradients(dense), strict=True):
        assert actual.stride() == expected.stride()
        assert relative_error(actual, expected) < tolerance
    for name in ("loss", "mse_loss", "aux_loss"):
        expected = getattr(losses, name).item()
        assert getattr(step, name).item() == pytest.approx(expected, rel=tolerance)
    return step


# Parity with the definition


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("k", [1, 7, 101])
@pytest.mark.parametrize("dead_share", [None, 0.0, 0.3, 1.0])
def test_losses_and_gradients_are_those_of_autograd(dtype, k, dead_share):
    dead = None if dead_share is None else some_dead(101, dead_share)
    z, weights = make_case(dtype=dtype)
    assert_parity(z, weights, TOLERANCE[dtype], k=k, dead_latents=dead)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("certified", [False, True])
@pytest.mark.parametrize("is_native", ENGINES)
def test_gradients_with_many_latents_of_which_few_are_used(certified, is_native):
    # 2,999 latents need three rounds of groups, two of them with ungrouped entries.
    z, weights = make_case(150, 2, 33, 2999, torch.float32)
    with engine(is_native):
        assert_parity(
            z,
            weights,
            1e-5,
            micro_batch_size=64,
            k=3,
            dead_latents=some_dead(2999),
            certified=certified,
        )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("n_layers", [1, 4])
@pytest.mark.parametrize("standardize_inputs", [False, True])
def test_gradients_with_and_without_standardised_inputs(n_layers, standardize_inputs):
    z, weights = make_case(29, n_layers, 13, 57)
    assert_parity(
        z,
        weights,
        1e-10,
        k=4,
        dead_latents=some_dead(57),
        standardize_inputs=standardize_inputs,
    )


def test_duplicated_vectors_and_latents():
    # Equal vectors, and pairs of equal latents; k is even, so both latents of a pair
    # are active.
    z, (W_enc, W_dec, b_dec) = make_case(20, 2, 19, 50)
    z = torch.cat([z, z, z[:1].expand(5, -1, -1)])
    W_enc = torch.cat([W_enc.T, W_enc.T]).T
    W_dec = torch.cat([W_dec, W_dec])
    assert_parity(z, (W_enc, W_dec, b_dec), 1e-10, k=6, dead_latents=some_dead(100))


@pytest.mark.parametrize("layout", ["columns", "strided"])
def test_any_strides_of_the_weights_are_right(layout):
    z, (W_enc, W_dec, b_dec) = make_case()
    if layout == "columns":
        W_enc, W_dec = W_enc.contiguous(), W_dec.T.contiguous().T
    else:
        W_enc = W_enc.repeat_interleave(2, dim=1)[:, ::2]
        W_dec = W_dec.repeat_interleave(2, dim=1)[:, ::2]
    assert_parity(z, (W_enc, W_dec, b_dec), 1e-10, dead_latents=some_dead(101))


@settings(max_examples=25, deadline=None)
@given(
    n_tokens=st.integers(2, 40),
    n_layers=st.integers(1, 3),
    d_in=st.integers(2, 17),
    d_sae=st.integers(1, 150),
    data=st.data(),
)
def test_parity_for_any_sizes(n_tokens, n_layers, d_in, d_sae, data):
    z, weights = make_case(n_tokens, n_layers, d_in, d_sae)
    assert_parity(
        z,
        weights,
        1e-8,
        micro_batch_size=data.draw(st.integers(1, n_layers * n_tokens + 3)),
        k=data.draw(st.integers(1, d_sae)),
        k_aux=data.draw(st.integers(0, d_sae)),
        dead_latents=some_dead(d_sae, data.draw(st.sampled_from([0.0, 0.5, 1.0]))),
        # With two dimensions, standardised vectors are one of two points; their errors
        # may all be 0.
        standardize_inputs=d_in > 2,
    )


@pytest.mark.parametrize("certified", [False, True])
def test_results_do_not_depend_on_the_micro_batch_size(certified):
    dtype = torch.float32 if certified else torch.float64
    z, weights = make_case(dtype=dtype, d_sae=997)
    results = []
    # 37 vectors are one layer, 100 are two layers, 200 all three.
    for size in (1, 10, 37, 100, 200):
        leaves = copies(weights)
        step = training_step(
            z,
            *leaves,
            k=5,
            dead_latents=some_dead(997),
            k_aux=8,
            aux_coefficient=0.3,
            micro_batch_size=size,
            certified=certified,
        )
        values = vars(step) | vars(step.moments)
        values |= {"moments": step.moments.variance}
        results.append([*values.values(), *gradients(leaves)])
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_gradients_are_added_to_existing_gradients():
    z, weights = make_case()
    leaves = copies(weights)
    options = {"k": 3, "dead_latents": some_dead(101), "k_aux": 4}
    for _ in range(2):
        training_step(z, *leaves, aux_coefficient=1.0, micro_batch_size=9, **options)
    twice = [g.clone() for g in gradients(leaves)]
    for leaf in leaves:
        leaf.grad = None
    training_step(z, *leaves, aux_coefficient=1.0, micro_batch_size=9, **options)
    for actual, once in zip(twice, gradients(leaves), strict=True):
        torch.testing.assert_close(actual, 2 * once)


def test_bfloat16_parameters_are_the_float32_numbers_they_stand_for():
    z, weights = make_case(dtype=torch.float32)
    low = copies(tuple(w.bfloat16() for w in weights))  # pyright: ignore[reportArgumentType]
    wide = copies(tuple(w.detach().float() for w in low))  # pyright: ignore[reportArgumentType]
    options = {"k": 3, "dead_latents": some_dead(101), "k_aux": 4}
    for leaves in (low, wide):
        training_step(z, *leaves, aux_coefficient=1.0, micro_batch_size=9, **options)
    for actual, expected in zip(gradients(low), gradients(wide), strict=True):
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual, expected.bfloat16())


@pytest.mark.parametrize("micro_batch_size", [9, 80])
def test_a_transform_maps_the_vectors_of_each_layer_first(micro_batch_size):
    z, weights = make_case()
    scale = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    options = {"k": 3, "dead_latents": some_dead(101), "k_aux": 4}
    before, inside = copies(weights), copies(weights)
    training_step(
        z * scale[:, None] + 1,
        *before,
        aux_coefficient=1.0,
        micro_batch_size=micro_batch_size,
        **options,
    )
    training_step(
        z,
        *inside,
        aux_coefficient=1.0,
        micro_batch_size=micro_batch_size,
        transform=lambda tile, layer: tile * scale[layer] + 1,
        **options,
    )
    for actual, expected in zip(gradients(inside), gradients(before), strict=True):
        torch.testing.assert_close(actual, expected)


def test_input_that_is_not_finite_makes_the_losses_nan():
    z, weights = make_case()
    for bad in (torch.nan, torch.inf):
        z[3, 1, 2] = bad
        step = training_step(
            z,
            *copies(weights),
            k=3,
            dead_latents=some_dead(101),
            k_aux=4,
            aux_coefficient=1.0,
            micro_batch_size=9,
        )
        assert step.loss.isnan()
        assert step.aux_loss.isnan()


def test_loss_and_gradients_are_those_of_the_papers_code():
    # Reference: the reference implementation, step_no_aux (float32).
    data = load_file(PAPER / "topk_step.safetensors")
    z = load_file(PAPER / "activations.safetensors")["resid_post"]
    leaves = copies(
        (
            data["initial.encoder.weight"].T,
            data["initial.decoder.weight"].T,
            data["initial.pre_encoder_bias"],
        )
    )
    step = training_step(
        z.flatten(1, 2).transpose(0, 1),
        *leaves,
        k=4,
        dead_latents=None,
        k_aux=16,
        aux_coefficient=0.0,
        micro_batch_size=100,
    )
    assert step.loss.item() == pytest.approx(1.4939429759979248, rel=1e-6)
    expected = (
        data["no_aux.grad_before.encoder.weight"].T,
        data["no_aux.grad_before.decoder.weight"].T,
        data["no_aux.grad_before.pre_encoder_bias"],
    )
    for actual, gradient in zip(gradients(leaves), expected, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-4, atol=1e-7)


# Statistics


def test_statistics_are_those_of_the_dense_activations():
    # Reference: brute force over the dense activations.
    z, (W_enc, W_dec, b_dec) = make_case()
    step = training_step(
        z,
        *copies((W_enc, W_dec, b_dec)),
        k=3,
        dead_latents=None,
        k_aux=4,
        aux_coefficient=1.0,
        micro_batch_size=9,
    )
    u, mean, std = standardize(z)
    acts = topk_acts((u - b_dec) @ W_enc, 3)
    z_hat = (acts @ W_dec + b_dec) * std + mean
    expected = {
        "sum_sq_error": (z - z_hat).square().sum((0, 2)),
        "n_active": (acts > 0).sum((0, 2)),
        "sum_acts": acts.sum((0, 2)),
        "max_acts": acts.amax((0, 1)),
        "fire_counts": (acts > 0).sum((0, 1)),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(step, name), value)
    variance = z.transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(step.moments.variance, variance)
    deviation = (z - z.mean(0)).square().sum((0, 2))
    torch.testing.assert_close(step.moments.sum_sq_deviation, deviation)


def test_variances_survive_a_large_mean():
    # The mean is 1e4 standard deviations: float32 sums of squares would be useless.
    z, weights = make_case(n_tokens=500, dtype=torch.float32)
    z = z + 1e4
    step = training_step(
        z,
        *copies(weights),
        k=3,
        dead_latents=None,
        k_aux=4,
        aux_coefficient=1.0,
        micro_batch_size=99,
    )
    wide = z.double()
    deviation = (wide - wide.mean(0)).square().sum((0, 2))
    found = step.moments
    torch.testing.assert_close(found.sum_sq_deviation, deviation, rtol=1e-4, atol=0)
    variance = wide.transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(found.variance, variance, rtol=1e-4, atol=0)


def test_a_worked_step_by_hand():
    # Identity weights, k = 1, no standardisation. (2, 0) and (0, 1) are exact; (1, 3)
    # loses its first entry, 1. Entries 2 0 0 1 1 3: sum of squares 15, sum 7.
    z = torch.tensor([[[2.0, 0.0]], [[0.0, 1.0]], [[1.0, 3.0]]])
    leaves = copies((torch.eye(2), torch.eye(2), torch.zeros(2)))
    step = training_step(
        z,
        *leaves,
        k=1,
        dead_latents=None,
        k_aux=1,
        aux_coefficient=1.0,
        micro_batch_size=2,
        standardize_inputs=False,
    )
    variance = (15 - 7**2 / 6) / 5
    assert step.mse_loss.item() == pytest.approx(1 / 6 / variance)
    assert step.sum_sq_error.tolist() == [1]
    assert step.fire_counts.tolist() == [1, 2]
    assert step.max_acts.tolist() == [2, 3]
    assert step.sum_acts.tolist() == [6]
    # dL/dz_hat = 2 / (6 variance) (-1, 0) for the last token, whose latent 1 was 3
    slope = 2 / (6 * variance)
    W_enc, W_dec, b_dec = gradients(leaves)
    torch.testing.assert_close(W_dec, torch.tensor([[0.0, 0.0], [-3 * slope, 0.0]]))
    torch.testing.assert_close(W_enc, torch.zeros(2, 2))
    torch.testing.assert_close(b_dec, torch.tensor([-slope, 0.0]))


# Selection


@settings(max_examples=60, deadline=None)
@given(
    n_acts=st.integers(1, 5),
    n_latents=st.integers(1, 700),
    levels=st.sampled_from([2, 5, 10**6]),
    data=st.data(),
)
def test_exact_topk_is_topk_as_sets_of_values(n_acts, n_latents, levels, data):
    # Few levels give many ties.
    k = data.draw(st.integers(1, min(n_latents, 40)))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    h = torch.randint(-levels, levels, (n_acts, n_latents), generator=g).float()
    values, indices = exact_topk(h, k)
    expected = h.topk(k, dim=1).values
    torch.testing.assert_close(values.sort(descending=True).values, expected)
    torch.testing.assert_close(h.gather(1, indices), values)
    assert all(len(set(row.tolist())) == k for row in indices)


@settings(max_examples=60, deadline=None)
@given(
    n_acts=st.integers(1, 5),
    n_latents=st.integers(1, 700),
    levels=st.sampled_from([2, 5, 10**6]),
    shift=st.sampled_from([-1.0, -0.9, 0.0]),
    data=st.data(),
)
@requires_kernel
def test_the_kernels_topk_is_that_of_positive_entries(
    n_acts, n_latents, levels, shift, data
):
    # Reference: torch.topk. A negative shift leaves few or no entries above 0.
    k = data.draw(st.integers(1, n_latents))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    h = torch.randint(-levels, levels, (n_acts, 2 * n_latents), generator=g).float()
    h = (h + shift * levels)[:, :n_latents]  # rows with gaps in memory
    values, indices = native.largest_positive(h, k)
    expected = h.topk(k, dim=1).values.relu()
    torch.testing.assert_close(values.sort(descending=True).values, expected)
    torch.testing.assert_close(h.gather(1, indices).relu(), values)
    assert all(len(set(row.tolist())) == k for row in indices)


@requires_kernel
def test_the_kernel_counts_more_entries_than_its_counters_hold():
    h = torch.ones(2, 200_000)
    h[1, 150_000:] = 2
    values, indices = native.largest_positive(h, 100_000)
    assert values.sum(1).tolist() == [100_000, 150_000]
    assert all(len(row.unique()) == 100_000 for row in indices)


@requires_kernel
def test_the_kernel_rounds_as_torch_does():
    # Ties to even, NaN, infinity and subnormal numbers.
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1e-40, 3.4e38])
    special = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0])
    x = torch.cat([torch.randn(501), ties, special]).view(4, 128)
    rounded, norms, errors = native.round_rows(x)
    torch.testing.assert_close(rounded, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(norms[:3], x[:3].norm(dim=1))
    torch.testing.assert_close(errors[:3], (x - x.bfloat16())[:3].norm(dim=1))
    assert norms[3].isnan()


@requires_kernel
def test_the_kernel_rejects_other_dtypes_and_strides():
    for h in (torch.randn(4, 6).T, torch.randn(4, 6).double()):
        with pytest.raises(ValueError, match="The kernel needs contiguous"):
            native.largest_positive(h, 2)


@pytest.fixture
def reload_kernel() -> Iterator[None]:
    """Unload the kernel before and after a test."""
    native._kernel.cache_clear()
    yield
    native._kernel.cache_clear()


@pytest.mark.usefixtures("reload_kernel")
@pytest.mark.parametrize("compiler", ["/no/such/compiler", "false"])
def test_without_a_compiler_everything_works(compiler, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    h = torch.randn(3, 100)
    torch.testing.assert_close(select_topk(h, 3)[0].sum(1), h.topk(3)[0].sum(1))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert list(tmp_path.rglob("*.so")) == []


@requires_kernel
@pytest.mark.usefixtures("reload_kernel")
def test_without_a_home_folder_everything_works(monkeypatch, caplog):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("no home")))
    assert not native.is_available(torch.empty(0))
    assert "no home" in caplog.text


@pytest.fixture
def sound(reload_kernel) -> Path:
    """The library in the user's cache."""
    compiler = native._compiler()
    assert compiler is not None
    return native._compiled(compiler)


@pytest.fixture
def use_compiler(sound, monkeypatch, tmp_path):
    """Make a compiler that copies a library, and an empty cache for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def use(library: Path) -> str:
        compiler = tmp_path / "compiler"
        compiler.write_text(f'#!/bin/bash\ncp {library} "${{@: -1}}"\n')
        compiler.chmod(0o700)
        monkeypatch.setenv("CXX", str(compiler))
        return str(compiler)

    return use


def small_library(folder: Path, code: str) -> Path:
    (folder / "small.cpp").write_text(f'extern "C" {{ {code} }}')
    command = [
        str(native._compiler()),
        "-shared",
        "-fPIC",
        "small.cpp",
        "-o",
        "small.so",
    ]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "small.so"


@requires_kernel
def test_only_the_library_that_was_compiled_is_loaded(sound, use_compiler, tmp_path):
    other = small_library(tmp_path, "").read_bytes()
    library = native._compiled(use_compiler(sound))
    torn = library.read_bytes()[: library.stat().st_size // 2]
    for damaged in (b"", b"text", torn, other, None):
        if damaged is None:
            library.with_suffix(".sha256").write_bytes(b"\xff")
        else:
            library.unlink()  # the loaded file must not change
            library.write_bytes(damaged)
            library.chmod(0o700)
        native._kernel.cache_clear()
        assert native.is_available(torch.empty(0)), damaged
        assert library.read_bytes() == sound.read_bytes()


@requires_kernel
def test_a_library_that_others_can_change_is_not_loaded(
    sound, use_compiler, monkeypatch, caplog
):
    library = native._compiled(use_compiler(sound))
    owner = os.getuid()
    for path, mode, user in [
        (library, 0o770, owner),
        (library.parent, 0o777, owner),
        (library, 0o700, owner + 1),
    ]:
        library.chmod(0o700)
        library.parent.chmod(0o700)
        path.chmod(mode)
        monkeypatch.setattr(os, "getuid", Mock(return_value=user))
        native._kernel.cache_clear()
        caplog.clear()
        assert not native.is_available(torch.empty(0))
        assert str(library.parent) in caplog.text


@requires_kernel
@pytest.mark.parametrize("code", ["", "void largest_positive() {}"])
def test_a_compiled_library_that_does_not_work_is_not_used(
    code, use_compiler, tmp_path, caplog
):
    use_compiler(small_library(tmp_path, code))
    h = torch.randn(3, 100)
    torch.testing.assert_close(select_topk(h, 3)[0].sum(1), h.topk(3)[0].sum(1))
    assert "using PyTorch" in caplog.text


@pytest.mark.parametrize("certified", [False, True])
def test_vectors_in_any_order_of_memory(certified):
    z, (W_enc, _, b_dec) = make_case(300, 2, 16, 600, torch.float32)
    expected = encode_topk(z, W_enc, b_dec, 3, certified=certified)
    strided = z.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    for standardize_inputs in (False, True):
        acts = encode_topk(
            strided,
            W_enc,
            b_dec,
            3,
            certified=certified,
            standardize_inputs=standardize_inputs,
        )
    torch.testing.assert_close(acts.values.sum(-1), expected.values.sum(-1))


@pytest.mark.parametrize("certify", CERTIFY)
def test_numbers_whose_squares_vanish_prove_nothing(certify):
    rows, v = 1e-20 * torch.randn(1024, 64), 1e-20 * torch.randn(100, 64)
    h, errors = CertifiedEncoder(rows, 4, max_rows=100)._approximate(v)
    assert not certify(h, errors, v, rows, 4)[2].any()


def dense_acts(acts: TopKActs, d_sae: int) -> Tensor:
    flat = acts.values.flatten(0, -2)
    zeros = flat.new_zeros(len(flat), d_sae)
    return zeros.scatter_(1, acts.indices.flatten(0, -2), flat)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 20),
    scale=st.sampled_from([1e-20, 1.0, 1e10]),
    spread=st.sampled_from([0.0, 0.01, 3.0]),
    is_native=st.booleans(),
)
def test_certified_selection_is_the_float32_selection(
    seed, k, scale, spread, is_native
):
    # For rows of very different norms and for similar vectors nothing can be proven, so
    # all need the float32 product; other cases need none.
    z, (W_enc, _, b_dec) = make_case(40, 1, 24, 600, torch.float32, seed)
    z = z[0] + spread * (z[:, 0] - z[0])
    W_enc = W_enc * scale
    exact = encode_topk(z, W_enc, b_dec, k, certified=False)
    with engine(is_native):
        certified = encode_topk(z, W_enc, b_dec, k, certified=True)
    torch.testing.assert_close(
        dense_acts(certified, 600), dense_acts(exact, 600), rtol=1e-4, atol=1e-5 * scale
    )


@pytest.mark.parametrize("certify", CERTIFY)
def test_every_certified_row_is_right_and_most_are_certified(certify):
    # Reference: float64. No wrong row may be proven.
    z, (W_enc, _, _) = make_case(400, 1, 64, 4096, torch.float32)
    v, rows = standardize(z[:, 0])[0], W_enc.T.contiguous()
    h, errors = CertifiedEncoder(rows, 16, max_rows=400)._approximate(v)
    values, indices, proven = certify(h, errors, v, rows, 16)
    products = v.double() @ rows.double().T
    expected = products.topk(16, dim=1).values
    right = products.gather(1, indices).amin(1) >= expected[:, -1] - 1e-4
    assert right[proven].all()
    torch.testing.assert_close(
        values[proven].double(), products.gather(1, indices)[proven], rtol=1e-4, atol=0
    )
    assert proven.float().mean() > 0.9


@pytest.mark.parametrize("certify", CERTIFY)
def test_rows_that_bfloat16_gets_wrong_are_not_certified(certify):
    # Large terms of the products cancel, so rounding errors exceed the result.
    signs = torch.ones(64)
    signs[::2] = -1
    rows, v = 0.05 * torch.randn(1024, 64) + 20 * signs, torch.randn(100, 64) + 20
    encoder = CertifiedEncoder(rows, 4, max_rows=100)
    h, errors = encoder._approximate(v)
    products = (v.double() @ rows.double().T).relu()
    expected = products.topk(4, dim=1).values
    naive = products.gather(1, h.topk(4, dim=1).indices)
    assert (naive.sum(1) < expected.sum(1) - 0.01).any()
    values, _, proven = certify(h, errors, v, rows, 4)
    assert not proven.all()
    right = (values.relu().sum(1) - expected.sum(1)).abs() < 1e-3
    assert right[proven].all()
    values = encoder(v).values.sort(descending=True).values.relu()
    torch.testing.assert_close(values, expected.float(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("certify", CERTIFY)
@pytest.mark.parametrize("share", [1.0, 0.9])
def test_an_entry_that_rounding_hides_is_found_or_not_proven(certify, share):
    # Large entries cancel and their rounding errors add up: upwards in the first
    # latent, downwards in the second, which is larger by a fraction of one rounding
    # error.
    half_a_step = 0.99 * 2**-8
    up, down = torch.full((2, 64), 1.5)
    down[:32] += half_a_step
    down[32:] -= half_a_step
    up[:32] += 2**-7 - half_a_step * share
    up[32:] -= 2**-7 - half_a_step * share
    up[0] -= 2**-5 + 64 * 2**-7 - 64 * half_a_step * (1 + share)
    signs = torch.ones(64)
    signs[32:] = -1
    rows = torch.zeros(64, 64)
    rows[0], rows[1] = up * signs, down * signs
    rows[:2, 0] += 1
    v = torch.ones(1, 64)
    h, errors = CertifiedEncoder(rows, 1, max_rows=1)._approximate(v)
    exact = (v @ rows.T)[0]
    assert exact[1] > exact[0]
    assert h[0, 0] > h[0, 1] > 0
    _, indices, proven = certify(h, errors, v, rows, 1)
    assert indices.item() == 1 or not proven.item()


@pytest.mark.parametrize("is_native", ENGINES)
@pytest.mark.parametrize("rounded", ["vectors", "weights", "both"])
def test_the_error_bound_holds_where_it_is_tight(rounded, is_native):
    # All rounding errors have the same sign, so no smaller bound is correct.
    exact, inexact = torch.ones(3, 64), torch.full((3, 64), 1 + 0.99 * 2**-8)
    v = exact if rounded == "weights" else inexact
    rows = exact if rounded == "vectors" else inexact
    with engine(is_native):
        _, bound = CertifiedEncoder(rows, 1, max_rows=3)._approximate(v)
    product = v.bfloat16().double() @ rows.bfloat16().double().T
    error = (product - v.double() @ rows.double().T).abs().amax(1)
    assert (error <= bound).all()
    assert (bound < 1.02 * error).all()


@pytest.mark.parametrize("is_native", ENGINES)
def test_rows_without_proof_are_computed_in_float32(is_native, monkeypatch):
    # Latents differ by less than bfloat16 resolves: nothing can be proven.
    monkeypatch.setattr(select, "_UNPROVEN_ROWS", 2)
    v = torch.randn(5, 8)
    rows = torch.randn(1, 8) + 1e-5 * torch.randn(200, 8)
    with engine(is_native):
        encoder = CertifiedEncoder(rows, 3, max_rows=5)
        selection = encoder(v.abs() * rows[0].sign())
        assert encoder.n_unproven == 5
        expected = Encoder(rows, 3, max_rows=5)(v.abs() * rows[0].sign())
    torch.testing.assert_close(
        selection.values.sort().values, expected.values.sort().values, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("certified", [False, True])
def test_a_step_counts_the_rows_without_proof(certified):
    z, (W_enc, W_dec, b_dec) = make_case(6, 2, 8, 200, torch.float32)
    W_enc = W_enc[:, :1] + 1e-5 * W_enc
    step = training_step(
        z,
        *copies((W_enc, W_dec, b_dec)),
        k=3,
        dead_latents=None,
        k_aux=0,
        aux_coefficient=0.0,
        micro_batch_size=5,
        certified=certified,
    )
    assert step.n_unproven.item() == (12 if certified else 0)


@pytest.mark.parametrize("is_native", ENGINES)
@pytest.mark.parametrize("certified", [False, True])
def test_a_step_ignores_the_default_device(certified, is_native):
    z, weights = make_case(20, 2, 8, 200, torch.float32)
    dead = torch.arange(200) < 90
    options = {"k": 3, "dead_latents": dead, "k_aux": 5, "aux_coefficient": 0.1}
    found, expected = copies(weights), copies(weights)
    with engine(is_native):
        rest = {"micro_batch_size": 7, "certified": certified}
        training_step(z, *expected, **options, **rest)
        with torch.device("meta"):
            training_step(z, *found, **options, **rest)
    for one, other in zip(gradients(found), gradients(expected), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("is_native", ENGINES)
@pytest.mark.parametrize("kind", [Encoder, CertifiedEncoder])
@pytest.mark.parametrize("nan", [torch.nan, -torch.nan])
def test_selection_keeps_nan(kind, nan, is_native):
    v, rows = torch.randn(5, 8), torch.randn(64, 8)
    v[2, 0] = nan
    with engine(is_native):
        selection = kind(rows, 3, max_rows=5)(v)
    assert selection.values.isnan().any(1).tolist() == [i == 2 for i in range(5)]
    rows[40, 1] = nan
    v[2, 0] = 0
    with engine(is_native):
        selection = kind(rows, 3, max_rows=5)(v)
    assert selection.values.isnan().any(1).all()


@pytest.mark.parametrize(("d_in", "expected"), [(2**13, True), (2**13 + 1, False)])
def test_wide_vectors_are_not_certified_by_default(d_in, expected, monkeypatch):
    # Authority: measured, most rows of wider vectors are not proven.
    monkeypatch.setattr(select, "cpu_has_bfloat16", lambda: True)
    encoder = make_encoder(torch.randn(64, d_in), 2, n_acts=256, certified=None)
    assert isinstance(encoder, CertifiedEncoder) == expected


def test_certified_float64_is_an_error():
    z, (W_enc, _, b_dec) = make_case()
    with pytest.raises(ValueError, match=r"`certified=True` .* got float64"):
        encode_topk(z, W_enc, b_dec, 3, certified=True)


@pytest.mark.parametrize("k", [0, 102])
def test_impossible_k_is_an_error(k):
    z, (W_enc, _, b_dec) = make_case()
    with pytest.raises(ValueError, match=rf"`k` must be in \[1, d_sae=101\]; got {k}"):
        encode_topk(z, W_enc, b_dec, k)


# Products


@pytest.mark.usefixtures("poisoned")
def test_products_of_other_devices_and_builds_are_the_same(monkeypatch):
    # Runs the code for CUDA and for CPUs without MKL on this CPU.
    z, weights = make_case()
    monkeypatch.setattr(products, "row_dots", products.gathered_row_dots)
    monkeypatch.setattr(products, "_GATHER_ELEMENTS", 500)
    monkeypatch.setattr(products, "has_sparse_products", lambda x: False)
    assert_parity(z, weights, 1e-10, dead_latents=some_dead(101))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("share", [1, 10**6])
def test_dense_and_sparse_auxiliary_activations_agree(monkeypatch, share):
    monkeypatch.setattr(products, "_DENSE_SHARE", share)
    z, weights = make_case()
    assert_parity(z, weights, 1e-10, dead_latents=some_dead(101), k_aux=3)


def test_at_most_one_block_of_pre_activations_is_held(monkeypatch):
    # The block is the only tensor with d_sae columns, and is allocated once.
    monkeypatch.setitem(select._BLOCK_ELEMENTS, "cpu", 0)
    monkeypatch.setattr(select, "_MIN_BLOCK_ROWS", 64)
    sizes = []
    original = Tensor.new_empty

    def record(self, *size, **kwargs):
        sizes.append(size)
        return original(self, *size, **kwargs)

    monkeypatch.setattr(Tensor, "new_empty", record)
    z, (W_enc, _, b_dec) = make_case(300, 2, 8, 5000, torch.float32)
    encode_topk(z, W_enc, b_dec, 3, certified=False)
    assert [size for size in sizes if size[-1] > 3] == [(64, 5000)]


@pytest.mark.usefixtures("poisoned")
def test_blocks_change_nothing(monkeypatch):
    monkeypatch.setitem(select._BLOCK_ELEMENTS, "cpu", 0)
    monkeypatch.setattr(select, "_MIN_BLOCK_ROWS", 3)
    z, weights = make_case()
    assert_parity(z, weights, 1e-10, dead_latents=some_dead(101), k_aux=3)


@pytest.mark.parametrize("certified", [False, True])
@pytest.mark.parametrize("is_native", ENGINES)
def test_pre_activations_of_dead_latents_count_towards_the_micro_batch(
    monkeypatch, certified, is_native
):
    z, weights = make_case(120, 1, 8, 5000, torch.float32)
    dead = some_dead(5000)
    n_dead = int(dead.sum())
    sizes = {"new_empty": 0, "index_select": 0, "__matmul__": 0}
    for name in sizes:
        original = getattr(Tensor, name)

        def record(*args, name=name, original=original, **kwargs):
            out = original(*args, **kwargs)
            if out.shape[-1] in (5000, n_dead):
                sizes[name] = max(sizes[name], out.numel())
            return out

        monkeypatch.setattr(Tensor, name, record)
    with engine(is_native):
        training_step(
            z,
            *copies(weights),
            k=3,
            dead_latents=dead,
            k_aux=4,
            aux_coefficient=1.0,
            micro_batch_size=50,
            certified=certified,
        )
    assert sizes["new_empty"] % 5000 == 0
    assert 25 * 5000 < sum(sizes.values()) <= 50 * 5000


# Inference


def test_encode_and_decode_are_those_of_the_papers_code():
    # Reference: the reference implementation, MLSAE.forward (float32).
    data = load_file(PAPER / "plain.safetensors")
    n_prompts, b_dec = data["recons"].shape[1], data["pre_encoder_bias"]
    z = load_file(PAPER / "activations.safetensors")["resid_post"][:, :n_prompts]
    acts = encode_topk(z, data["encoder.weight"].T, b_dec, 8)
    assert acts.values.shape == data["topk_values"].shape
    torch.testing.assert_close(
        acts.values.sort().values,
        data["topk_values"].sort().values,
        rtol=1e-4,
        atol=1e-5,
    )
    torch.testing.assert_close(acts.mean, data["stats_mean"])
    torch.testing.assert_close(acts.std, data["stats_std"])
    z_hat = decode_topk(acts, data["decoder.weight"].T, b_dec)
    torch.testing.assert_close(z_hat, data["recons"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [(), (5,), (2, 3, 4)])
@pytest.mark.parametrize("standardize_inputs", [False, True])
def test_encode_and_decode_keep_the_shape_of_the_batch(batch, standardize_inputs):
    _, (W_enc, W_dec, b_dec) = make_case()
    z = torch.randn(*batch, 19, dtype=torch.float64)
    acts = encode_topk(z, W_enc, b_dec, 5, standardize_inputs=standardize_inputs)
    u, mean, std = standardize(z) if standardize_inputs else (z, 0, 1)
    expected = topk_acts((u - b_dec) @ W_enc, 5)
    assert acts.indices.shape == (*batch, 5)
    assert acts.indices.dtype == torch.int64
    dense = torch.zeros_like(expected).scatter_(-1, acts.indices, acts.values)
    torch.testing.assert_close(dense, expected)
    z_hat = (expected @ W_dec + b_dec) * std + mean
    torch.testing.assert_close(decode_topk(acts, W_dec, b_dec), z_hat)


def test_no_vectors_give_no_activations():
    _, (W_enc, W_dec, b_dec) = make_case()
    acts = encode_topk(torch.empty(0, 3, 19, dtype=torch.float64), W_enc, b_dec, 5)
    assert acts.values.shape == acts.indices.shape == (0, 3, 5)
    assert decode_topk(acts, W_dec, b_dec).shape == (0, 3, 19)


def test_encode_takes_vectors_of_another_dtype_than_the_weights():
    z, (W_enc, W_dec, b_dec) = make_case(dtype=torch.float32)
    low = z.bfloat16()
    acts = encode_topk(low, W_enc, b_dec, 5)
    expected = encode_topk(low.float(), W_enc, b_dec, 5)
    assert acts.values.dtype == torch.float32
    torch.testing.assert_close(acts.values, expected.values)
    assert decode_topk(acts, W_dec, b_dec).dtype == torch.float32
    all_low = encode_topk(low, W_enc.bfloat16(), b_dec.bfloat16(), 5)
    assert all_low.values.dtype == torch.bfloat16
    z_hat = decode_topk(all_low, W_dec.bfloat16(), b_dec.bfloat16())
    assert z_hat.dtype == torch.bfloat16
