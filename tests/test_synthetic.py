"""The synthetic study: streams, their source, and every metric.

Authority: brute force over tokens, layers and pairs; hand-made cases; the ordinary
analyses; the normal distribution for streams.
"""

import math
from dataclasses import replace
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAETrainingRunner

from sae_lens_multilayer import MultiLayerSAETrainingRunner
from sae_lens_multilayer.analysis import layer_distributions, variances
from sae_lens_multilayer.analysis.active import ActiveLatents
from sae_lens_multilayer.evaluation.evaluation import reconstruction_metrics
from sae_lens_multilayer.sae.config import MultiLayerTrainingSAEConfig
from sae_lens_multilayer.studies.synthetic import (
    ARMS,
    StreamConfig,
    SyntheticModel,
    SyntheticSettings,
    SyntheticSource,
    SyntheticStream,
    recovery,
    synthetic_study,
)
from sae_lens_multilayer.studies.synthetic import study as study_module
from sae_lens_multilayer.studies.synthetic.matching import (
    NONE,
    chain,
    correlations,
    join_tokens,
    match,
    nearest,
)
from sae_lens_multilayer.studies.synthetic.metrics import (
    _token_metrics,
    layer_totals,
    sharing,
    splitting,
    variance_parts,
    w1,
)

SMALL = StreamConfig(
    n_layers=3, d_in=16, n_features=12, l0=2.0, max_span=3, context_size=32
)


def sparse(dense):
    """Dense activations [token, layer, latent] as an analysis has them."""
    token, layer, latent = dense.nonzero(as_tuple=True)
    value = dense[token, layer, latent].double()
    n_tokens, n_layers, n_latents = dense.shape
    return ActiveLatents(n_tokens, n_layers, n_latents, token, layer, latent, value)


def dense(acts):
    values = torch.zeros(acts.n_tokens, acts.n_layers, acts.d_sae, dtype=torch.double)
    values[acts.token, acts.layer, acts.latent] = acts.value
    return values


def random_acts(n_latents, seed, n_tokens=40, n_layers=3):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(n_tokens, n_layers, n_latents, generator=generator)
    return (values * (values > 0.6)).double()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rotation": "feature", "theta": 15.0, "profile": "ramp", "jitter_std": 0.5},
        {"hierarchical": True, "correlation": 0.2, "profile": "returning"},
        {"theta": 30.0, "bias_norm": 1.0, "n_outlier_dims": 2, "sink_norm": 9.0},
    ],
)
def test_vectors_are_what_the_definition_says(changes):
    cfg = replace(SMALL, noise_std=0.0, **changes)
    stream = SyntheticStream(cfg)
    tokens = stream.prompt(3)
    parts = dense(tokens.truth).float()
    for layer in range(cfg.n_layers):
        x = parts[:, layer] @ stream.directions[layer] + stream.biases[layer]
        x = cfg.growth**layer * x + stream.outliers
        x[0] += stream.sink
        torch.testing.assert_close(tokens.x[:, layer], x)
    angle = math.cos(math.radians(cfg.theta))
    for before, after in pairwise(stream.directions):
        torch.testing.assert_close((before * after).sum(1), torch.full((12,), angle))


def test_prompts_and_seeds_are_independent():
    def firing(seed: int, prompt: int) -> torch.Tensor:
        cfg = replace(SMALL, seed=seed, context_size=2_000)
        acts = dense(SyntheticStream(cfg).prompt(prompt).truth).sum(1)
        fires = (acts > 0).float()
        return (fires - fires.mean(0)).flatten()

    one = firing(0, prompt=0)
    for other in (firing(1, prompt=0), firing(0, prompt=1)):
        assert torch.stack([one, other]).corrcoef()[0, 1].abs() < 0.1


def test_without_an_angle_both_kinds_of_rotation_give_one_stream():
    straight = replace(SMALL, theta=0.0)
    common, own = (
        SyntheticStream(replace(straight, rotation=kind)).prompt(0).x
        for kind in ("common", "feature")
    )
    torch.testing.assert_close(own, common)


