"""The comparison of contestants.

Authority: sizes, costs and bits computed by hand; brute force over small codes; dense
definitions; the ordinary evaluation of an SAE.
"""

from itertools import combinations, pairwise
from math import comb, log2
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import D_MODEL, D_VOCAB, N_CTX, count_calls, tiny_model
from datasets import Dataset
from sae_lens import SAE
from test_sweeps import BASE

from sae_lens_multilayer import (
    MultiLayerSAETrainingRunner,
    PointsFailedError,
    SweepEvaluation,
    evaluate,
)
from sae_lens_multilayer.store.source import Source
from sae_lens_multilayer.studies.comparison import (
    CONTESTANTS,
    ComparisonResult,
    ComparisonSettings,
    Quantiser,
    Size,
    comparison_study,
)
from sae_lens_multilayer.studies.comparison import study as study_module
from sae_lens_multilayer.studies.comparison.bits import (
    bits_of_separate_latents,
    bits_of_shared_latents,
    k_of_bits,
    log2_choose,
    n_distinct,
)
from sae_lens_multilayer.studies.comparison.codecs import (
    PCACodec,
    ResidualCodec,
)
from sae_lens_multilayer.studies.comparison.measure import (
    AllLayers,
    _added,
    _chosen_sums,
    at_budget,
    chosen_numbers,
    fvu_by_layer,
)
from sae_lens_multilayer.studies.comparison.residuals import (
    ResidualSource,
    fit_predictions,
)
from sae_lens_multilayer.topk.sparse import TopKActs

N_LAYERS = 3
SIZES = {"sae": {"expansion_factor": 2, "k": 4, "k_aux": 8}}
ALL = ("mlsae", "single_layers", "residualised", "pca", "crosscoder", "routed")


def test_sizes_and_costs_are_those_computed_by_hand():
    # d = 10, L = 5, n = 40, k = 3.
    mlsae, cost = Size(40, 3), (5, 10)
    one, singles, residualised, pca, crosscoder, routed = (CONTESTANTS[n] for n in ALL)
    assert one.parameters(*cost, mlsae) == 2 * 10 * 40 == 800
    assert one.operations(*cost, mlsae) == 2 * 5 * 10 * 40 == 4000
    assert one.size("parameters", 5, mlsae, 0.0, 4) == mlsae

    same = singles.size("operations", 5, mlsae, 0.0, 4)
    assert same == mlsae
    assert singles.operations(*cost, same) == 4000
    assert singles.parameters(*cost, same) == 5 * 800
    few = singles.size("parameters", 5, mlsae, 0.0, 4)
    assert few == Size(8, 3)
    assert singles.parameters(*cost, few) == 800
    assert singles.operations(*cost, few) == 800

    # Four maps of 10 x 10.
    assert residualised.parameters(*cost, few) == 800 + 400
    assert residualised.operations(*cost, few) == 800 + 800
    assert pca.parameters(*cost, mlsae) == 5 * 10 * 3
    assert pca.operations(*cost, mlsae) == 2 * 5 * 10 * 3

    # log2 C(40, 3) = 13.27, so a layer with k = 3, q = 4 takes 25.27 bits.
    bits = 5 * (log2(comb(40, 3)) + 12)
    assert singles.size("bits", 5, mlsae, bits, 4) == Size(40, 3)
    # And one code for all layers with k = 15: log2 C(40, 15) = 35.2, and 60 bits.
    assert crosscoder.parameters(*cost, Size(40, 3)) == 5 * 800
    assert crosscoder.operations(*cost, Size(40, 3)) == 4000
    assert crosscoder.size("bits", 5, mlsae, 95.2, 4) == Size(40, 15)
    assert crosscoder.size("parameters", 5, mlsae, 0.0, 4) == Size(8, 3)
    # One layer of 5 is encoded, and a router of 10 x 5 weights chooses it.
    many = routed.size("operations", 5, mlsae, 0.0, 4)
    assert many == Size(200, 3)
    assert routed.operations(*cost, many) == 4000 + 100
    assert routed.size("parameters", 5, mlsae, 0.0, 4) == mlsae
    assert routed.parameters(*cost, mlsae) == 800 + 50
    assert pca.size("bits", 5, mlsae, 120.0, 4) == Size(0, 6)


