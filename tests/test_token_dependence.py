"""References: least squares, all orders of predictors, and brute force over tokens."""

from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import D_VOCAB, N_CTX
from dense import accumulate, batch_of, random_sparse, sae_of, seeds
from hypothesis import given, settings
from sae_lens.saes.sae import SAEMetadata
from saes import HOOK_NAMES, random_sae
from scipy.stats import wasserstein_distance

from sae_lens_multilayer import Prompts, cli
from sae_lens_multilayer.analysis import VarianceSums, layer_distributions
from sae_lens_multilayer.pictures import draw, draw_interactive
from sae_lens_multilayer.studies.token_dependence import (
    TokenDependence,
    TokenDependenceSettings,
    TokenSwaps,
    layer_dependence,
    run_settings,
    swaps,
    token_dependence_study,
    token_swaps,
)
from sae_lens_multilayer.studies.token_dependence.predictors import (
    TokenPredictors,
    settle_layer,
)
from sae_lens_multilayer.studies.token_dependence.shares import (
    leave_one_out_mean,
    lmg_shares,
    permuted_within,
)
from sae_lens_multilayer.studies.token_dependence.study import PairSums, _measure
from sae_lens_multilayer.studies.token_dependence.two_way import (
    HalvesFit,
    Pairs,
    shared_shift,
)


def random_pairs(seed: int, n_tokens=9, n_latents=6, share=0.6) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(n_tokens, n_latents, generator=generator) < share
    token, latent = chosen.nonzero(as_tuple=True)
    weight, y = torch.rand(2, len(token), generator=generator).double() + 0.1
    return Pairs(n_tokens, n_latents, token, latent, weight, y)


@settings(max_examples=20)
@given(seeds)
def test_the_shift_is_the_least_squares_fit(seed):
    pairs = random_pairs(seed)
    design = torch.cat(
        [
            torch.nn.functional.one_hot(pairs.latent, pairs.n_latents),
            torch.nn.functional.one_hot(pairs.token, pairs.n_tokens),
        ],
        dim=1,
    ).double()
    root = pairs.weight.sqrt()
    solution = np.linalg.lstsq(
        (design * root[:, None]).numpy(), (pairs.y * root).numpy(), rcond=None
    )[0]
    left = pairs.y - design @ torch.from_numpy(solution)
    tau = shared_shift(pairs)
    assert pairs.squares(tau).sum().item() == pytest.approx(
        (pairs.weight * left.square()).sum().item(), rel=1e-4, abs=1e-8
    )
    assert (tau * pairs.token_weight).sum().item() == pytest.approx(0, abs=1e-9)


def planted(seed: int, spread: float, n_tokens=300, n_latents=60) -> tuple[Pairs, Any]:
    """Pairs with shifts of a standard deviation and noise of 0.5 layers."""
    pairs = random_pairs(seed, n_tokens, n_latents, 0.3)
    generator = torch.Generator().manual_seed(seed)
    tau = spread * torch.randn(n_tokens, generator=generator).double()
    mu = 3 * torch.randn(n_latents, generator=generator).double()
    noise = 0.5 * torch.randn(len(pairs.y), generator=generator).double()
    pairs.y = mu[pairs.latent] + tau[pairs.token] + noise
    return pairs, tau


def test_a_planted_shift_is_recovered_from_either_half():
    pairs, tau = planted(0, spread=1.0)
    assert np.corrcoef(shared_shift(pairs), tau)[0, 1] > 0.98
    halves = HalvesFit.of(pairs)
    r2 = 1 - halves.left.sum() / halves.total.sum()
    # Var(tau) / (Var(tau) + 0.25), less the noise of tau from half of 18 latents.
    assert r2.item() == pytest.approx(0.8, abs=0.06)
    assert np.corrcoef(halves.shifts)[0, 1] > 0.9


def test_without_a_shift_the_other_half_predicts_nothing():
    pairs, _ = planted(0, spread=0.0)
    halves = HalvesFit.of(pairs)
    in_sample = 1 - pairs.squares(shared_shift(pairs)).sum() / halves.total.sum()
    assert in_sample > 0.03
    assert -0.2 < 1 - halves.left.sum() / halves.total.sum() < 0


@given(seeds)
@settings(max_examples=20)
def test_pairs_have_the_weights_of_the_variances(seed):
    acts = random_sparse(seed, 12, 4, 6)
    if (acts.sum((0, 1)) > 0).sum() < 2:
        return
    batches = [batch_of(part) for part in acts.split(5)]
    pairs = accumulate(PairSums(sae_of(acts)), batches)
    expected = accumulate(VarianceSums(sae_of(acts)), batches)
    share = expected.total_acts / expected.total_acts.sum()
    between = pairs.squares(torch.zeros(12).double()).sum() / pairs.weight.sum()
    assert between.item() == pytest.approx(
        (share * expected.between_tokens.nan_to_num()).sum().item(), abs=1e-9
    )