def test_truth_follows_the_normal_distribution_and_the_frequencies():
    """P(feature active at layer l) = P(m > 0) P(l - s < o <= l), o normal."""
    cfg = replace(
        SMALL, shift_std=0.8, jitter_std=0.6, hierarchical=True, context_size=20_000
    )
    stream = SyntheticStream(cfg)
    tokens = stream.prompt(0)
    rate = (dense(tokens.truth) > 0).double().mean(0)
    normal = torch.distributions.Normal(stream.onset, 1.0)  # 0.8^2 + 0.6^2
    layers = torch.arange(3).view(-1, 1)
    inside = normal.cdf(layers) - normal.cdf(layers - stream.span)
    frequency = rate.sum(0) / inside.sum(0)
    assert frequency.sum().item() == pytest.approx(2.0, abs=0.1)
    torch.testing.assert_close(rate, inside * frequency, atol=0.02, rtol=0)
    assert frequency.max() / frequency.min() == pytest.approx(10, rel=0.35)


def test_a_shift_of_all_features_adds_to_the_variance_between_tokens_only():
    """Law of the study: s_a^2 + beta^2 Var(c), and 1/12 as layers are whole numbers."""
    cfg = StreamConfig(
        n_layers=24, min_span=3, max_span=3, n_features=64, l0=4.0, context_size=20_000
    )

    def parts(**changes):
        stream = SyntheticStream(replace(cfg, **changes))
        inside = (stream.onset > 6) & (stream.onset < 15)
        kept = dense(stream.prompt(0).truth)[:, :, inside]
        found = variance_parts(sparse(kept))
        return found["within_token"], found["between_tokens"]

    within, between = parts()
    assert within == pytest.approx(2 / 3)  # (3^2 - 1) / 12
    assert between == pytest.approx(0, abs=1e-9)
    within, between = parts(shift_std=1.5, covariate_shift=2.0)
    assert within == pytest.approx(2 / 3, rel=0.01)
    assert between == pytest.approx(1.5**2 + 2.0**2 / 4 + 1 / 12, rel=0.05)


def test_a_source_is_trained_on_and_resumed_exactly(make_config):
    stream = SyntheticStream(SMALL)
    sae = MultiLayerTrainingSAEConfig(d_in=16, d_sae=24, k=3)
    settings = {"training_tokens": 640, "context_size": 32, "n_checkpoints": 3}

    def run(**changes):
        cfg = make_config(sae, **settings, **changes)
        source = SyntheticSource(stream, n_prompts=7)  # not a multiple of a batch
        runner: Any = SAETrainingRunner  # with our argument
        return runner(cfg, override_source=source)

    whole = run(output_path=None)
    weights = whole.run().state_dict()
    assert whole.sae.cfg.metadata.hook_names == SMALL.hook_names
    checkpoints = sorted(
        _folders(whole.cfg.checkpoint_path), key=lambda path: int(path.name)
    )
    resumed = run(output_path=None, resume_from_checkpoint=str(checkpoints[0])).run()
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def _folders(path):
    return [p for p in Path(path).iterdir() if p.name.isdigit()]


def test_a_source_of_another_width_is_named(make_config):
    with pytest.raises(ValueError, match="`d_in` must be 16"):
        MultiLayerSAETrainingRunner(
            make_config(MultiLayerTrainingSAEConfig(d_in=8, d_sae=24, k=3)),
            override_source=SyntheticSource(SyntheticStream(SMALL), 4),
        )


def test_analyses_take_a_stream_as_a_model(make_config):
    """Reference: the same sums over the vectors, encoded by hand."""
    stream = SyntheticStream(SMALL)
    model = SyntheticModel(stream)
    sae_cfg = MultiLayerTrainingSAEConfig(d_in=16, d_sae=24, k=3)
    cfg = make_config(sae_cfg, training_tokens=256, output_path=None)
    source = SyntheticSource(stream, 8)
    sae = MultiLayerSAETrainingRunner(cfg, override_source=source).run()
    prompts = model.prompts(8, 3)
    x = torch.cat([stream.prompt(8 + i).x for i in range(3)])
    acts = sparse(sae.encode(x).detach())
    dists = layer_distributions(sae, model, prompts)
    # Activations are float32, from batches of other sizes.
    torch.testing.assert_close(dists.totals, layer_totals(acts), rtol=1e-6, atol=1e-6)
    summary = variances(sae, model, prompts).summary
    parts = variance_parts(acts)
    assert parts["total"] == pytest.approx(summary.var_l)
    assert parts["within_token"] == pytest.approx(summary.exp_var_l_jt)
    between = summary.exp_var_l_j - summary.exp_var_l_jt
    assert parts["between_tokens"] == pytest.approx(between)
    assert reconstruction_metrics(sae, model, prompts).n_tokens == 96
    with pytest.raises(ValueError, match="whole"):
        layer_distributions(sae, model, prompts[:, 1:])