def test_bits_are_counts_of_all_possible_codes():
    """log2 of the number of codes that a brute force can list."""
    for n, k in [(5, 2), (6, 3), (4, 4)]:
        assert log2_choose(n, k).item() == pytest.approx(
            log2(len([*combinations(range(n), k)]))
        )
    # Two layers; token 0 has latents {1, 2} and {2, 0}, token 1 has {3} and {3}.
    latents = torch.tensor([[[1, 2], [2, 0]], [[3, 0], [0, 3]]])
    active = torch.tensor([[[1, 1], [1, 1]], [[1, 0], [0, 1]]]).bool()
    assert n_distinct(latents, active).tolist() == [3, 1]
    shared = bits_of_shared_latents(latents, active, 6, 5)
    assert shared.tolist() == pytest.approx(
        [log2(comb(6, 3)) + 3 * 2 + 4 * 5, log2(6) + 2 + 2 * 5]
    )
    separate = bits_of_separate_latents(active, 6, 5)
    assert separate.tolist() == pytest.approx(
        [2 * log2(comb(6, 2)) + 4 * 5, 2 * log2(6) + 2 * 5]
    )


@pytest.mark.parametrize(("n", "groups", "q"), [(64, 1, 4), (30, 6, 2), (1, 2, 4)])
def test_the_k_of_bits_is_the_nearest_of_all(n, groups, q):
    for bits in (1.0, 100.0, 333.0):
        k = k_of_bits(bits, n, groups, q)
        all_k = range(1, max(2, n // 2 + 1))
        distance = {i: abs(groups * (log2(comb(n, i)) + i * q) - bits) for i in all_k}
        assert distance[k] == pytest.approx(min(distance.values()))


def test_the_quantiser_is_lloyds_and_its_error_falls_with_the_bits():
    values = torch.randn(2000).abs() ** 2
    values[::5] = 0
    errors: list[float] = []
    for bits in (1, 2, 3, 4, 6):
        quantise = Quantiser.fit(values, bits)
        after = quantise(values)
        assert len(after[after != 0].unique()) <= 2**bits
        assert (after[values == 0] == 0).all()
        # Lloyd's conditions: each level is the mean of the values nearest to it.
        near = (values[values > 0].double()[:, None] - quantise.levels).abs().argmin(1)
        for level, at in enumerate(quantise.levels):
            mean = values[values > 0].double()[near == level].mean()
            assert at.item() == pytest.approx(mean.item(), rel=1e-2)
        errors.append((after - values).square().sum().item())
    assert all(b < a for a, b in pairwise(errors))
    exact = torch.tensor([0.0, 1.0, 2.0, 5.0])
    assert Quantiser.fit(exact, 2)(exact).tolist() == exact.tolist()
    # Two levels of four values: brute force over the splits.
    four = torch.tensor([1.0, 2.0, 6.0, 7.5])
    splits = [
        sum((part - part.mean()).square().sum() for part in (four[:i], four[i:]))
        for i in range(1, 4)
    ]
    error = (Quantiser.fit(four, 1)(four) - four).square().sum()
    assert error.item() == pytest.approx(float(min(splits)))


def test_fvu_between_two_rates_is_interpolated_in_logs():
    rows = [
        {"k": 1, "q": 2, "bits": 100.0, "fvu": [0.4, 0.8]},
        {"k": 2, "q": 2, "bits": 400.0, "fvu": [0.1, 0.2]},
        {"k": 1, "q": 3, "bits": 150.0, "fvu": [0.35, 0.7]},
        {"k": 2, "q": 3, "bits": 250.0, "fvu": [0.05, 0.1]},
    ]
    # At q = 2, halfway between in log bits.
    assert at_budget(rows[:2], 200.0) == {"q": 2, "fvu": pytest.approx([0.2, 0.4])}
    assert at_budget(rows, 250.0) == {"q": 3, "fvu": pytest.approx([0.05, 0.1])}
    # More bits need not be used: at q = 3 and 250 bits, or at q = 2 and 100.
    assert at_budget(rows, 9e9) == {"q": 3, "fvu": [0.05, 0.1]}
    rising = [rows[0], {**rows[1], "fvu": [0.9, 0.9]}]
    assert at_budget(rising, 300.0) == {"q": 2, "fvu": [0.4, 0.8]}
    assert at_budget(rows, 99.0) is None


def test_pca_has_the_least_error_of_all_linear_codes():
    x = torch.randn(300, 2, 8) @ torch.randn(8, 8) + 3
    codec = PCACodec(x)
    u = (x - x.mean(2, keepdim=True)) / x.std(2, keepdim=True)
    for k in (1, 3):
        code = codec.encode(x, k)
        u_hat = (codec.decode(code) - code.mean) / code.std
        for layer in range(2):
            centred = u[:, layer] - u[:, layer].mean(0)
            rest = torch.linalg.svdvals(centred)[k:].square().sum()
            error = (u_hat[:, layer] - u[:, layer]).square().sum()
            assert error.item() == pytest.approx(rest.item(), rel=1e-3)
        assert codec.bits(code, 5).tolist() == [2 * k * 5] * 300
        torch.testing.assert_close(
            code.values.std(0), torch.ones(2, k), rtol=0.01, atol=0
        )
    everything = codec.reconstruct(x, 8)
    torch.testing.assert_close(everything, x, rtol=1e-4, atol=1e-3)


class _Given(Source):
    """Vectors in memory, in chunks of ten tokens."""

    def __init__(self, x: torch.Tensor) -> None:
        self._x, self.hook_names = x, [f"hook_{i}" for i in range(x.shape[1])]
        self.d_in, self.dtype = x.shape[2], x.dtype
        self.max_tokens_per_chunk, self.excluded_token_ids = 10, []

    def next_chunk(self):
        self.n_chunks += 1
        self.epoch_ended = self.n_chunks * 10 >= len(self._x)
        return torch.tensor([[self.n_chunks - 1]])

    def n_tokens(self, chunk):
        return 10

    def vectors(self, chunk, rows=None):
        x = self._x[int(chunk) * 10 :][:10]
        for layer in range(x.shape[1]):
            yield x[:, layer] if rows is None else x[rows, layer]

    def state(self):
        return {"n_chunks": torch.tensor(self.n_chunks)}

    def resume(self, state):
        self.n_chunks = int(state["n_chunks"])


def test_residuals_are_what_least_squares_leaves():
    x = torch.randn(60, 2, 5)
    x[:, 1] += x[:, 0] @ torch.randn(5, 5) + 2
    (prediction,) = fit_predictions(x)
    source: Any = ResidualSource(_Given(x), prediction)
    parts = [next(source.vectors(source.next_chunk())) for _ in range(6)]
    residual = torch.cat(parts).double()
    assert source.epoch_ended
    assert source.hook_names == ["hook_1"]
    # With a constant as one more input.
    ones = torch.cat([x[:, 0].double(), torch.ones(60, 1).double()], 1)
    y = x[:, 1].double()
    expected = y - ones @ torch.linalg.lstsq(ones, y).solution
    torch.testing.assert_close(residual, expected, rtol=0, atol=1e-4)
    some = next(source.vectors(torch.tensor([[2]]), torch.tensor([3, 1])))
    torch.testing.assert_close(some, parts[2][[3, 1]])


class _Half:
    """Stands for an SAE that reconstructs half of each vector."""

    cfg = Size(4, 1)

    def encode_topk(self, x, hook):
        zero = torch.zeros(len(x), 1)
        return TopKActs(x / 2, torch.zeros_like(x).long(), zero, zero + 1)

    def decode_topk(self, code, hook):
        return code.values


def test_residuals_are_coded_with_the_errors_of_the_layers_before():
    x = torch.randn(50, 3, 4)
    predictions = fit_predictions(x)
    codec = ResidualCodec([_Half()] * 3, predictions)
    x_hat = codec.decode(codec.encode(x, 1))
    before = x[:, 0] / 2
    torch.testing.assert_close(x_hat[:, 0], before)
    for layer, predict in enumerate(predictions, 1):
        before = predict(before) + (x[:, layer] - predict(before)) / 2
        torch.testing.assert_close(x_hat[:, layer], before)


def test_with_all_layers_replaced_later_layers_are_clean_and_earlier_ones_are_not():
    """A codec that returns the mean of all layers, so that each input can be seen."""

    class Mean(PCACodec):
        def __init__(self):
            self.seen = []

        def reconstruct(self, x, k):
            self.seen.append(x.clone())
            return x.mean(1, keepdim=True).expand_as(x)

    clean = torch.randn(2, 3, 3, 4)  # [prompt, pos, layer, d_in]
    counted = torch.ones(2, 3, dtype=torch.bool)
    counted[0, 0] = False
    codec = Mean()
    replace = AllLayers(codec, 1, clean, counted)
    x = clean
    for layer in range(3):
        stream = clean[:, :, layer] + layer  # as if changed by the earlier layers
        after = replace(layer, stream)
        assert torch.equal(after[0, 0], stream[0, 0])
        x = torch.cat([x[:, :, :layer], stream.unsqueeze(2), x[:, :, layer + 1 :]], 2)
        assert torch.equal(codec.seen[-1], x[counted])
        assert torch.equal(after[counted], x[counted].mean(1))


@pytest.fixture
def deep(tokenizer) -> Any:
    return tiny_model(tokenizer, n_layers=N_LAYERS)


@pytest.fixture
def held_out():
    tokens = torch.randint(1, D_VOCAB, (16, N_CTX))
    return Dataset.from_dict({"input_ids": tokens.tolist()})


@pytest.fixture
def run(deep, token_dataset, held_out, tmp_path):
    def compare(contestants=("mlsae", "single_layers"), **changes) -> ComparisonResult:
        of_study = ("matchings", "seeds", "budgets")
        base = {n: v for n, v in changes.items() if n not in of_study}
        settings = ComparisonSettings(
            {**BASE, **SIZES, **base},
            contestants,
            bits_per_value=(2, 4),
            n_fit_tokens=4 * D_MODEL,
            evaluation=SweepEvaluation(n_tokens=8 * N_CTX, exclude_positions=(0,)),
            **{n: v for n, v in changes.items() if n in of_study},
        )
        return comparison_study(
            settings,
            tmp_path / "out",
            override_model=deep,
            override_dataset=token_dataset,
            override_evaluation_dataset=held_out,
        )

    return compare


def test_metrics_are_those_of_the_ordinary_evaluation(run, deep, held_out, tmp_path):
    found = run().by_layer().set_index("contestant")
    tokens = torch.tensor(held_out["input_ids"][:8])
    folder = tmp_path / "out"
    multi = SAE.load_from_disk(folder / "seed42_mlsae/sae/sae")
    singles = [
        SAE.load_from_disk(folder / f"seed42_single_layers_operations/layer_{i}/sae")
        for i in range(N_LAYERS)
    ]
    for name, sae in (("mlsae", multi), ("single_layers", singles)):
        metrics = evaluate(sae, deep, tokens, exclude_positions=[0], together="all")
        expected = metrics.to_dataframe()
        for column in ("fvu", "fvu_scalar", "delta_ce", "kl_div"):
            assert found.loc[name, column].to_numpy() == pytest.approx(
                expected[column].to_numpy(), rel=1e-4, abs=1e-6
            )
        rows = ComparisonResult.load(folder / "result").rows
        row = next(row for row in rows if row["contestant"] == name)
        assert metrics.together is not None
        assert row["delta_ce_all"] == pytest.approx(
            metrics.together["delta_ce"], rel=1e-4, abs=1e-6
        )


def test_every_contestant_and_matching_runs_and_the_study_resumes(
    run, monkeypatch, tmp_path
):
    changes: dict[str, Any] = {
        **{"layers": [0, 2], "seeds": (0, 1), "budgets": (30, 60)},
        "matchings": ("bits",),
    }
    trainings = count_calls(monkeypatch, MultiLayerSAETrainingRunner, "run")
    found = run(ALL, **changes)
    # For each seed an MLSAE, two SAEs of two contestants each, a crosscoder and a
    # routed SAE.
    n_trained = 2 * (1 + 2 * 2 + 2)
    assert len(trainings) == n_trained
    table = found.to_dataframe()
    assert len(table) == 2 * len(ALL)
    assert table[["fvu", "delta_ce", "delta_ce_all", "bits"]].notna().all().all()
    equal = table.set_index(["seed", "contestant"])
    for seed in (0, 1):
        bits = equal.bits[seed, "mlsae"]
        assert equal.k[seed, "pca"] == round(bits / (2 * 4))
        expected = k_of_bits(bits, 32, 2, 4)
        assert equal.k[seed, "single_layers"] == expected
    for row in found.rows:
        line = [r for r in row["rates"] if r["q"] == 4]
        assert (np.diff([r["bits"] for r in line]) > 0).all()
        # More latents than in training can harm an SAE, but hardly at first.
        assert np.mean(line[1]["fvu"]) < np.mean(line[0]["fvu"])
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert names == {"layers.png", "rates.png", "costs.png"}
    loaded = ComparisonResult.load(tmp_path / "out/result")
    pd.testing.assert_frame_equal(loaded.to_dataframe(), table)

    again = run(ALL, **changes)
    assert len(trainings) == n_trained
    pd.testing.assert_frame_equal(again.to_dataframe(), table)
    with pytest.raises(ValueError, match=r"(?s)made with other.*`lr`"):
        run(ALL, lr=0.5, **changes)


def test_what_has_the_same_sizes_in_two_matchings_is_measured_once(run, monkeypatch):
    measured = count_calls(monkeypatch, study_module, "measure")
    changes: dict[str, Any] = {"layers": [0, 1], "budgets": (60,)}
    rows = run(("mlsae", "pca"), matchings=("operations", "parameters"), **changes).rows
    assert len(measured) == 2
    of_pca = [row for row in rows if row["contestant"] == "pca"]
    assert [row["matching"] for row in of_pca] == ["operations", "parameters"]
    assert of_pca[0]["fvu"] == of_pca[1]["fvu"]


def test_the_mean_vectors_have_an_fvu_of_one():
    x = torch.randn(50, 2, 4)
    assert fvu_by_layer(x, x.mean(0).expand_as(x)) == pytest.approx([1, 1])


def test_the_fvu_at_the_chosen_layer_is_that_of_a_loop(run, deep, held_out, tmp_path):
    """Brute force from the definition; the dense router chooses the layers."""
    row = run(("mlsae", "routed"), layers=[0, 1, 2]).summary().set_index("contestant")
    sae: Any = SAE.load_from_disk(tmp_path / "out/seed42_routed_operations/sae/sae")
    tokens = held_out["input_ids"][:8]
    _, cache = deep.run_with_cache(tokens)
    names = sae.cfg.metadata.hook_names
    x = torch.stack([cache[name] for name in names], 2)[:, 1:].flatten(0, 1)
    x_hat = sae(x).detach()
    u = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)
    chosen = (u.mean(1) @ sae.W_router).argmax(-1).tolist()
    total, n_tokens = 0.0, 0
    for layer in set(chosen):
        at = [t for t, one in enumerate(chosen) if one == layer]
        mean = sum(x[t, layer] for t in at) / len(at)
        error = sum((x[t, layer] - x_hat[t, layer]).square().sum() for t in at)
        spread = sum((x[t, layer] - mean).square().sum() for t in at)
        if len(at) > 1:
            total += len(at) * float(error / spread)
            n_tokens += len(at)
    assert row.fvu_chosen["routed"] == pytest.approx(total / n_tokens, rel=1e-3)
    shares = np.unique(chosen, return_counts=True)[1] / len(chosen)
    assert row.layers_chosen["routed"] == pytest.approx(np.prod(shares**-shares))
    assert np.isnan(row.fvu_chosen["mlsae"])


def test_batches_without_a_layer_change_nothing_of_its_fvu():
    x = torch.randn(90, 3, 8, generator=torch.Generator().manual_seed(0))
    x_hat = x + torch.tensor([0.1, 0.9, 0.5]).view(3, 1) * x.flip(0)
    # Layer 1 is missing from the second batch, layer 2 from both.
    chosen = torch.cat([torch.arange(60) % 2, torch.zeros(30)]).long()
    parts = (slice(0, 60), slice(60, 90))
    first, second = (_chosen_sums(x[s], x_hat[s], chosen[s]) for s in parts)
    expected = chosen_numbers(_chosen_sums(x, x_hat, chosen))
    assert chosen_numbers(_added(first, second)) == pytest.approx(expected)
    assert chosen_numbers(_added(second, first)) == pytest.approx(expected)


def test_a_layer_chosen_for_one_token_has_no_fvu():
    """Two tokens of layer 0 and one of layer 1, computed by hand."""
    x, x_hat = torch.zeros(3, 2, 1), torch.zeros(3, 2, 1)
    x[:, 0, 0], x[:, 1, 0] = (
        torch.tensor([0.0, 2.0, 9.0]),
        torch.tensor([8.0, 7.0, 6.0]),
    )
    x_hat[:, 0, 0] = torch.tensor([0.0, 1.0, 5.0])
    sums = _chosen_sums(x, x_hat, torch.tensor([0, 0, 1]))
    found = chosen_numbers(sums)
    assert found["fvu_chosen"] == pytest.approx(1 / 2)
    assert found["layers_chosen"] == pytest.approx(3 / 2 ** (2 / 3))
    alone = chosen_numbers(_chosen_sums(x[2:], x_hat[2:], torch.tensor([1])))
    assert np.isnan(alone["fvu_chosen"])
    assert alone["layers_chosen"] == 1


def test_failed_contestants_are_reported_and_the_others_run(run, monkeypatch, tmp_path):
    original = MultiLayerSAETrainingRunner.run

    def fail(self):
        if len(self.prepared.hook_names) > 1:
            raise FloatingPointError("The loss is nan.")
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(MultiLayerSAETrainingRunner, "run", fail)
        with pytest.raises(PointsFailedError, match=r"(?s)loss is nan.*bits of seed42"):
            run(layers=[0, 1], matchings=("operations", "bits"))
    assert (tmp_path / "out/seed42_single_layers_operations/result").is_dir()
    assert len(run(layers=[0, 1], matchings=("operations", "bits")).rows) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [1]}, "two or more layers to compare"),
        ({"layers": [0, 3]}, r"in \[0, 3\)"),
        ({"kk": 1}, "no setting 'kk'"),
        ({"contestants": ["none"]}, "`contestants` must be"),
        ({"matchings": ["time"]}, "`matchings` must be"),
        ({"contestants": ["pca"], "matchings": ["bits"]}, "needs 'mlsae'"),
        ({"architecture": "topk"}, "must have the architecture 'multilayer'"),
    ],
)
def test_wrong_settings_are_errors(run, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(**changes)
    assert not (tmp_path / "out").exists()