def r2_of(predictors, y, weight) -> float:
    root = np.sqrt(weight)
    design = np.vstack([np.ones_like(y), *predictors]).T
    fit = design @ np.linalg.lstsq(design * root[:, None], y * root, rcond=None)[0]
    mean = np.average(y, weights=weight)
    return 1 - (weight * (y - fit) ** 2).sum() / (weight * (y - mean) ** 2).sum()


def test_shares_are_means_over_all_orders_and_sum_to_r2():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 50))
    x[1] += x[0]
    y = x[0] + 0.5 * x[1] - x[2] + rng.normal(size=50)
    weight = rng.uniform(0.1, 1, 50)
    expected = np.zeros(4)
    for order in permutations(range(4)):
        for i, predictor in enumerate(order):
            with_it, before = (r2_of(x[list(order[:n])], y, weight) for n in (i + 1, i))
            expected[predictor] += (with_it - before) / 24
    found = lmg_shares(x, y, weight)
    assert found == pytest.approx(expected, abs=1e-6)
    assert found.sum() == pytest.approx(r2_of(x, y, weight), abs=1e-6)


def test_equal_predictors_share_equally_and_a_constant_has_none():
    rng = np.random.default_rng(0)
    x = rng.normal(size=100)
    y = x + rng.normal(size=100)
    shares = lmg_shares(np.stack([x, x, np.ones(100)]), y, np.ones(100))
    assert shares[0] == pytest.approx(shares[1], rel=1e-4)
    assert shares[:2].sum() == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2, rel=1e-4)
    assert shares[2] == pytest.approx(0, abs=1e-9)


def test_leave_one_out_mean():
    group, weight = np.array([5, 5, 5, 7, 9, 9]), np.array([1, 2, 1, 1, 1, 3.0])
    found = leave_one_out_mean(group, np.array([1, 2, 4, 8, 3, 6.0]), weight)
    assert found == pytest.approx([8 / 3, 5 / 2, 5 / 3, 0, 6, 3])


def test_a_permutation_stays_within_prompts():
    prompts = np.array([2, 0, 0, 2, 1, 0, 2, 2])
    orders = np.stack(
        [permuted_within(prompts, np.random.default_rng(i)) for i in range(50)]
    )
    assert (prompts[orders] == prompts).all()
    assert (np.sort(orders) == np.arange(8)).all()
    assert len(np.unique(orders, axis=0)) > 30


def test_the_layer_from_which_the_largest_logit_stays():
    best = torch.tensor([[0, 1, 2, 2], [2, 2, 2, 2], [2, 0, 2, 1], [1, 2, 1, 1]])
    z = torch.nn.functional.one_hot(best, 3).double()
    assert settle_layer(lambda rows: rows, z).tolist() == [2, 0, 3, 2]


def test_a_planted_predictor_has_its_share_and_the_others_chance():
    pairs, tau = planted(1, spread=1.0)
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(2, len(tau), generator=rng).double()
    values = {"surprisal": tau + noise[0], "entropy": noise[1]}
    prompt, position = torch.arange(300) // 10, torch.arange(300) % 10
    ids = torch.randint(0, 20, (2, 300), generator=rng)
    found = TokenPredictors(prompt, position, ids[0], ids[1], values)
    result = _measure(HOOK_NAMES, "", pairs, found, 50, 0)
    table = result.to_dataframe()
    assert table.index[0] == "surprisal"
    assert table.share["surprisal"] == pytest.approx(0.5, abs=0.1)
    row = table.loc["surprisal"]
    assert row.low < row.share < row.high
    assert (table.by_chance < 0.03).all()
    assert row.p == pytest.approx(1 / 51)
    assert (table.p[1:] > 0.02).all()
    assert result.shares.sum().item() == pytest.approx(table.share.sum())
    assert result.summary.value["r2_predictors"] == pytest.approx(table.share.sum())
    value, low, high = result.summary.loc["r2_cross_validated"]
    assert low < value == pytest.approx(0.8, abs=0.06)
    assert value < high


@pytest.fixture
def tokens():
    return torch.randint(1, D_VOCAB, (6, N_CTX))


def dependence(model, tokens, **options) -> TokenDependence:
    return layer_dependence(random_sae(), model, tokens, n_resamples=5, **options)


