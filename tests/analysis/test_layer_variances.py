"""References: brute force over the whole tensor, and the paper's `variances`."""

import json

import pandas as pd
import pytest
import torch
from dense import (
    accumulate,
    batch_of,
    cuts_of_twelve,
    random_sparse,
    sae_of,
    seeds,
    split,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from paper import paper_acts, paper_numbers
from saes import random_sae

from sae_lens_multilayer.analysis import Variances, VarianceSums, variances


def brute_force(acts):
    """Each variance by its definition; `acts` [token, layer, latent], all active."""
    layers = torch.arange(acts.shape[1]).double().view(1, -1, 1)
    weight = acts.sum(1) / acts.sum((0, 1))  # [token, latent]
    given_both = (acts / acts.sum(1, keepdim=True)).nan_to_num()
    mean_both = (given_both * layers).sum(1)
    var_both = (given_both * (layers - mean_both.unsqueeze(1)) ** 2).sum(1)
    given_latent = (acts.sum(0) / acts.sum((0, 1))).unsqueeze(0)
    mean = (given_latent * layers).sum((0, 1))
    return {
        "mean_layer": mean,
        "var_layer": (given_latent * (layers - mean) ** 2).sum((0, 1)),
        "within_token": (weight * var_both).sum(0),
        "between_tokens": (weight * (mean_both - mean) ** 2).sum(0),
    }


def reference_estimate(acts):
    """The five numbers of `mlsae/analysis/variances.py`, by its formulas."""
    probs = (acts / acts.sum(1, keepdim=True)).nan_to_num()
    layers = torch.arange(acts.shape[1]).double()

    def var(p):  # over its first dimension
        shape = layers.view(-1, *[1] * (p.ndim - 1))
        return (shape**2 * p).sum(0) - (shape * p).sum(0) ** 2

    by_layer = probs.transpose(0, 1)
    e_var_l_f = var(by_layer.mean(1)).mean()
    e_var_l_tf = var(by_layer).mean()
    var_l = var(by_layer.mean((1, 2)))
    return [var_l, e_var_l_f, e_var_l_tf, e_var_l_f / var_l, e_var_l_tf / e_var_l_f]


def test_worked_case():
    # One latent. Token 0: 1 at layer 0 and 1 at layer 2; token 1: 2 at layer 1.
    acts = torch.tensor([[[1.0], [0], [1]], [[0], [2], [0]]])
    result = accumulate(VarianceSums(sae_of(acts)), [batch_of(acts)])
    assert result.mean_layer.tolist() == [1]
    assert result.var_layer.tolist() == [0.5]
    assert result.within_token.tolist() == [0.5]  # 1 for half of the activation
    assert result.between_tokens.tolist() == [0]
    assert result.summary.token_ratio == 1
    assert result.summary.latent_ratio == 1
    assert result.history.n_tokens.tolist() == [1, 2]
    assert result.history.exp_var_l_j.tolist() == [1, 0.5]


@given(seeds, st.integers(1, 40), st.integers(1, 30), st.booleans())
def test_each_variance_is_its_definition_and_they_add_up(seed, n_tokens, layers, some):
    acts = random_sparse(seed, n_tokens, layers, 5)
    acts = acts * torch.rand(acts.shape).double() if some else acts
    assume(acts.any())
    result = accumulate(VarianceSums(sae_of(acts)), [batch_of(acts)])
    active = acts.sum((0, 1)) > 0
    for name, expected in brute_force(acts).items():
        torch.testing.assert_close(
            getattr(result, name)[active], expected[active], rtol=1e-10, atol=1e-10
        )
        assert getattr(result, name)[~active].isnan().all()
    within_and_between = (result.within_token + result.between_tokens)[active]
    total = result.var_layer[active]
    torch.testing.assert_close(within_and_between, total, rtol=0, atol=1e-10)


@given(seeds)
def test_the_law_holds_over_latents_too(seed):
    acts = random_sparse(seed, 12, 7, 5)
    assume(acts.any())
    result = accumulate(VarianceSums(sae_of(acts)), [batch_of(acts)])
    weight = result.total_acts / acts.sum()
    mean_l = (weight * result.mean_layer).nansum()
    between_latents = (weight * (result.mean_layer - mean_l) ** 2).nansum()
    summary = result.summary
    assert summary.var_l == pytest.approx(
        summary.exp_var_l_j + between_latents.item(), abs=1e-10
    )
    assert summary.exp_var_l_jt == pytest.approx(
        (weight * result.within_token).nansum().item(), abs=1e-10
    )
    # All as one latent: its variance is that over all latents.
    one = accumulate(
        VarianceSums(sae_of(acts[..., :1])), [batch_of(acts.sum(2, keepdim=True))]
    )
    assert summary.var_l == pytest.approx(one.var_layer.item(), abs=1e-10)
    for ratio in (summary.token_ratio, summary.latent_ratio):
        assert not ratio < 0
        assert not ratio > 1 + 1e-12


@given(seeds, cuts_of_twelve, st.sampled_from([None, 1, 3, 5, 12, 100]))
def test_any_split_gives_the_same(seed, cuts, reference_batch):
    acts = random_sparse(seed, 12, 4, 6)
    assume(acts.any())

    def run(batches):
        sums = VarianceSums(sae_of(acts), reference_batch)
        return accumulate(sums, batches)

    parts, whole = run(split(acts, cuts)), run([batch_of(acts)])
    pd.testing.assert_frame_equal(
        parts.to_dataframe(), whole.to_dataframe(), rtol=1e-10, atol=1e-10
    )
    pd.testing.assert_frame_equal(parts.history, whole.history, rtol=1e-10, atol=1e-10)


def test_history_is_of_the_first_tokens():
    acts = random_sparse(0, 12, 4, 6)
    history = accumulate(VarianceSums(sae_of(acts)), split(acts, [5])).history
    assert history.n_tokens.tolist() == [1, 2, 4, 8, 12]
    for _, row in history.iterrows():
        first = acts[: int(row.n_tokens)]
        summary = accumulate(VarianceSums(sae_of(acts)), [batch_of(first)]).summary
        pd.testing.assert_series_equal(row, summary, check_names=False)


def test_agrees_with_the_numbers_of_the_papers_code():
    acts = paper_acts()
    sums = VarianceSums(sae_of(acts))
    summary = accumulate(sums, [batch_of(p) for p in acts.split(100)]).summary
    paper = json.loads(paper_numbers("analysis.json").read_text())["variances"]
    for name, number in paper.items():
        assert summary[f"reference_{name}"] == pytest.approx(number, rel=1e-5)


@given(seeds, st.sampled_from([5, 6, 30]))
def test_the_papers_estimates_are_means_over_its_batches(seed, batch):
    acts = random_sparse(seed, 12, 4, 6)
    assume(all(part.any() for part in acts.split(batch)))
    whole = [part for part in acts.split(batch) if len(part) == batch] or [acts]
    estimates = torch.tensor([reference_estimate(part) for part in whole]).mean(0)
    sums = VarianceSums(sae_of(acts), reference_batch_tokens=batch)
    summary = accumulate(sums, split(acts, [1, 4, 7])).summary
    names = ["var_l", "exp_var_l_f", "exp_var_l_tf", "rel_var_f", "rel_var_t"]
    found = [summary[f"reference_{name}"] for name in names]
    assert found == pytest.approx(estimates.tolist(), rel=1e-5, nan_ok=True)


def test_nothing_active_is_an_error():
    acts = torch.zeros(3, 2, 4)
    with pytest.raises(ValueError, match="No latent was active at any of the 3 tokens"):
        accumulate(VarianceSums(sae_of(acts)), [batch_of(acts)])


def test_disk(model, tmp_path):
    tokens = torch.randint(1, 512, (3, 8))
    result = variances(random_sae(), model, tokens)
    result.save(tmp_path / "variances")
    loaded = Variances.load(tmp_path / "variances")
    pd.testing.assert_frame_equal(loaded.history, result.history)
    pd.testing.assert_frame_equal(loaded.to_dataframe(), result.to_dataframe())
    assert loaded.summary.n_tokens == 24
