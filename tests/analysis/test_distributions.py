"""References: brute force over the whole tensor, and the paper's `dists`."""

import pandas as pd
import pytest
import torch
from conftest import D_VOCAB, N_CTX
from dense import (
    accumulate,
    batch_of,
    cuts_of_twelve,
    random_sparse,
    sae_of,
    seeds,
    split,
)
from hypothesis import given
from paper import paper_acts, paper_numbers
from saes import random_sae
from safetensors.torch import load_file

from sae_lens_multilayer.analysis import (
    LayerDistributions,
    layer_distributions,
    prompt_acts,
)
from sae_lens_multilayer.analysis.distributions import DistributionSums


def test_worked_case():
    # Latent 0: 1 at layer 0 and 3 at layer 1 of one token. Latent 1: never active.
    # Latent 2: at layer 1 of both tokens.
    acts = torch.tensor([[[1.0, 0, 0], [3, 0, 2]], [[0, 0, 0], [0, 0, 6]]])
    dists = accumulate(DistributionSums(sae_of(acts)), [batch_of(acts)])
    assert dists.n_tokens == 2
    assert dists.counts.tolist() == [[1, 0, 0], [1, 0, 2]]
    assert dists.totals.tolist() == [[1, 0, 0], [3, 0, 8]]
    assert dists.probs[:, [0, 2]].tolist() == [[0.25, 0], [0.75, 1]]
    assert dists.probs[:, 1].isnan().all()
    assert dists.mean_layer[[0, 2]].tolist() == [0.75, 1]
    assert dists.var_layer[[0, 2]].tolist() == [0.1875, 0]
    assert dists.mean_act[[0, 2]].tolist() == [2, 4]
    assert dists.active_latents().tolist() == [0, 2]


@given(seeds, cuts_of_twelve)
def test_any_split_gives_the_definition(seed, cuts):
    acts = random_sparse(seed, 12, 4, 6)
    dists = accumulate(DistributionSums(sae_of(acts)), split(acts, cuts))
    assert dists.counts.equal((acts > 0).sum(0))
    torch.testing.assert_close(dists.totals, acts.sum(0))
    torch.testing.assert_close(
        dists.probs, acts.sum(0) / acts.sum((0, 1)), equal_nan=True
    )


def test_agrees_with_the_numbers_of_the_papers_code():
    acts = paper_acts()
    dists = accumulate(
        DistributionSums(sae_of(acts)), [batch_of(part) for part in acts.split(100)]
    )
    paper = load_file(paper_numbers("dists.safetensors"))
    # No activation there is negative, so its sums before the ReLU are ours.
    assert dists.counts.equal(paper["counts"].long())
    for ours, theirs in [
        (dists.totals, "totals"),
        (dists.mean_layer, "layer_mean"),
        (dists.var_layer, "layer_var"),
    ]:
        torch.testing.assert_close(
            ours.float(), paper[theirs], rtol=2e-5, atol=2e-5, equal_nan=True
        )
    active = dists.counts.sum(0) > 0
    assert int((~active).sum()) == 56  # dists.n_never_active of metrics.json
    torch.testing.assert_close(
        dists.mean_act[active].float(), paper["mean"][active], rtol=1e-5, atol=0
    )
    # dists.layer_std_stats.mean of metrics.json
    assert dists.std_layer.nanmean().item() == pytest.approx(1.073646903, rel=1e-5)


def test_a_pass_over_prompts_is_brute_force_over_their_vectors(model):
    sae = random_sae().double()
    model.to(torch.float64)
    tokens = torch.randint(1, D_VOCAB, (7, N_CTX))
    tokens[0, :3] = 0
    dists = layer_distributions(
        sae, model, tokens, batch_size_prompts=3, exclude_tokens=[0]
    )
    _, cache = model.run_with_cache(tokens)
    x = torch.stack([cache[name] for name in dists.hook_names], dim=2)
    acts = sae.encode(x)[tokens != 0]
    assert dists.n_tokens == len(acts) == 7 * N_CTX - 3
    assert dists.counts.equal((acts > 0).sum(0))
    torch.testing.assert_close(dists.totals, acts.detach().sum(0))


def test_table_and_disk(tmp_path):
    acts = random_sparse(0, 12, 4, 6)
    dists = accumulate(DistributionSums(sae_of(acts)), [batch_of(acts)])
    table = dists.to_dataframe()
    assert table.index.name == "latent"
    assert table["has_two_modes"].tolist() == dists.has_two_modes.tolist()
    assert list(table.columns[-4:]) == [f"p_layer_{layer}" for layer in range(4)]
    assert table["count"].tolist() == (acts > 0).sum((0, 1)).tolist()
    dists.save(tmp_path / "dists")
    loaded = LayerDistributions.load(tmp_path / "dists")
    assert loaded.hook_names == dists.hook_names
    pd.testing.assert_frame_equal(loaded.to_dataframe(), table)


@pytest.mark.parametrize(
    ("probs", "expected"),
    [
        ([0.5, 0, 0.5], True),
        ([0.25, 0.5, 0.25], False),
        ([0.1, 0.2, 0.3, 0.4], False),
        ([0.4, 0.15, 0.15, 0.3], False),  # 0.15 is half of 0.3, not below
        ([0.4, 0.2, 0.1, 0.3], True),
        ([0.6, 0.31, 0.0, 0.09], False),  # less than 10% after
        ([0.0, 0.0, 0.0, 0.0], False),  # never active
        ([1.0], False),
        # Of many layers, one alone is no mode.
        ([*[0.05] * 10, 0.01, *[0.05] * 9, 0.04], False),
        ([*[0.05] * 8, *[0.01] * 5, *[0.05] * 8], True),
        ([*[0.0] * 11, 0.5, 0.0, 0.5, *[0.0] * 11], False),
    ],
)
def test_two_modes(probs, expected):
    totals = torch.tensor(probs).double().unsqueeze(1)
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(len(probs))]
    counts = (10_000 * totals).round().long()
    dists = LayerDistributions(names, 10_000, counts, totals)
    assert dists.has_two_modes.tolist() == [expected]
    assert dists.frequency[:, 0].tolist() == pytest.approx(probs)
    # Too few tokens to see a valley between peaks of at most 4.
    few = LayerDistributions(names, 10, (8 * totals).round().long(), totals)
    assert not few.has_two_modes.any()


def test_every_token_of_a_prompt(model, tmp_path):
    sae = random_sae()
    tokens = torch.randint(1, D_VOCAB, (1, N_CTX))
    tokens[0, 4] = 0
    found = prompt_acts(sae, model, tokens, exclude_tokens=(0,))
    _, cache = model.run_with_cache(tokens)
    x = torch.stack([cache[name][0] for name in found.hook_names], dim=1)
    acts = sae.encode(x).double().detach()
    acts[4] = 0
    table = found.to_dataframe()
    assert (table.position != 4).all()
    assert table.groupby(["position", "latent"]).prob.sum().to_numpy() == (
        pytest.approx(1)
    )
    for latent in table.latent.unique().tolist():
        torch.testing.assert_close(
            found.of_latent(latent), acts[:, :, latent].T, rtol=1e-5, atol=0
        )
    found.save(tmp_path / "prompt")
    again = type(found).load(tmp_path / "prompt")
    pd.testing.assert_frame_equal(again.to_dataframe(), table)


def test_more_than_one_prompt_has_no_single_tokens(model):
    with pytest.raises(ValueError, match="one prompt; got more"):
        prompt_acts(random_sae(), model, torch.ones(2, 4, dtype=torch.long))