def test_a_study_of_a_model(model, tokens, tmp_path):
    result = dependence(model, tokens, batch_size_prompts=4)
    table = result.token_table()
    assert table["prompt"].tolist() == np.repeat(range(6), N_CTX).tolist()
    assert table["token_id"].tolist() == tokens.flatten().tolist()
    loss = model(tokens, return_type="loss", loss_per_token=True)
    found = table.pivot(index="prompt", columns="position", values="x_surprisal")
    assert found.iloc[:, 1:].to_numpy() == pytest.approx(
        loss.detach().numpy(), rel=1e-4
    )
    assert found.iloc[:, 0].isna().all()
    probs = model(tokens).softmax(-1).flatten(0, 1)[1]
    entropy = -(probs * probs.log()).sum().item()
    assert table["x_entropy"][1] == pytest.approx(entropy, rel=1e-4)
    vectors = model.run_with_cache(tokens)[1]
    first, last = (vectors[name].std(-1).flatten()[1] for name in HOOK_NAMES)
    assert table["x_std_growth"][1] == pytest.approx((last / first).log().item())
    result.save(tmp_path / "study")
    again = TokenDependence.load(tmp_path / "study")
    pd.testing.assert_frame_equal(again.to_dataframe(), result.to_dataframe())
    pd.testing.assert_frame_equal(again.summary, result.summary)
    for picture in result.pictures().values():
        assert len(draw(picture).axes) == len(draw_interactive(picture)) == 3


def test_chosen_latents_and_nulls(model, tokens):
    sae = random_sae()
    dists = layer_distributions(sae, model, tokens)
    call: Any = (sae, model, tokens)
    chosen = dists.most_active(5).tolist()
    few = layer_dependence(*call, latents=chosen, n_resamples=5)
    assert few.n_latents == 5
    total = dists.totals[:, chosen].sum().item()
    assert few.weights.sum().item() == pytest.approx(total)
    null = layer_dependence(*call, n_resamples=5, null="shuffled_layers")
    assert null.weights.sum().item() == pytest.approx(dists.totals.sum().item())
    assert "shuffled" in null.pictures()[""].title


def test_bad_input(model, tokens):
    one = SAEMetadata(hook_names=HOOK_NAMES[:1], model_name="tiny")
    with pytest.raises(ValueError, match=r"at least two layers.*blocks\.0"):
        layer_dependence(random_sae(metadata=one), model, tokens)
    sae = random_sae()
    with torch.no_grad():
        sae.b_enc = None
        sae.W_enc[:, 7] = 0
        sae.W_dec[9] = sae.W_dec[7] + 0.01
    with pytest.raises(ValueError, match=r"\[7\] never are.*nearest.*: 9 \(cos"):
        layer_dependence(sae, model, tokens, latents=[7])
    with pytest.raises(ValueError, match="All tokens are excluded"):
        dependence(model, tokens, exclude_positions=range(N_CTX))
    with pytest.raises(ValueError, match="follow another one"):
        dependence(model, tokens[:, :1])


def test_the_command_runs_and_resumes_the_study(offline, tmp_path, capsys):
    (tmp_path / "study.yaml").write_text(
        "sae: sae\ndataset_path: text.parquet\nn_tokens: 96\n"
        "nulls: [shuffled_layers]\nn_resamples: 5\n"
        "swaps: {n_items: 2, n_context: 4, shift: 2}\n"
    )
    command = ["study", "token_dependence", "study.yaml", "--output", "out"]
    cli.main(command)
    printed = capsys.readouterr().out
    assert "r2_cross_validated" in printed
    assert "trained shuffled_layers" in " ".join(printed.split())
    png = tmp_path / "out/shuffled_layers/token_swaps.png"
    assert png.read_bytes().startswith(b"\x89PNG")
    written = png.stat().st_mtime_ns
    cli.main(command)
    assert capsys.readouterr().out == printed
    assert png.stat().st_mtime_ns == written
    settings = TokenDependenceSettings("sae", "other.parquet")
    with pytest.raises(ValueError, match=r"other settings:\n.*`dataset_path`"):
        token_dependence_study(settings, "out")
    with pytest.raises(ValueError, match=r"\['dataset_path'\] is missing"):
        run_settings({"sae": "sae"}, tmp_path / "new")


# Swaps.


def test_swapped_prompts_combine_the_texts():
    ids = torch.arange(4 * 12).view(4, 12) + 100
    ids[:, 0] = 1
    source = Prompts(ids, ids != 1)
    prompts = swaps.swapped_prompts(source, n_items=5, n_context=3, shift=2, seed=0)
    assert len(prompts) == 40
    assert (prompts.ids[:, 0] == 1).all()
    for item in prompts.ids.view(5, 8, -1):
        for cell, row in enumerate(item):
            end = 4 + 2 * (cell >> 2)
            context, token = row[end - 3 : end], row[end]
            assert (context.diff() == 1).all()
            assert prompts.counted.view(5, 8, -1)[0, cell].nonzero().item() == end
            # Bit 0 is the token, bit 1 the context; the third text comes before.
            assert (token == item[cell & 1][4]).item()
            assert context.equal(item[cell & 2][1:4])
            if cell >> 2:
                assert row[1:3].equal(item[0][5:7])
        assert item[0][4] == item[0][3] + 1  # a token in its own context
        assert item[3][4] == item[3][3] + 1


