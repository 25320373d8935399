"""The update of the weights: one pass in C++ and separate passes of PyTorch."""

from pathlib import Path

import pytest
import torch
from engines import ENGINES, engine, requires_kernel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from sae_lens_multilayer.topk import native
from sae_lens_multilayer.topk.update import (
    normalize_decoder,
    project_decoder_gradient,
    update_weights,
)

PAPER = Path(__file__).parent / "data" / "paper"
# A smaller eps would divide the rounding of a gradient near 0 by a number near 0.
LEARNING_RATE, BETAS, EPS = 1e-2, (0.9, 0.99), 0.1


class Case:
    """Weights of one SAE, a router that is updated too, and Adam."""

    def __init__(self, d_sae: int, d_in: int, dtype=torch.float32, **options) -> None:
        g = torch.Generator().manual_seed(0)
        of_latents = torch.randn(2, d_sae, d_in, generator=g).to(dtype)
        self.W_enc = nn.Parameter(of_latents[0].T)
        self.W_dec = nn.Parameter(of_latents[1].contiguous())
        self.router = nn.Parameter(torch.randn(3, d_in, generator=g).to(dtype))
        normalize_decoder(self.W_dec)
        self.all = [self.W_enc, self.W_dec, self.router]
        options = {"lr": LEARNING_RATE, "betas": BETAS, "eps": EPS, **options}
        self.optimizer: torch.optim.Optimizer
        self.optimizer = torch.optim.Adam(self.all, **options)

    def add_gradients(self, seed: int) -> None:
        """As a training step does."""
        g = torch.Generator().manual_seed(seed)
        for p in self.all:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            p.grad += torch.randn(p.shape, generator=g).to(p.dtype)

    def update(self, n_steps: int) -> None:
        for seed in range(n_steps):
            self.add_gradients(seed)
            update_weights(self.optimizer, self.W_enc, self.W_dec)

    def numbers(self) -> list[Tensor]:
        """Weights and the optimiser's state."""
        state = [t for p in self.all for t in self.optimizer.state[p].values()]
        return [*(p.detach() for p in self.all), *state]


def adam_by_definition(case: Case, n_steps: int) -> list[Tensor]:
    """Weights in float64 after some steps, from equations 1 to 4 of Adam's paper."""
    weights = [p.detach().double() for p in case.all]
    averages = [torch.zeros_like(w) for w in weights]
    squares = [torch.zeros_like(w) for w in weights]
    gradients = Case(case.W_dec.shape[0], case.W_dec.shape[1])
    for step in range(1, n_steps + 1):
        gradients.optimizer.zero_grad()
        gradients.add_gradients(step - 1)
        for w, m, v, p in zip(weights, averages, squares, gradients.all, strict=True):
            assert p.grad is not None
            g = p.grad.double()
            if p is gradients.W_dec:
                g = g - (g * w).sum(1, keepdim=True) * w
            m += (1 - BETAS[0]) * (g - m)
            v += (1 - BETAS[1]) * (g**2 - v)
            m_hat, v_hat = m / (1 - BETAS[0] ** step), v / (1 - BETAS[1] ** step)
            w -= LEARNING_RATE * m_hat / (v_hat.sqrt() + EPS)
            if p is gradients.W_dec:
                w /= w.norm(dim=1, keepdim=True)
    return weights


@pytest.mark.parametrize("is_native", ENGINES)
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (40, 33), (65, 128)])
def test_the_update_is_that_of_the_definition(is_native, size):
    # Authority: brute force in float64.
    case = Case(*size)
    expected = adam_by_definition(case, 4)
    with engine(is_native):
        case.update(4)
    for p, wanted in zip(case.all, expected, strict=True):
        torch.testing.assert_close(p.detach().double(), wanted, rtol=2e-6, atol=2e-6)
        assert p.grad is not None
        assert not p.grad.any()