def test_correlation_and_matching_equal_brute_force():
    acts, truth = random_acts(4, 0), random_acts(3, 1)
    found = correlations(sparse(acts), sparse(truth))
    flat = torch.cat([acts.flatten(0, 1), truth.flatten(0, 1)], 1).T
    torch.testing.assert_close(found, torch.corrcoef(flat)[:4, 4:])
    best = max(permutations(range(4), 3), key=lambda p: found[list(p), range(3)].sum())
    assert match(found).tolist() == list(best)
    assert match(found[:2]).tolist().count(NONE) == 1


def test_the_nearest_active_latent_equals_brute_force():
    acts, truth = random_acts(5, 2), random_acts(4, 3)
    cos = torch.rand(3, 5, 4)
    of_part, of_act = nearest(cos, sparse(acts), sparse(truth))

    def best(t, layer, scores, active):
        names = active[t, layer].nonzero().flatten()
        return int(names[scores[names].argmax()]) if len(names) else NONE

    parts, found = sparse(truth), sparse(acts)
    for t, layer, f, j in zip(
        parts.token, parts.layer, parts.latent, of_part, strict=True
    ):
        assert j == best(t, layer, cos[layer, :, f], acts)
    for t, layer, j, f in zip(
        found.token, found.layer, found.latent, of_act, strict=True
    ):
        assert f == best(t, layer, cos[layer, j], truth)


def test_splitting_counts_latents_at_other_layers_apart():
    mass = torch.zeros(2, 3, 4)  # layer, latent, feature
    mass[:, 0, 0] = torch.tensor([3.0, 3.0])  # one latent: no splitting
    mass[0, 0, 1], mass[1, 1, 1] = 6.0, 2.0  # a second at the other layer
    mass[:, 0, 2] = torch.tensor([3.0, 3.0])
    mass[:, 1, 2] = torch.tensor([1.0, 1.0])  # a second at the same layers
    mass[0, 0, 3] = 3.0  # and a quarter without any latent
    split, by_layer = splitting(mass, torch.tensor([6.0, 8.0, 8.0, 4.0]))
    assert split.tolist() == [0, 0.25, 0.25, 0.25]
    assert by_layer.tolist() == [0, 0.25, 0, 0]


def test_sharing_counts_other_features_at_other_layers():
    mass = torch.zeros(2, 3, 3)  # layer, feature, latent
    mass[:, 0, 0] = torch.tensor([1.0, 1.0])  # one feature
    mass[0, 0, 1], mass[1, 1, 1] = 3.0, 1.0  # another at the second layer
    mass[:, 0, 2], mass[:, 1, 2] = 3.0, 1.0  # two at each layer
    shared, polysemantic = sharing(mass, torch.tensor([2.0, 4.0, 8.0]))
    assert shared.tolist() == [0, 0.25, 0]
    assert polysemantic.tolist() == [0, 0, 0.25]


def test_w1_is_the_distance_that_mass_is_moved():
    p = torch.tensor([[1.0, 0.5], [0.0, 0.5], [0.0, 0.0]])
    q = torch.tensor([[0.0, 0.0], [0.0, 0.5], [2.0, 0.5]])
    assert w1(p, q).tolist() == [2, 1]


