"""The sparse step of a crosscoder against autograd of its dense definition."""

import pytest
import torch
from conftest import count_calls
from hypothesis import given, settings
from hypothesis import strategies as st
from test_topk_sparse import (
    TOLERANCE,
    copies,
    gradients,
    make_case,
    relative_error,
    some_dead,
)
from torch import Tensor

from sae_lens_multilayer.topk.reference import crosscoder_loss, training_loss
from sae_lens_multilayer.topk.select import Encoder
from sae_lens_multilayer.topk.sparse import decode_topk, encode_topk
from sae_lens_multilayer.topk.step import TopKStep, training_step

Weights = tuple[Tensor, Tensor, Tensor]
OPTIONS = {"k": 7, "dead_latents": None, "k_aux": 9, "aux_coefficient": 0.3}


def make_crosscoder(
    n_tokens: int = 37, n_layers: int = 3, d_in: int = 19, d_sae: int = 101, **changes
) -> tuple[Tensor, Weights]:
    """Vectors with a different mean and scale per layer, and random stacked weights."""
    z, _ = make_case(n_tokens, n_layers, d_in, d_sae, **changes)
    return z, make_case(2, 1, n_layers * d_in, d_sae, **changes)[1]


def assert_parity(
    z: Tensor, weights: Weights, tolerance: float, micro_batch_size: int = 10, **changes
) -> TopKStep:
    options = {**OPTIONS, **changes}
    certified = options.pop("certified", None)
    dense, sparse = copies(weights), copies(weights)
    losses = crosscoder_loss(z, *dense, **options)
    losses.loss.backward()
    step = training_step(
        z, *sparse, micro_batch_size=micro_batch_size, certified=certified, **options
    )
    for actual, expected in zip(gradients(sparse), gradients(dense), strict=True):
        assert relative_error(actual, expected) < tolerance
    for name in ("loss", "mse_loss", "aux_loss"):
        expected = getattr(losses, name).item()
        assert getattr(step, name).item() == pytest.approx(expected, rel=tolerance)
    return step


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("k", [1, 7, 101])
@pytest.mark.parametrize("dead_share", [None, 0.3, 1.0])
@pytest.mark.parametrize("micro_batch_size", [10, 37])
def test_losses_and_gradients_are_those_of_autograd(
    dtype, k, dead_share, micro_batch_size
):
    dead = None if dead_share is None else some_dead(101, dead_share)
    z, weights = make_crosscoder(dtype=dtype)
    tolerance = TOLERANCE[dtype]
    assert_parity(z, weights, tolerance, micro_batch_size, k=k, dead_latents=dead)


@pytest.mark.parametrize("certified", [False, True])
def test_gradients_with_many_latents_of_which_few_are_used(certified):
    z, weights = make_crosscoder(150, 2, 33, 2999, dtype=torch.float32)
    dead = some_dead(2999)
    assert_parity(z, weights, 1e-5, 64, k=3, dead_latents=dead, certified=certified)


def test_duplicated_tokens_and_latents():
    # k is even, so both latents of a pair are active.
    z, (W_enc, W_dec, b_dec) = make_crosscoder(20, 2, 19, 50)
    z = torch.cat([z, z, z[:1].expand(5, -1, -1)])
    weights = torch.cat([W_enc.T, W_enc.T]).T, torch.cat([W_dec, W_dec]), b_dec
    assert_parity(z, weights, 1e-10, k=6, dead_latents=some_dead(100))


@settings(max_examples=25, deadline=None)
@given(
    n_tokens=st.integers(2, 40),
    n_layers=st.integers(1, 4),
    d_in=st.integers(3, 17),
    d_sae=st.integers(1, 150),
    data=st.data(),
)
def test_parity_for_any_sizes(n_tokens, n_layers, d_in, d_sae, data):
    z, weights = make_crosscoder(n_tokens, n_layers, d_in, d_sae)
    assert_parity(
        z,
        weights,
        1e-8,
        data.draw(st.integers(1, n_tokens + 3)),
        k=data.draw(st.integers(1, d_sae)),
        k_aux=data.draw(st.integers(0, d_sae)),
        dead_latents=some_dead(d_sae, data.draw(st.sampled_from([0.0, 0.5, 1.0]))),
        standardize_inputs=data.draw(st.booleans()),
    )


def test_one_layer_is_the_topk_sae():
    # Authority: the definition of the MLSAE.
    z, weights = make_crosscoder(n_layers=1)
    options = {**OPTIONS, "dead_latents": some_dead(101)}
    one, other = copies(weights), copies(weights)
    losses = crosscoder_loss(z, *one, **options), training_loss(z, *other, **options)
    torch.testing.assert_close(losses[0].loss, losses[1].loss)
    for loss in losses:
        loss.loss.backward()
    for actual, expected in zip(gradients(one), gradients(other), strict=True):
        torch.testing.assert_close(actual, expected)


def test_statistics_count_an_activation_at_every_layer():
    # Authority: brute force over the dense activations.
    z, (W_enc, W_dec, b_dec) = make_crosscoder(n_layers=3)
    step = training_step(
        z, *copies((W_enc, W_dec, b_dec)), **OPTIONS, micro_batch_size=9
    )
    acts = encode_topk(z, W_enc, b_dec, 7)
    assert acts.values.shape == (37, 7)
    n_active = int((acts.values > 0).sum())
    assert step.n_active.tolist() == [n_active] * 3
    norms = W_dec.unflatten(1, (3, -1)).norm(dim=-1)[acts.indices]
    sum_acts = (acts.values.unsqueeze(-1) * norms).sum((0, 1))
    torch.testing.assert_close(step.sum_acts, sum_acts)
    error = (decode_topk(acts, W_dec, b_dec) - z).square().sum((0, 2))
    torch.testing.assert_close(step.sum_sq_error, error)
    counts = acts.indices[acts.values > 0].bincount(minlength=101)
    torch.testing.assert_close(step.fire_counts, 3 * counts)


def test_a_transform_maps_the_vectors_of_each_layer_first():
    z, weights = make_crosscoder()
    scale = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    options = {**OPTIONS, "dead_latents": some_dead(101), "micro_batch_size": 9}
    before, inside = copies(weights), copies(weights)
    training_step(z * scale[:, None] + 1, *before, **options)
    training_step(z, *inside, **options, transform=lambda x, i: x * scale[i] + 1)
    for actual, expected in zip(gradients(inside), gradients(before), strict=True):
        torch.testing.assert_close(actual, expected)


def test_the_second_pass_of_auxk_does_not_encode_again(monkeypatch):
    calls = count_calls(monkeypatch, Encoder, "__call__")
    z, weights = make_crosscoder()
    options = {**OPTIONS, "dead_latents": some_dead(101)}
    training_step(z, *copies(weights), **options, micro_batch_size=10)
    assert [len(args[1]) for args, _ in calls] == [10, 10, 10, 7]
