"""The dense definition: worked cases, and numbers of the paper's own code."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sae_lens_multilayer.topk.reference import (
    TopKLosses,
    standardize,
    topk_acts,
    training_loss,
)

PAPER = Path(__file__).parent / "data" / "paper"


def loss_of(z: Tensor, weights: tuple[Tensor, Tensor, Tensor], **changes) -> TopKLosses:
    settings = {"k": 1, "dead_latents": None, "k_aux": 1, "aux_coefficient": 0.5}
    return training_loss(z, *weights, **{**settings, **changes})


def paper_step() -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
    data = load_file(PAPER / "topk_step.safetensors")
    z = load_file(PAPER / "activations.safetensors")["resid_post"]
    weights = (
        data["initial.encoder.weight"].T.requires_grad_(),
        data["initial.decoder.weight"].T.requires_grad_(),
        data["initial.pre_encoder_bias"].requires_grad_(),
    )
    return z.flatten(1, 2).transpose(0, 1), weights, data


def test_standardize_divides_by_the_unbiased_deviation_plus_epsilon():
    u, mean, std = standardize(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))
    assert mean.flatten().tolist() == [2, 5]
    torch.testing.assert_close(std.flatten(), torch.tensor([2**0.5, 0.0]))
    scale = 1 / (2**0.5 + 1e-5)
    torch.testing.assert_close(u, torch.tensor([[-scale, scale], [0.0, 0.0]]))


def test_a_worked_case_by_hand():
    # One layer, identity weights, k = 1: (2, 0) and (0, 1) are reconstructed exactly,
    # of (1, 1) one entry is missing, so the squared errors sum to 1 over 6 entries.
    # These are 2 0 0 1 1 1: sum 5, sum of squares 7.
    z = torch.tensor([[[2.0, 0.0]], [[0.0, 1.0]], [[1.0, 1.0]]])
    eye = torch.eye(2)
    losses = loss_of(z, (eye, eye, torch.zeros(2)), standardize_inputs=False)
    variance = (7 - 5**2 / 6) / 5
    assert losses.mse_loss.item() == pytest.approx((1 / 6) / variance)
    assert losses.aux_loss.item() == 0
    assert losses.loss.item() == losses.mse_loss.item()


@pytest.mark.parametrize("k_aux", [1, 5])
@pytest.mark.parametrize(("row", "squared_error"), [(0.5, 0.0), (1.0, 0.3125)])
def test_aux_loss_of_a_worked_case_by_hand(k_aux, row, squared_error):
    # Of (3, 0.5) and (4, 0.25) the first entries are reconstructed by latent 0, which
    # leaves e = (0, 0.5), (0, 0.25). The pre-activations of the dead latent are 1 and
    # 0.5, so with the row (0, 0.5) it reconstructs e exactly, with (0, 1) twice of it.
    W_enc = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 2.0]])
    W_dec = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, row]])
    z = torch.tensor([[[3.0, 0.5]], [[4.0, 0.25]]])
    losses = loss_of(
        z,
        (W_enc, W_dec, torch.zeros(2)),
        dead_latents=torch.tensor([False, False, True]),
        k_aux=k_aux,
        standardize_inputs=False,
    )
    variance = (0.3125 - 0.75**2 / 4) / 3
    assert losses.aux_loss.item() == pytest.approx(squared_error / 4 / variance)
    expected = losses.mse_loss.item() + 0.5 * losses.aux_loss.item()
    assert losses.loss.item() == pytest.approx(expected)


def test_k_equal_to_d_sae_is_a_relu():
    h = torch.randn(3, 2, 7)
    torch.testing.assert_close(topk_acts(h, 7), h.relu())


def test_fewer_positive_entries_than_k_leave_fewer_activations():
    assert topk_acts(torch.tensor([-1.0, 2.0, -3.0]), 2).tolist() == [0, 2, 0]


def test_no_dead_latent_and_none_given_are_the_same():
    z, weights, _ = paper_step()
    none = loss_of(z, weights, k=4, dead_latents=None)
    all_alive = loss_of(
        z, weights, k=4, dead_latents=torch.zeros(128, dtype=torch.bool)
    )
    assert none.aux_loss.item() == all_alive.aux_loss.item() == 0
    assert none.loss.item() == all_alive.loss.item()


def test_residual_gets_no_gradient_from_the_auxiliary_loss():
    # Only the dead latent's weights and, through its encoder, the bias have a gradient.
    z, weights, _ = paper_step()
    dead = torch.zeros(128, dtype=torch.bool)
    dead[5] = True
    loss_of(z, weights, k=4, dead_latents=dead).aux_loss.backward()
    W_enc, W_dec, b_dec = (w.grad for w in weights)
    assert W_enc is not None
    assert W_dec is not None
    assert b_dec is not None
    assert W_dec[~dead].abs().max() == 0
    assert W_enc[:, ~dead].abs().max() == 0
    assert W_dec[dead].abs().max() > 0
    assert b_dec.abs().max() > 0


def test_loss_and_gradients_are_those_of_the_papers_code():
    # Reference: the reference implementation, step_no_aux (float32).
    z, weights, data = paper_step()
    losses = loss_of(z, weights, k=4)
    losses.loss.backward()
    assert losses.mse_loss.item() == pytest.approx(1.4939429759979248, rel=1e-6)
    expected = (
        data["no_aux.grad_before.encoder.weight"].T,
        data["no_aux.grad_before.decoder.weight"].T,
        data["no_aux.grad_before.pre_encoder_bias"],
    )
    for weight, gradient in zip(weights, expected, strict=True):
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-7)


def test_input_that_is_not_finite_is_not_hidden():
    z, weights, _ = paper_step()
    z = z.clone()
    z[0, 0, 0] = torch.nan
    assert loss_of(z, weights, k=4).loss.isnan()
