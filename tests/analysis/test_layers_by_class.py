"""Reference: brute force over the whole tensor."""

import pandas as pd
import pytest
import torch
from conftest import D_VOCAB, N_CTX
from dense import accumulate, batch_of, random_sparse, sae_of, seeds
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from saes import random_sae

from sae_lens_multilayer.analysis import (
    TokenClasses,
    TokenClassSums,
    VarianceSums,
    token_classes,
)

N_PROMPTS, N_POS, LAYERS, D_SAE = 6, 4, 3, 4
P = [f"p_layer_{layer}" for layer in range(LAYERS)]


def random_case(seed):
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(0, 5, (N_PROMPTS, N_POS), generator=generator)
    kept = torch.rand(N_PROMPTS, N_POS, generator=generator) < 0.8
    acts = random_sparse(seed, N_PROMPTS, N_POS, LAYERS, D_SAE)
    return prompts, kept, acts * kept[..., None, None]


def run(prompts, kept, acts, latents, size):
    batches = [
        batch_of(acts[s][kept[s]], prompts[s], s.start, kept[s])
        for s in (slice(i, i + size) for i in range(0, N_PROMPTS, size))
        if kept[s].any()
    ]
    return accumulate(TokenClassSums(sae_of(acts[0]), latents), batches)


def check(table, classes, kept, act):
    """`act` [prompt, pos, layer] of one latent; `classes` [prompt, pos]."""
    by_class = {c: act[(classes == c) & kept].sum(0) for c in classes.unique().tolist()}
    expected = {c: totals for c, totals in by_class.items() if totals.any()}
    assert sorted(table.index) == sorted(expected)
    for c, totals in expected.items():
        row = table.loc[c]
        assert row.n_tokens == ((classes == c) & kept).sum()
        assert row.share == pytest.approx((totals.sum() / act.sum()).item())
        assert row[P].tolist() == pytest.approx((totals / totals.sum()).tolist())
        mean = (totals * torch.arange(LAYERS)).sum() / totals.sum()
        assert row.mean_layer == pytest.approx(mean.item())


@settings(max_examples=25)
@given(seeds, st.integers(1, N_PROMPTS))
def test_every_class_is_brute_force(seed, size):
    prompts, kept, acts = random_case(seed)
    found = run(prompts, kept, acts, [3, 1], size)
    for latent in (3, 1):
        act = acts[..., latent]
        assume(act.any())
        positions = torch.arange(N_POS).expand_as(prompts)
        check(found.by("position", latent), positions, kept, act)
        check(found.by("token", latent), prompts, kept, act)
        assert found.by("token", latent).share.is_monotonic_decreasing
        # As many bins as tokens: a bin for each number of times.
        counts = prompts[kept].bincount(minlength=5)
        times = found.by("frequency", latent, n_bins=1000)
        times.index = times.index.astype(int)
        check(times, counts[prompts], kept, act)
        assert found.by("frequency", latent, n_bins=1).share.tolist() == [1]


@given(seeds)
def test_explained_is_the_share_of_the_variance_between_classes(seed):
    prompts, kept, acts = random_case(seed)
    act = acts[..., 2]
    layers = torch.arange(LAYERS).double()
    mean = (act * layers).sum() / act.sum()
    variance = (act * (layers - mean) ** 2).sum() / act.sum()
    assume(act.any() and variance > 0)
    result = run(prompts, kept, acts, [2], 2)
    found = result.explained(2).explained
    for kind, classes in [
        ("position", torch.arange(N_POS).expand_as(prompts)),
        ("token", prompts),
    ]:
        between = torch.zeros(())
        for c in classes.unique():
            totals = act[classes == c].sum(0)
            if totals.any():
                own = (totals * layers).sum() / totals.sum()
                between = between + totals.sum() / act.sum() * (own - mean) ** 2
        assert found[kind] == pytest.approx((between / variance).item(), abs=1e-9)
        assert -1e-12 <= found[kind] <= 1 + 1e-12
    assert found["frequency"] <= found["token"] + 1e-12


def test_by_chance_is_what_shuffled_tokens_give():
    # 60 tokens of 12 ids, 5 each; activations and layers that do not depend on them.
    generator = torch.Generator().manual_seed(0)
    acts = random_sparse(1, 60, LAYERS, 1)
    ids = torch.arange(12).repeat_interleave(5)
    results = [
        accumulate(
            TokenClassSums(sae_of(acts), [0]),
            [batch_of(acts, ids[torch.randperm(60, generator=generator)].unsqueeze(0))],
        ).explained(0)
        for _ in range(100)
    ]
    mean = pd.DataFrame([result.loc["token"] for result in results]).mean()
    assert mean.explained == pytest.approx(mean.by_chance, rel=0.05)
    # Each position occurs once, so chance explains as much as tokens do.
    of_positions = results[0].loc["position"]
    assert of_positions.explained == pytest.approx(of_positions.by_chance)
    assert of_positions.explained > 2 * mean.explained


@given(seeds, st.integers(1, N_PROMPTS))
def test_between_tokens_is_that_of_the_variances(seed, size):
    prompts, kept, acts = random_case(seed)
    assume(acts.any())
    found = run(prompts, kept, acts, [3, 1], size).between_tokens
    whole = accumulate(VarianceSums(sae_of(acts[0])), [batch_of(acts.flatten(0, 1))])
    torch.testing.assert_close(
        found, whole.between_tokens[[3, 1]], rtol=0, atol=1e-9, equal_nan=True
    )


def test_bins_hold_about_as_many_tokens():
    ids = torch.arange(100).repeat_interleave(torch.arange(1, 101))  # id i: i + 1 times
    acts = torch.ones(len(ids), 1, 1)
    found = accumulate(TokenClassSums(sae_of(acts), [0]), [batch_of(acts, ids[None])])
    table = found.by("frequency", 0, n_bins=4)
    assert table.n_tokens.sum() == len(ids) == 5050
    assert table.n_tokens.between(1150, 1400).all()
    assert table.index[0] == "1-50"
    assert table.index[-1] == "88-100"  # half of the tokens of id 86 are below 3/4
    # The bin of a token id is decided by its middle occurrence, not its first.
    ids = torch.tensor([[0, 1, 1, 1]])
    few = accumulate(TokenClassSums(sae_of(acts), [0]), [batch_of(acts[:4], ids)])
    assert few.by("frequency", 0, n_bins=2).n_tokens.to_dict() == {"1": 1, "3": 3}


def test_table_and_disk(model, tmp_path):
    tokens = torch.randint(1, D_VOCAB, (5, N_CTX))
    sae = random_sae()
    latents = [7, 2]
    found = token_classes(sae, model, tokens, latents, batch_size_prompts=2)
    table = found.to_dataframe()
    assert table.columns[:3].tolist() == ["latent", "kind", "class"]
    sums = table.groupby(["latent", "kind"]).share.sum()
    assert sums.to_numpy() == pytest.approx(1)
    found.save(tmp_path / "classes")
    loaded = TokenClasses.load(tmp_path / "classes")
    pd.testing.assert_frame_equal(loaded.to_dataframe(), table)


def test_unknown_latents_are_errors():
    with pytest.raises(ValueError, match=r"in \[0, d_sae = 64\)"):
        TokenClassSums(random_sae(), [64])
    found = run(*random_case(0), [3, 1], 2)
    with pytest.raises(ValueError, match=r"among \[3, 1\]; got 2"):
        found.by("token", 2)