def test_distances_are_those_of_scipy_and_effects_those_of_a_regression(
    model, tokens, monkeypatch
):
    seen = []
    original = swaps._compare
    monkeypatch.setattr(
        swaps, "_compare", lambda a, b, rng: seen.append((a, b)) or original(a, b, rng)
    )
    sae = random_sae(k=16)  # so that all prompts share latents
    result = token_swaps(sae, model, tokens, n_items=3, n_context=4, shift=2)
    a, b = seen[0]  # the cells 0 and 1 of the first item
    expected, weights = [], []
    for i, latent in enumerate(a.latent):
        for k in np.flatnonzero(b.latent == latent):
            p, q = (np.diff(c, prepend=0) for c in (a.cdf[i], b.cdf[k]))
            expected.append(wasserstein_distance([0, 1], [0, 1], p, q))
            weights.append(a.total[i] + b.total[k])
    found = original(a, b, np.random.default_rng(0))
    assert found[0] == pytest.approx(np.average(expected, weights=weights))
    assert found[2] == pytest.approx(sum(weights) / (a.total.sum() + b.total.sum()))
    table = result.to_dataframe()
    # Effects are twice the coefficients of factors coded as -1 and 1.
    code = np.array([[2 * (cell >> i & 1) - 1 for i in range(3)] for cell in range(8)])
    design = np.stack(
        [np.prod(code[:, [i for i in range(3) if s >> i & 1]], 1) for s in range(8)], 1
    )
    means = result.distances.nanmean(0).numpy()
    coefficients = np.linalg.solve(design.astype(float), means)
    assert table["effect"].to_numpy() == pytest.approx(2 * coefficients[1:])
    assert table.index[:3].tolist() == ["token", "context", "token x context"]


def test_a_single_shared_latent_has_no_other_to_compare_with():
    cdf = np.array([[0.0, 1.0], [0.5, 1.0]])
    a = swaps._TokenLayers(np.array([3, 8]), np.array([1.0, 2.0]), cdf)
    b = swaps._TokenLayers(np.array([8, 9]), np.array([1.0, 4.0]), cdf)
    distance, by_chance, shared = swaps._compare(a, b, np.random.default_rng(0))
    assert distance == pytest.approx(0.5)
    assert np.isnan(by_chance)
    assert shared == pytest.approx(3 / 8)
    columns = torch.zeros(3, 2, 8, dtype=torch.float64)
    columns[1, 0], columns[1, 1, 1] = torch.nan, 2.0  # one item has a second latent
    columns[1, 1, 2:] = torch.nan
    table = TokenSwaps(HOOK_NAMES, "", 4, 2, *columns).to_dataframe()
    assert table["by_chance"]["token"] == 2
    assert table["by_chance"].drop("token").isna().all()


def test_only_what_is_swapped_changes_the_layers(model, tokens, tmp_path):
    """Without attention and positions, only the token matters."""
    with torch.no_grad():
        for block in model.blocks:
            block.attn.W_O.zero_()
        model.W_pos.zero_()
    result = token_swaps(random_sae(), model, tokens, n_items=8, n_context=4, shift=2)
    table = result.to_dataframe()
    unchanged = table.loc[["context", "position", "context x position"]]
    assert unchanged["distance"].to_numpy() == pytest.approx(0, abs=1e-6)
    assert unchanged["shared"].to_numpy() == pytest.approx(1)
    assert table["distance"]["token"] > 0.1
    result.save(tmp_path / "swaps")
    again = TokenSwaps.load(tmp_path / "swaps").to_dataframe()
    pd.testing.assert_frame_equal(again, table)
    (picture,) = result.pictures().values()
    assert len(draw(picture).axes) == len(draw_interactive(picture)) == 2


def test_bad_swaps(model, tokens):
    sae = random_sae()
    with pytest.raises(ValueError, match=r"at least 3 prompts.*got 2 of 16"):
        token_swaps(sae, model, tokens[:2], n_context=4, shift=2)
    with pytest.raises(ValueError, match="two prompts with different tokens"):
        token_swaps(sae, model, torch.ones(3, N_CTX).long(), n_context=4, shift=2)