def test_token_metrics_equal_brute_force():
    acts, truth = random_acts(4, 4), random_acts(3, 5)
    latent_of = torch.tensor([2, NONE, 0])
    found = _token_metrics(sparse(acts), sparse(truth), latent_of)
    layers = torch.arange(3.0, dtype=torch.double)
    rows = []
    for t in range(40):
        for f in (0, 2):
            p, q = acts[t, :, latent_of[f]], truth[t, :, f]
            if p.sum() and q.sum():
                means = (layers @ q / q.sum(), layers @ p / p.sum())
                rows.append((f, float(q.sum()), float(w1(p, q)), *map(float, means)))
    weight = torch.tensor([row[1] for row in rows])
    assert found["tokens_covered"] == pytest.approx(float(weight.sum() / truth.sum()))
    distance = sum(row[1] * row[2] for row in rows) / float(weight.sum())
    assert found["token_profile_w1"] == pytest.approx(distance)
    # Least squares with a column for each feature's intercept.
    design = torch.tensor([[row[3], row[0] == 0, row[0] == 2] for row in rows]).double()
    y = torch.tensor([row[4] for row in rows]).double()
    root = weight.double().sqrt()[:, None]
    solution = torch.linalg.lstsq(design * root, y[:, None] * root).solution
    assert found["token_layer_slope"] == pytest.approx(float(solution[0]), rel=1e-4)


def test_a_perfect_sae_has_no_errors():
    stream = SyntheticStream(replace(SMALL, jitter_std=0.7))
    truth = join_tokens([stream.prompt(i).truth for i in range(20)])
    metrics, matches = recovery(truth, stream.directions, truth, stream.directions)
    assert matches["by_correlation"].tolist() == list(range(12))
    ones = {"mcc", "mcc_cosine", "token_layer_slope", "token_layer_r2"}
    ones |= {"tokens_covered", "features_covered"}
    assert metrics.pop("empty_vectors") > 0
    for name, value in metrics.items():
        if not name.endswith("_true"):
            one = name in ones
            assert value == pytest.approx(float(one), abs=1e-6), name


def test_activation_without_features_and_features_without_latents_are_counted():
    truth = torch.zeros(4, 2, 3).double()  # token, layer, feature
    truth[:3, 0] = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1]])  # 5 of 8 are empty
    acts = 2 * truth.clone()
    acts[..., 2] = 0  # this latent is dead
    acts[3, 1, 0] = 1  # at an empty vector: 1 of 5 of all activation
    acts[2, 0, 1] = 6  # more where it should not be: correlation below 0.5
    acts[3, 0, 0] = 1
    directions = torch.eye(3).expand(2, 3, 3)
    metrics, _ = recovery(sparse(acts), directions, sparse(truth), directions)
    assert metrics["empty_vectors"] == pytest.approx(5 / 8)
    assert metrics["empty_acts"] == pytest.approx(2 / 12)
    flat = torch.cat([acts.flatten(0, 1), truth.flatten(0, 1)], 1).T
    own = torch.corrcoef(flat).nan_to_num()[:3, 3:]
    best = max(permutations(range(3)), key=lambda p: own[list(p), range(3)].sum())
    n_covered = int((own[list(best), range(3)] > 0.5).sum())
    assert metrics["features_covered"] == pytest.approx(n_covered / 3)
    assert 0 < n_covered < 3


def test_single_layers_are_joined_by_their_decoders():
    first = torch.linalg.qr(torch.randn(6, 6))[0]
    order = torch.randperm(6)
    joint = chain([first, first[order], first[order][order]])
    assert torch.equal(joint[1], order)
    assert torch.equal(joint[2], order[order])


SETTINGS = {
    "seeds": [0, 1],
    "base": {**vars(SMALL)} | {"max_span": 3},
    "grid": {"theta": [0, 25]},
    "arms": [*ARMS],
    "training": {
        "sae": {"d_sae": 24, "k": 2, "dead_after_tokens": 2_000},
        "training_tokens": 1_024,
        "train_batch_size_tokens": 64,
        "n_batches_in_buffer": 4,
    },
    "n_eval_tokens": 512,
}


def settings(**changes):
    plain = {**SETTINGS, **changes}
    base = {n: v for n, v in plain["base"].items() if n not in ("seed", "theta")}
    return SyntheticSettings.from_settings({**plain, "base": base})


def test_a_study_is_resumed_and_has_a_row_for_each_arm(tmp_path, monkeypatch):
    monkeypatch.setitem(ARMS, "floor", replace(ARMS["floor"], find=_fail))
    with pytest.raises(RuntimeError, match="out of luck"):
        synthetic_study(settings(seeds=[0]), tmp_path)
    monkeypatch.undo()
    result = synthetic_study(settings(seeds=[0]), tmp_path)
    assert len(result.to_dataframe()) == 2 * len(ARMS)
    assert {p.name for p in tmp_path.glob("*.png")} >= {"recovery.png", "latents.png"}
    monkeypatch.setattr(study_module, "recovery", _fail)
    again = synthetic_study(settings(seeds=[0]), tmp_path)
    assert again.to_dataframe().equals(result.to_dataframe())