@requires_kernel
@settings(max_examples=40, deadline=None)
@given(d_sae=st.integers(1, 70), d_in=st.integers(1, 90))
def test_one_pass_is_equal_to_separate_passes(d_sae, d_in):
    fused, separate = Case(d_sae, d_in), Case(d_sae, d_in)
    with engine(True):
        fused.update(3)
    with engine(False):
        separate.update(3)
    for one, other in zip(fused.numbers(), separate.numbers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


@requires_kernel
def test_the_number_of_threads_changes_no_bit():
    found = []
    for n_threads in (1, 2, 3):
        case = Case(333, 50)
        with engine(True, n_threads):
            case.update(3)
        found.append(case.numbers())
    for one, two, three in zip(*found, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def calls_of_kernel(case: Case) -> int:
    """How often the second update of a case calls the kernel."""
    calls = []
    case.update(1)
    with pytest.MonkeyPatch.context() as patch:
        original = native.call
        patch.setattr(native, "call", lambda *a: (calls.append(a), original(*a)))
        case.update(1)
    return len(calls)


@requires_kernel
def test_one_pass_is_taken_whenever_the_kernel_can():
    assert calls_of_kernel(Case(9, 4)) == 2
    assert calls_of_kernel(Case(9, 4, torch.float64)) == 0
    assert calls_of_kernel(Case(9, 4, weight_decay=0.1)) == 0
    assert calls_of_kernel(Case(9, 4, amsgrad=True)) == 0
    strided = Case(9, 4)
    strided.W_enc.data = strided.W_enc.data.contiguous()
    strided.W_enc.grad = torch.zeros_like(strided.W_enc)
    assert calls_of_kernel(strided) == 0


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.NAdam, {"eps": EPS}),
        (torch.optim.RAdam, {"eps": EPS}),
        (torch.optim.AdamW, {"eps": EPS, "weight_decay": 0.0}),
    ],
)
def test_other_optimizers_take_their_own_step(kind, options):
    # Authority: torch's step between projection and unit norm.
    found, expected = Case(9, 4), Case(9, 4)
    for case in (found, expected):
        case.optimizer = kind(case.all, lr=LEARNING_RATE, **options)
    found.update(3)
    for seed in range(3):
        expected.optimizer.zero_grad()
        expected.add_gradients(seed)
        project_decoder_gradient(expected.W_dec)
        expected.optimizer.step()
        normalize_decoder(expected.W_dec)
    for one, other in zip(found.numbers(), expected.numbers(), strict=True):
        assert torch.equal(one, other)


def test_groups_of_parameters_have_their_own_rates():
    one_group, groups = Case(9, 4), Case(9, 4)
    shared = {"betas": BETAS, "eps": EPS}
    of_groups = [{"params": groups.all[:2], "lr": LEARNING_RATE}]
    of_groups.append({"params": groups.all[2:], "lr": 0.0})
    groups.optimizer = torch.optim.Adam(of_groups, **shared)
    before = groups.router.detach().clone()
    for case in (one_group, groups):
        case.update(3)
    for one, other in zip(one_group.all[:2], groups.all[:2], strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-5, atol=2e-6)
    assert torch.equal(groups.router, before)


@requires_kernel
def test_weights_laid_out_otherwise_are_updated_alike():
    expected, strided = Case(9, 4), Case(9, 4)
    strided.W_enc.data = strided.W_enc.data.contiguous()
    strided.W_dec.data = strided.W_dec.data.T.contiguous().T
    for case in (expected, strided):
        case.update(3)
    for one, other in zip(expected.all, strided.all, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("is_native", ENGINES)
def test_other_weights_without_a_gradient_stay(is_native):
    case = Case(6, 5)
    with engine(is_native):
        case.update(1)
        before = case.router.detach().clone()
        case.add_gradients(1)
        case.router.grad = None
        update_weights(case.optimizer, case.W_enc, case.W_dec)
    assert torch.equal(case.router, before)


@pytest.mark.parametrize("is_native", ENGINES)
def test_the_update_is_noticed_by_autograd(is_native):
    case = Case(6, 5)
    with engine(is_native):
        case.update(1)
        product = (case.W_dec * case.W_dec).sum()
        case.update(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


# The decoder's norm


def test_unit_norm_and_projection_are_those_of_the_papers_code():
    # Reference: the reference's on_after_backward (float32): norm first, then gradient.
    data = load_file(PAPER / "topk_step.safetensors")
    W_dec = data["initial.decoder.weight"].T.contiguous().requires_grad_()
    W_dec.grad = data["auxk_active.grad_before.decoder.weight"].T.contiguous()
    normalize_decoder(W_dec)
    project_decoder_gradient(W_dec)
    torch.testing.assert_close(
        W_dec.detach(), data["auxk_active.decoder.weight_after_unit_norm"].T
    )
    torch.testing.assert_close(
        W_dec.grad, data["auxk_active.grad_after.decoder.weight"].T
    )


def test_a_decoder_row_of_zeros_stays_zero():
    W_dec = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    normalize_decoder(W_dec)
    torch.testing.assert_close(W_dec, torch.tensor([[0.0, 0.0], [0.6, 0.8]]))


@pytest.mark.parametrize("is_native", ENGINES)
def test_a_decoder_row_of_zeros_without_gradient_stays_zero_in_an_update(is_native):
    case = Case(5, 4)
    case.W_dec.data[2] = 0
    for seed in range(3):
        case.add_gradients(seed)
        assert case.W_dec.grad is not None
        case.W_dec.grad[2] = 0
        with engine(is_native):
            update_weights(case.optimizer, case.W_enc, case.W_dec)
    assert not case.W_dec[2].any()
    torch.testing.assert_close(case.W_dec[3].norm().item(), 1.0)


def test_projection_without_a_gradient_does_nothing():
    W_dec = torch.eye(2)
    project_decoder_gradient(W_dec)
    assert W_dec.grad is None
