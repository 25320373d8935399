"""References: brute force over whole tensors, SAELens' calculator, the paper's FVU."""

import json
from functools import reduce
from operator import add

import pandas as pd
import pytest
import torch
from conftest import PAPER_DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.evals import ExplainedVarianceCalculator
from safetensors.torch import load_file

from sae_lens_multilayer.evaluation.metrics import LayerMetrics, LayerSums

HOOKS = [f"blocks.{layer}.hook_resid_post" for layer in (0, 3, 4)]
COLUMNS = ["fvu", "fvu_scalar", "mse", "l0", "l1", "silent_fraction", "dead_fraction"]


def sums_of(x, x_hat, acts) -> list[LayerSums]:
    """The sums for `x`, `x_hat` [token, layer, d_in], `acts` [token, layer, d_sae]."""
    found = []
    for layer in range(x.shape[1]):
        a = acts[:, layer]
        token, latent = a.nonzero(as_tuple=True)
        values = a[token, latent]
        sums = LayerSums.of_layer(
            x[:, layer], x_hat[:, layer], latent, values, a.shape[1]
        )
        found.append(sums)
    return found


def metrics_of(x, x_hat, acts, hook_names=HOOKS) -> LayerMetrics:
    return LayerMetrics.of_layers(hook_names, sums_of(x, x_hat, acts), True)


def random_case(seed, n_tokens=7, d_in=4, d_sae=6):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    n_layers = len(HOOKS)
    scale = torch.tensor([1.0, 30.0, 1000.0], dtype=torch.float64).view(1, -1, 1)
    x = scale * (randn(n_tokens, n_layers, d_in) + randn(1, n_layers, d_in))
    x_hat = x + 0.3 * scale * randn(n_tokens, n_layers, d_in)
    acts = (randn(n_tokens, n_layers, d_sae) - 1).relu()
    return x, x_hat, acts


def test_worked_case():
    # One layer, two tokens, one dimension: vectors 0 and 2 about their mean 1.
    x = torch.tensor([0.0, 2.0]).view(2, 1, 1)
    x_hat = torch.tensor([1.0, 2.0]).view(2, 1, 1)
    acts = torch.tensor([[[5.0, 0.0, 0.0, 1.0]], [[3.0, 0.0, 0.0, 0.0]]])
    metrics = metrics_of(x, x_hat, acts, ["hook_embed"])
    assert metrics.n_tokens == 2
    assert metrics.fvu.item() == 0.5  # 1 / (1 + 1)
    # MSE 1 / 2 over variance (1 + 1) / (2 - 1)
    assert metrics.fvu_scalar.item() == 0.25
    assert metrics.mse.item() == 0.5
    assert metrics.l0.item() == 1.5
    assert metrics.l1.item() == 4.5
    assert metrics.silent_fraction.item() == 0.5
    assert metrics.dead_fraction.item() == 0.5


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 9), st.integers(1, 4))
def test_every_metric_is_its_definition(seed, n_tokens, d_in):
    x, x_hat, acts = random_case(seed, n_tokens, d_in)
    found = metrics_of(x, x_hat, acts)
    error = (x_hat - x).square()
    deviation = (x - x.mean(0)).square().sum((0, 2))
    expected = {
        "fvu": error.sum((0, 2)) / deviation,
        "fvu_scalar": error.mean((0, 2)) / x.transpose(0, 1).flatten(1).var(1),
        "mse": error.mean((0, 2)),
        "l0": (acts > 0).sum(2).double().mean(0),
        "l1": acts.sum(2).mean(0),
        "silent_fraction": (acts == 0).all(0).double().mean(1),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found, name), value, rtol=1e-6, atol=1e-9)
    assert (found.dead_fraction == (acts == 0).all(0).all(0).double().mean()).all()


def test_fvu_is_one_minus_the_explained_variance_of_saelens():
    x, x_hat, acts = random_case(0, n_tokens=50)
    fvu = metrics_of(x, x_hat, acts).fvu
    for layer in range(len(HOOKS)):
        calculator = ExplainedVarianceCalculator()
        for rows in torch.arange(50).split(17):
            calculator.add_batch(x_hat[rows, layer], x[rows, layer])
        assert fvu[layer].item() == pytest.approx(1 - calculator.compute(), rel=1e-9)


# From `metrics.json`, made by the paper's code (`data/paper/SOURCE.md`):
# `plain.reference`, and for the last one `plain.standard`.
PUBLISHED = {
    "fvu_scalar": [0.20482661, 0.15868308, 0.13951306, 0.13367836, 0.16522068],
    "mse": [5.6206765, 8.7339678, 11.313013, 14.027874, 20.234848],
    "l1": [26.43297, 26.74419, 26.676928, 26.474192, 27.250279],
    "l0": [8.0, 8.0, 8.0, 8.0, 8.0],
    "fvu": [0.22712269, 0.17020333, 0.1495862, 0.14362227, 0.17506632],
}


def test_agrees_with_the_numbers_of_the_papers_code():
    sae = load_file(PAPER_DATA / "plain.safetensors")
    x = load_file(PAPER_DATA / "activations.safetensors")["resid_post"]
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    u = (x - mean) / (std + 1e-5) - sae["pre_encoder_bias"]
    values, indices = (u @ sae["encoder.weight"].T).topk(8)
    acts = torch.zeros(*x.shape[:-1], 512).scatter(3, indices, values.relu())
    u_hat = acts @ sae["decoder.weight"].T + sae["pre_encoder_bias"]
    case = (t.flatten(1, 2).transpose(0, 1) for t in (x, u_hat * std + mean, acts))
    metrics = metrics_of(
        *case, hook_names=[f"blocks.{i}.hook_resid_post" for i in range(5)]
    )
    for name, numbers in PUBLISHED.items():
        # The paper's sums are in float32.
        expected = torch.tensor(numbers, dtype=torch.float64)
        torch.testing.assert_close(
            getattr(metrics, name), expected, rtol=1e-5, atol=0, msg=name
        )