def _fail(*_):
    raise ValueError("out of luck")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"seeds": []}, "`seeds` must be a list"),
        ({"base": {"n_features": 3}}, "n_features` must be large enough for `l0`"),
        ({"base": {"n_features": 64, "l0": 1.0}, "training": {"sae": {"k": 65}}}, "k"),
        ({"base": {"n_layers": 10**9, "max_span": 6}}, "GiB of memory"),
        ({"base": {"d_in": 15}}, "even"),
        ({"arms": ["crosscoders"]}, "among"),
        ({"grid": {"theat": [0.0]}}, "theta"),
    ],
)
def test_bad_input_is_named_before_anything_is_generated(changes, match, tmp_path):
    with pytest.raises((ValueError, RuntimeError), match=match):
        synthetic_study(settings(**changes), tmp_path)


LAW = StreamConfig(n_layers=3, max_span=3, d_in=32, n_features=32, l0=2.0)


LONGER = {
    "training_tokens": 60_000,
    "train_batch_size_tokens": 128,
    "lr": 5e-3,
    "lr_decay_steps": 400,
}


def law(
    tmp_path, arm="mlsae", seeds=(0,), training: dict[str, Any] | None = None, **changes
):
    """Metrics of one arm on small streams without jitter: means over the seeds."""
    cfg = replace(LAW, **changes)
    found = synthetic_study(
        SyntheticSettings(
            seeds=[*seeds],
            base={n: v for n, v in vars(cfg).items() if n != "seed"},
            arms=[arm],
            training={
                "sae": {"d_sae": 64, "k": 2, "dead_after_tokens": 3_000},
                "training_tokens": 40_000,
                "train_batch_size_tokens": 256,
                "lr": 1e-2,
                **(training or {}),
            },
            n_eval_tokens=4_096,
        ),
        tmp_path / f"{arm} {changes}",
    )
    return found.to_dataframe().mean(numeric_only=True)


@pytest.mark.slow
def test_law_without_rotation_or_jitter_features_are_recovered(tmp_path):
    """The correlation is the true dictionary's, as TopK always keeps k latents."""
    seeds = (0, 1, 2)
    found = law(tmp_path, seeds=seeds, training=LONGER)
    ceiling = law(tmp_path, "ceiling", seeds)
    assert found.mcc_cosine >= 0.95
    assert found.mcc >= 0.95 * ceiling.mcc
    assert found.layer_splitting < 0.03


@pytest.mark.slow
def test_law_splitting_over_layers_rises_with_the_angle_and_the_span(tmp_path):
    """And a common rotation with its true lens is as none."""
    whole = {"min_span": 3, "rotation": "feature"}
    still, slow, fast = (
        law(tmp_path, theta=theta, **whole).layer_splitting
        for theta in (0.0, 20.0, 40.0)
    )
    assert still < slow < fast
    assert fast > still + 0.1
    short = law(tmp_path, theta=40.0, max_span=1, rotation="feature")
    assert short.layer_splitting < slow
    turned = {"min_span": 3, "rotation": "common", "theta": 40.0}
    raw = law(tmp_path, **turned)
    with_lens = law(tmp_path, "true_lens", **turned)
    assert raw.layer_splitting > still + 0.1
    assert with_lens.layer_splitting == pytest.approx(still, abs=0.03)
    assert with_lens.mcc == pytest.approx(law(tmp_path, min_span=3).mcc, abs=0.05)


@pytest.mark.slow
def test_law_a_rotation_of_each_feature_does_not_split_a_crosscoders_latents(tmp_path):
    """It has a decoder for each layer, and the MLSAE one for all."""
    turned = {"min_span": 3, "rotation": "feature", "theta": 40.0}
    found = law(tmp_path, "crosscoder", **turned)
    assert found.layer_splitting < 0.05
    assert found.mcc_cosine > 0.9
    assert law(tmp_path, **turned).layer_splitting > found.layer_splitting + 0.1