def test_a_perfect_reconstruction_has_no_error_and_the_mean_has_fvu_one():
    x, _, acts = random_case(0)
    perfect = metrics_of(x, x, acts)
    mean = metrics_of(x, x.mean(0, keepdim=True).expand_as(x), acts)
    assert perfect.fvu.tolist() == perfect.mse.tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(mean.fvu, torch.ones(3, dtype=torch.float64))


@settings(deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(0, 12), max_size=4))
def test_any_split_of_the_tokens_adds_up_to_the_whole(seed, cuts):
    case = random_case(seed, n_tokens=12)
    parts = [t.tensor_split(sorted(cuts)) for t in case]
    lots = [sums_of(*part) for part in zip(*parts, strict=True) if len(part[0])]
    totals = [reduce(add, layer) for layer in zip(*lots, strict=True)]
    found, whole = LayerMetrics.of_layers(HOOKS, totals, True), metrics_of(*case)
    assert found.n_tokens == whole.n_tokens
    pd.testing.assert_frame_equal(found.to_dataframe(), whole.to_dataframe(), rtol=1e-9)


def test_adding_changes_neither_term():
    a, b = sums_of(*random_case(0))[0], sums_of(*random_case(1))[0]
    before = a.moments.mean.clone(), b.moments.mean.clone()
    _ = a + b
    assert a.moments.mean.equal(before[0])
    assert b.moments.mean.equal(before[1])
    assert a.n_tokens == 7


def test_sums_of_bfloat16_vectors_are_exact():
    x = torch.full((511, 1, 8), 100.0, dtype=torch.bfloat16)
    x[300:] = 101.0
    (sums,) = sums_of(x, x + 1, torch.ones(511, 1, 2, dtype=torch.bfloat16))
    assert sums.mse.item() == 1.0
    mean = (300 * 100 + 211 * 101) / 511  # bfloat16 has no such number
    torch.testing.assert_close(
        sums.moments.mean,
        torch.full((8,), mean, dtype=torch.float64),
        rtol=1e-14,
        atol=0,
    )


def test_latents_of_separate_saes_are_dead_by_layer():
    case = random_case(0)
    metrics = LayerMetrics.of_layers(HOOKS, sums_of(*case), shared_sae=False)
    assert metrics.dead_fraction.equal(metrics.silent_fraction)


@pytest.mark.parametrize("value", [0.0, 0.1, -3e4])
def test_a_layer_that_does_not_vary_is_an_error_that_names_it(value):
    x, x_hat, acts = random_case(0, n_tokens=1000)
    x[:, 1] = value * torch.arange(1, 5)
    with pytest.raises(ValueError, match="must vary over tokens") as info:
        metrics_of(x, x_hat, acts)
    assert HOOKS[1] in str(info.value)
    assert HOOKS[0] not in str(info.value)


def test_a_layer_that_varies_little_about_a_large_mean_is_measured():
    x, _, acts = random_case(0, n_tokens=1000)
    x = 1e4 + x / 10  # deviations of 1e-5 to 1e-2 of the norm
    metrics = metrics_of(x, x.mean(0, keepdim=True).expand_as(x), acts)
    torch.testing.assert_close(
        metrics.fvu, torch.ones(3, dtype=torch.float64), rtol=1e-4, atol=0
    )


def test_one_token_has_no_fvu():
    with pytest.raises(ValueError, match="must vary over tokens"):
        metrics_of(*random_case(0, n_tokens=1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_values_that_are_not_finite_are_an_error_that_names_the_hook(which, value):
    case = random_case(0)
    case[which][3, 2, 1] = value
    with pytest.raises(ValueError, match=r"must be finite.*blocks.4"):
        metrics_of(*case)


def test_table_has_a_row_for_each_hook_in_order():
    metrics = metrics_of(*random_case(0))
    table = metrics.to_dataframe()
    assert list(table.columns) == COLUMNS
    assert list(table.index) == HOOKS
    assert table.index.name == "hook_name"
    assert table["fvu"].tolist() == metrics.fvu.tolist()
    assert table["dead_fraction"].tolist() == metrics.dead_fraction.tolist()


def test_mean_is_over_layers():
    metrics = metrics_of(*random_case(0))
    assert metrics.mean()["mse"] == pytest.approx(metrics.mse.mean().item())
    assert metrics.mean()["dead_fraction"] == pytest.approx(metrics.dead_fraction[0])
    assert list(metrics.mean().index) == COLUMNS


def test_log_keys_name_the_layer():
    metrics = metrics_of(*random_case(0))
    log = metrics.to_log_dict()
    assert set(log) == {f"layer_{i}/{c}" for i in (0, 3, 4) for c in COLUMNS}
    assert log["layer_3/fvu"] == metrics.fvu[1].item()
    json.dumps(log)  # plain numbers


def test_log_keys_are_hook_names_where_layers_are_unclear():
    names = ["hook_embed", "blocks.0.hook_resid_pre", "blocks.0.hook_resid_post"]
    log = metrics_of(*random_case(0), hook_names=names).to_log_dict()
    assert set(log) == {f"{name}/{column}" for name in names for column in COLUMNS}
