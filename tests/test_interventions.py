"""Interventions. References: explicit hooks on whole passes, autograd, brute force."""

import json
from contextlib import ExitStack
from functools import partial
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import D_VOCAB, tiny_model
from sae_lens.saes.sae import SAEMetadata
from saes import random_lens, random_sae
from test_walk import block_names, bridge_of, random_model
from torch import Tensor

from sae_lens_multilayer import cli
from sae_lens_multilayer.analysis.nulls import RandomWeights
from sae_lens_multilayer.config_files import read_settings_file
from sae_lens_multilayer.evaluation.encoder import LayerEncoder
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.studies.interventions import (
    Interventions,
    InterventionSettings,
    LatentEdit,
    ablate,
    interventions,
    interventions_study,
    run_edits,
    scale,
    steer,
    study,
)
from sae_lens_multilayer.studies.interventions.comparisons import (
    layer_profiles,
    line_of_sums,
    line_sums,
    same_meaning,
    spearman,
)
from sae_lens_multilayer.studies.interventions.controls import (
    CONTROLS,
    Clean,
    make_controls,
)
from sae_lens_multilayer.studies.interventions.edits import TokenEdits
from sae_lens_multilayer.studies.interventions.runners import Additions
from sae_lens_multilayer.studies.interventions.sample import stratified

N_LAYERS, N_POS = 4, 8
KINDS = ["HookedTransformer", "Hugging Face", "bridge"]


@pytest.fixture
def make_case(tokenizer, tmp_path):
    """A float64 model with four layers and its SAE, whose names of hooks differ."""

    def make(kind: str, lens: bool = False) -> tuple[Any, Any]:
        names = [f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS)]
        if kind == "HookedTransformer":
            model: Any = tiny_model(tokenizer, n_layers=N_LAYERS, d_model=32)
        elif kind == "bridge":
            model = bridge_of("Llama", tokenizer, tmp_path)
        else:
            model = random_model("GPTNeoX")
            names = block_names(model.model)
        metadata = SAEMetadata(hook_names=names)
        sae = random_sae(d_in=32, d_sae=48, k=6, metadata=metadata, dtype="float64")
        if lens:
            changes = {"n_layers": N_LAYERS, "d_in": 32, "dtype": torch.float64}
            sae.lens = random_lens(names, alignment="reference", **changes)
        return sae, model.double()

    return make


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(1, D_VOCAB, (2, N_POS))


def by_dense_decoding(
    sae: Any, edit: LatentEdit, layer: int, mask: Tensor, x: Tensor
) -> Tensor:
    """The difference of two reconstructions, added where `mask` is true."""
    acts = sae.encode(x, hook=layer)
    same = sae.decode(acts, hook=layer)
    acts = sae.encode(x, hook=layer)
    own = acts[..., list(edit.latents)]
    after = {"scale": own * edit.value, "add": own + edit.value}[edit.kind]
    acts[..., list(edit.latents)] = after
    changed = x + sae.decode(acts, hook=layer) - same
    return torch.where(mask.unsqueeze(-1), changed, x)


@torch.no_grad()
def with_hooks(sae: Any, model: Any, tokens: Tensor, edit: LatentEdit, mask: Tensor):
    """Logits, and vectors after each layer, with the hooks of the host."""
    found: dict[str, Tensor] = {}

    def replace(layer: int, name: str, x: Tensor) -> Tensor:
        if layer in edit.layers:
            x = by_dense_decoding(sae, edit, layer, mask, x)
        found[name] = x
        return x

    def hook(layer: int, name: str, _: Any, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (replace(layer, name, output[0]), *output[1:])
        return replace(layer, name, output)

    names = sae.cfg.metadata.hook_names
    if hasattr(model, "run_with_hooks") and names[0].startswith("blocks"):
        own = [name.replace("resid_post", "out") for name in names]
        own = names if names[0] in model.hook_dict else own
        hooks = [
            (point, lambda x, hook, i=i: replace(i, names[i], x))
            for i, point in enumerate(own)
        ]
        return model.run_with_hooks(tokens, fwd_hooks=hooks), found
    modules = dict(model.model.named_modules())
    with ExitStack() as stack:
        for i, name in enumerate(names):
            handle = modules[name].register_forward_hook(partial(hook, i, name))
            stack.callback(handle.remove)
        return model.model(tokens).logits, found


@pytest.mark.parametrize("lens", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_edits_equal_explicit_hooks(kind, lens, make_case, tokens):
    sae, model = make_case(kind, lens)
    nothing = LatentEdit("scale", [], [])
    clean, vectors = with_hooks(sae, model, tokens, nothing, tokens < 0)
    names = sae.cfg.metadata.hook_names
    usual = sae.encode(vectors[names[1]], hook=1).sum((0, 1)).topk(3).indices.tolist()
    edits = [
        LatentEdit("scale", [1], usual),
        LatentEdit("scale", [1, 2], usual, 2.5, slice(1, None)),
        LatentEdit("scale", [1], usual[:1], -1.0, tokens % 2 == 0),
        LatentEdit("add", [0, 3], [1, 4], 3.0, [-1]),
    ]
    runs = run_edits(sae, model, tokens, edits)
    for run, edit in zip(runs, edits, strict=True):
        mask = edit.mask(tokens.shape)
        logits, vectors = with_hooks(sae, model, tokens, edit, mask)
        torch.testing.assert_close(run.clean_logits, clean, rtol=0, atol=1e-6)
        torch.testing.assert_close(run.logits, logits, rtol=0, atol=1e-6)
        assert list(run.vectors) == names[edit.layers[0] :]
        for name, x in run.vectors.items():
            torch.testing.assert_close(x, vectors[name], rtol=0, atol=1e-6)
        assert (run.logits - clean).abs().max() > 1e-2
        first = run.clean_vectors[names[edit.layers[0]]]
        hits = sae.encode(first, hook=edit.layers[0])[..., list(edit.latents)] > 0
        if len(edit.layers) == 1:
            rate = hits[mask].double().mean(0)
            torch.testing.assert_close(run.hit_rate.double(), rate)


@torch.no_grad()
def test_ablate_scale_and_steer_are_one_edit_each(make_case, tokens):
    sae, model = make_case("HookedTransformer")
    x = run_edits(sae, model, tokens, [LatentEdit("add", [2], [0])])[0].clean_vectors
    latent = int(sae.encode(x["blocks.2.hook_resid_post"], 2).sum((0, 1)).argmax())
    where = [latent], ["blocks.2.hook_resid_post"]
    none = ablate(sae, model, tokens, *where)
    torch.testing.assert_close(
        none.logits, scale(sae, model, tokens, 0.0, *where).logits
    )
    same = scale(sae, model, tokens, 1.0, *where)
    assert same.kl_div().abs().max() < 1e-6 < none.kl_div().max()
    before = none.clean_vectors["blocks.2.hook_resid_post"]
    steered = steer(sae, model, tokens, 2.0, *where).vectors
    std = before.std(-1, keepdim=True)
    torch.testing.assert_close(
        steered["blocks.2.hook_resid_post"] - before,
        2 * std * sae.W_dec[latent],
        rtol=1e-4,
        atol=1e-6,
    )


def test_bad_input(make_case, tokens):
    sae, model = make_case("HookedTransformer")
    with torch.no_grad():
        sae.W_enc[:, 7] = 0
        sae.W_dec[9] = sae.W_dec[7]
        sae.W_enc[:, 9] = 3 * sae.W_dec[9]
    call = sae, model, tokens
    with pytest.raises(ValueError, match=r"\[7\] never are.*nearest to 7 that is: 9"):
        ablate(*call, [7], [1])
    steer(*call, 1.0, [7], [1])
    with pytest.raises(ValueError, match="finite; got nan"):
        scale(*call, float("nan"), [9], [1])
    with pytest.raises(ValueError, match="5 is not a hook"):
        ablate(*call, [9], [5])
    with pytest.raises(ValueError, match=r"d_sae = 48.*got \[48\]"):
        steer(*call, 1.0, [48], [1])
    with pytest.raises(ValueError, match=r"positions.*tokens; got"):
        ablate(*call, [9], [1], [N_POS])


# The study


def most_active(sae: Any, model: Any, tokens: Tensor) -> int:
    """The latent that is active most often."""
    with torch.no_grad():
        x = as_model(model).vectors(tokens, sae.cfg.metadata.hook_names)
        acts = sae.encode(torch.stack(x, 2)) > 0
    return int(acts.sum((0, 1, 2)).argmax())


def final_norm(model: Any) -> Any:
    ends = "ln_final", "final_layer_norm"
    return next(m for name, m in model.named_modules() if name.endswith(ends))


def a_study(kind: str, make_case: Any, tokens: Tensor, **options: Any) -> Any:
    """A small study of one latent, with the SAE and the model."""
    sae, model = make_case(kind, kind != "bridge")
    norm = final_norm(model)
    norm.weight = torch.nn.Parameter(1 + 0.3 * torch.randn(32, dtype=torch.float64))
    if kind == "HookedTransformer":
        norm.w = norm.weight
    latents = [most_active(sae, model, tokens)]
    given = {"alpha": -1.0, "n_tokens": 2, "n_steps": 3, "max_edits": 5, **options}
    return sae, model, interventions(sae, model, tokens, latents=latents, **given)


def derivative(
    lm: Any,
    ids: Tensor,
    name: str,
    position: int,
    dx: Tensor,
    token: int,
    point: float,
) -> float:
    """Of a logit by s, if s dx is added at a position, in whole passes."""
    s = torch.tensor(point, dtype=torch.float64, requires_grad=True)
    onto = torch.zeros(1, N_POS, 32, dtype=torch.float64)
    onto[:, position] = dx
    logits = lm.logits_with_hooks(ids, {name: lambda x: x + s * onto})
    return float(torch.autograd.grad(logits[0, position, token], s)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_effects_and_predictions_of_each_edit(kind, make_case, tokens):
    """Reference: hooks on whole passes; derivatives by autograd; the formulas."""
    sae, model, found = a_study(kind, make_case, tokens)
    names, lm = found.hook_names, as_model(model)
    norm = final_norm(model)
    assert len(found.latent) >= 2
    rows = zip(found.latent, found.layer, found.prompt, found.position, strict=True)
    for i, row in enumerate(rows):
        j, layer, prompt, position = (int(value) for value in row)
        ids = tokens[prompt : prompt + 1]
        edit = LatentEdit("scale", [layer], [j], -1.0, [position])
        mask = edit.mask(ids.shape)
        nothing = LatentEdit("scale", [], [])
        before, x = with_hooks(sae, model, ids, nothing, mask)
        after, edited = with_hooks(sae, model, ids, edit, mask)
        p, q = before[0, position], after[0, position]
        target = int(p.argmax())
        kl = torch.nn.functional.kl_div(
            q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="sum"
        )
        close = partial(pytest.approx, rel=1e-4, abs=1e-5)
        assert float(found.kl[i, 0]) == close(float(kl))
        assert float(found.target[i, 0]) == close(float((q - p)[target]))
        centred = (q - p) - (q - p).mean()
        assert float(found.effect_norm[i]) == close(float(centred.norm()))
        assert float(found.top_values[i].abs().max()) == close(
            float(centred.abs().max())
        )
        dx = (edited[names[layer]] - x[names[layer]])[0, position]
        assert float(found.norm[i]) == close(float(dx.norm()))
        for later in range(N_LAYERS):
            if later <= layer:
                assert found.self_effect[i, later].isnan()
                continue
            one, two = x[names[later]][0, position], edited[names[later]][0, position]
            pre = [sae.encode_with_hidden_pre(v, later)[1][j] for v in (one, two)]
            assert float(found.self_effect[i, later]) == close((pre[1] - pre[0]).item())
            moved = [sae.into_lens(v, later) for v in (one, one + dx)]
            passed = sae.W_enc[:, j] @ (moved[1] - moved[0]) / moved[0].std()
            assert float(found.pass_through[i, later]) == close(passed.item())
            error = [v - sae.decode(sae.encode(v, later), later) for v in (one, two)]
            change = (error[1] - error[0]).square().sum().item()
            assert float(found.error_change[i, later]) == close(change)
            change = (two - one).square().sum().item()
            assert float(found.change[i, later]) == close(change)

        along = partial(derivative, lm, ids, names[layer], position, dx, target)
        integrated = np.mean([along(point) for point in (1 / 6, 0.5, 5 / 6)])
        assert float(found.predictions[i, 1]) == close(along(0.0))
        assert float(found.predictions[i, 2]) == close(float(integrated))
        last = x[names[-1]][0, position]
        centre = 0 if kind == "bridge" else 1  # Llama divides by the root mean square
        mean = centre * last.mean()
        rms = (last - mean).square().mean().sqrt()
        direct = norm.weight * (dx - centre * dx.mean()) / rms
        direct = float(direct @ lm.token_unembeddings[target])
        assert float(found.predictions[i, 0]) == pytest.approx(direct, rel=1e-3)


def test_the_result_of_a_study(make_case, tokens, tmp_path):
    sae, model, found = a_study("HookedTransformer", make_case, tokens)
    found.save(tmp_path / "study")
    again = Interventions.load(tmp_path / "study")
    assert again.to_dataframe().equals(found.to_dataframe())
    table = found.to_dataframe()
    (j,) = found.latents.tolist()
    with torch.no_grad():
        x = as_model(model).vectors(tokens, found.hook_names)
        acts = sae.encode(torch.stack(x, 2))[..., j]  # [prompt, pos, layer]
    # All layers at which it is active at a chosen token are edited.
    for (prompt, position), rows in table.groupby(["prompt", "position"]):
        own = acts[prompt, position]
        assert rows.layer.tolist() == own.nonzero()[:, 0].tolist()
        assert rows.act.tolist() == pytest.approx(own[own > 0].tolist())
    n_active = int((acts > 0).any(-1).sum())
    assert len(table.groupby(["prompt", "position"])) == min(2, n_active)
    assert float(found.hit_rate) == pytest.approx(n_active / tokens.numel())
    probs = acts.sum((0, 1)) / acts.sum()
    torch.testing.assert_close(found.probs[:, 0], probs)
    profile = found.layer_profiles(same_tokens=False).loc[j]
    c = table.target.abs().groupby(table.layer).sum().reindex(range(N_LAYERS)).fillna(0)
    w1 = scipy.stats.wasserstein_distance(range(4), range(4), c, probs.tolist())
    assert profile.w1 == pytest.approx(w1)
    assert found.controls().kl["edit"] == pytest.approx(table.kl.mean())
    summary = found.summary
    assert summary.value["w1"] == pytest.approx(found.layer_profiles().w1[j])
    control = table.target_random.abs().groupby(table.layer).sum()
    control = control.reindex(range(N_LAYERS)).fillna(0)
    of_tokens = table.act.groupby(table.layer).sum().reindex(range(N_LAYERS)).fillna(0)
    w1 = scipy.stats.wasserstein_distance(range(4), range(4), control, of_tokens)
    assert summary.value["w1_random"] == pytest.approx(w1)
    later = found.layer.unsqueeze(1) < torch.arange(N_LAYERS)
    m, d = found.self_effect[later].double(), found.pass_through[later].double()
    assert summary.value["repair"] == pytest.approx(float(1 - m.sum() / d.sum()))
    slope = float(m @ d / (d @ d))
    assert summary.value["self_effect_slope"] == pytest.approx(slope)
    assert found.pictures()[""].panels[0].heatmap is not None


def test_whole_passes_give_the_same_result(make_case, tokens):
    """A model with hooks of its user cannot be run from the middle."""
    sae, model = make_case("HookedTransformer")
    call: Any = partial(interventions, sae, model, tokens, n_latents=1, n_steps=2)
    expected = call(n_tokens=1).to_dataframe()
    model.blocks[1].register_forward_hook(lambda *_: None)
    found = call(n_tokens=1).to_dataframe()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_an_interrupted_study_continues_and_gives_the_same(
    make_case, tokens, tmp_path, monkeypatch
):
    sae, model = make_case("HookedTransformer")
    latents = [most_active(sae, model, tokens)]
    call: Any = partial(interventions, sae, model, tokens, latents=latents, n_steps=1)
    expected = call().to_dataframe()
    assert expected["prompt"].nunique() == 2
    columns, seen = TokenEdits.columns, []

    def fail_at_the_second_prompt(self: Any, prompt: Any, index: int, *rest: Any):
        seen.append(index)
        if index == 1 and fails:
            raise KeyboardInterrupt
        return columns(self, prompt, index, *rest)

    monkeypatch.setattr(TokenEdits, "columns", fail_at_the_second_prompt)
    fails = True
    with pytest.raises(KeyboardInterrupt):
        call(parts=tmp_path)
    fails = False
    seen.clear()
    assert call(parts=tmp_path).to_dataframe().equals(expected)
    assert set(seen) == {1}


def test_nulls_edit_other_layers_or_another_model(make_case, tokens):
    sae, model = make_case("HookedTransformer")
    latents = [most_active(sae, model, tokens)]
    call: Any = partial(interventions, sae, model, tokens, latents=latents, n_steps=1)
    weights = {n: p.clone() for n, p in model.state_dict().items()}
    trained, shuffled = call(n_tokens=99), call(n_tokens=99, null="shuffled_layers")
    assert shuffled.act.sum() == pytest.approx(trained.act.sum().item())
    assert not torch.equal(shuffled.layer, trained.layer)
    with torch.no_grad():
        x = torch.stack(as_model(model).vectors(tokens, trained.hook_names), 2)
    where = shuffled.prompt, shuffled.position, shuffled.layer
    length = shuffled.act * x.std(-1)[where] * sae.W_dec[latents[0]].norm()
    torch.testing.assert_close(shuffled.norm, length.detach(), rtol=1e-4, atol=1e-6)
    assert "shuffled" in shuffled.pictures()[""].title
    random = call(n_tokens=2, null="random_weights")
    assert not torch.allclose(random.probs, trained.probs)
    for name, p in model.state_dict().items():
        assert torch.equal(p, weights[name])
    # Edits are made in the model with random weights.
    with RandomWeights(model).applied():
        again = call(n_tokens=2)
    torch.testing.assert_close(random.kl, again.kl)


def test_edits_that_do_not_fit_the_memory_are_refused(make_case, tokens, monkeypatch):
    sae, model = make_case("HookedTransformer")
    monkeypatch.setattr(study, "available_bytes", lambda: 2**10)
    with pytest.raises(ValueError, match=r"edits need \d.*GiB.*`max_edits` \(7\)"):
        interventions(sae, model, tokens, n_latents=1, max_edits=7)


def test_controls_have_the_length_of_the_edit(make_case, tokens):
    sae, model = make_case("HookedTransformer", True)
    with torch.no_grad():
        x = torch.stack(as_model(model).vectors(tokens[:1], sae.lens.hook_names), 2)[0]
        acts, dense = sae.encode_topk(x), sae.encode(x)
    layer, position = torch.tensor([0, 2, 3]), torch.tensor([4, 4, 5])
    # Active at these positions, and at as few others as possible.
    counts = (dense[:, layer] > 0).sum(0)
    latent = counts.masked_fill(dense[position, layer] == 0, N_POS).argmin(-1)
    edits = Additions(layer, position, torch.randn(3, 32, dtype=torch.float64))
    counted = torch.ones(N_POS, dtype=torch.bool)
    counted[:2] = False
    generator = torch.Generator().manual_seed(0)
    encoder, clean = LayerEncoder(sae), Clean(x, acts, counted)
    found = make_controls(encoder, edits, latent, clean, -1.0, generator)
    controls = dict(zip(CONTROLS, found, strict=True))
    for name in ("other_latent", "random", "silent_token"):
        additions, exists = controls[name]
        assert exists.all()
        torch.testing.assert_close(additions.dx.norm(dim=1), edits.dx.norm(dim=1))
    other, silent = controls["other_latent"][0], controls["silent_token"][0]
    for i in range(3):
        at = int(layer[i])
        directions = sae.lens.invert_difference(sae.W_dec.detach(), at)
        directions = torch.nn.functional.normalize(directions, dim=1)
        chosen = int((directions @ other.dx[i]).argmin())  # taken away
        assert chosen != latent[i]
        assert dense[position[i], at, chosen] > 0
        assert int((directions @ silent.dx[i]).argmax()) == latent[i]
        assert silent.position[i] >= 2
        assert dense[silent.position[i], at, latent[i]] == 0
        sae.encode(x[:, at], at)
        x_hat = sae.decode(dense[:, at], at)
        expected = (x_hat - x[:, at])[position[i]]
        torch.testing.assert_close(controls["error"][0].dx[i], expected)


def test_layers_of_effects_against_layers_of_activations():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(6), size=3)
    latent, layer = np.repeat([0, 1, 2], 12), np.tile(np.arange(6), 6)
    effect, control = rng.random((2, 36))
    effect[latent == 0] = probs[0][layer[latent == 0]]  # as activations
    effect[latent == 1] = 1 / probs[1][layer[latent == 1]]  # the other way round
    control[3] = np.nan  # there is none for this edit
    effects = {"": effect, "random": control}
    table = layer_profiles(latent, layer, effects, probs, 100, seed=0)
    for j in range(3):
        for end, values in (("", effect), ("_random", np.nan_to_num(control))):
            c = np.bincount(layer[latent == j], values[latent == j])
            w1 = scipy.stats.wasserstein_distance(range(6), range(6), c, probs[j])
            rank = scipy.stats.spearmanr(c, probs[j])[0]
            assert table[f"w1{end}"][j] == pytest.approx(w1)
            assert table[f"spearman{end}"][j] == pytest.approx(rank)
    assert table.w1[0] == pytest.approx(0)
    assert table.p_w1[0] < 0.05 < table.p_w1[1]
    assert abs(table.spearman_null).max() < 0.2


def test_the_null_of_layer_profiles_is_that_of_all_permutations():
    probs = np.array([[0.5, 0.2, 0.2, 0.1, 0.0]])
    layer, effect = np.arange(4), np.array([3.0, 1.0, 1.0, 5.0])
    call = partial(layer_profiles, 0 * layer, layer, {"": effect}, probs)
    row = call(n_permutations=5_000, seed=0).iloc[0]
    orders = [np.array(p) / 10 for p in permutations(effect)]
    w1 = [np.abs(np.cumsum(p - probs[0, :4])).sum() for p in orders]
    rank: Any = [scipy.stats.spearmanr(p, probs[0, :4])[0] for p in orders]
    assert row.w1_null == pytest.approx(np.mean(w1), abs=0.03)
    assert row.spearman_null == pytest.approx(np.mean(rank), abs=0.03)
    own = np.abs(np.cumsum(effect / 10 - probs[0, :4])).sum()
    assert row.p_w1 == pytest.approx(np.mean(np.array(w1) <= own + 1e-9), abs=0.03)
    assert np.isnan(spearman(np.ones((2, 4)), probs[0, :4])).all()


def effects_at_layers(made_by: str, n_latents=12, n_tokens=8, n_layers=3, seed=0):
    """Edits of latents at tokens of their own; the effect of a token or of a latent."""
    rng = np.random.default_rng(seed)
    latent = np.repeat(np.arange(n_latents), n_tokens * n_layers)
    layer = np.tile(np.arange(n_layers), n_latents * n_tokens)
    token = np.repeat(np.arange(n_latents * n_tokens), n_layers)
    of = token if made_by == "token" else latent
    values = rng.standard_normal((of.max() + 1, 20))[of]
    values += 0.1 * rng.standard_normal(values.shape)
    ids = np.tile(np.arange(20), (len(values), 1))
    return latent, layer, token, ids, values


def test_effects_of_tokens_are_no_meaning_and_those_of_latents_are():
    """Both give cosines near 1 at two layers of one token."""
    many = effects_at_layers("token", n_latents=60)
    made_by_token = same_meaning(*many, n_layers=3)
    assert made_by_token["auc"].mean() == pytest.approx(0.5, abs=0.08)
    all_one_half = np.arange(len(many[2]))  # each edit its own token: the old way
    assert same_meaning(*many[:2], all_one_half, *many[3:], n_layers=3).auc.mean() > 0.7
    made_by_latent = same_meaning(*effects_at_layers("latent"), n_layers=3)
    assert made_by_latent["auc"].tolist() == [1.0] * len(made_by_latent)
    assert set(made_by_latent["latent"]) == set(range(12))


def test_effects_mean_the_same_at_two_layers():
    """Brute force over pairs of cells in different halves, on dense vectors."""
    latent, layer, token, ids, values = effects_at_layers("latent", 5, 3, 2)
    values += np.random.default_rng(1).standard_normal(values.shape)
    values[latent == 4] *= 100  # no other effect has its norm
    found = same_meaning(latent, layer, token, ids, values, n_layers=2, seed=3)
    half = np.random.default_rng(3).permutation(15) % 2
    rows = []
    for h in (0, 1):
        mean = {
            (side, j): values[(latent == j) & (layer == side) & (half[token] == want)]
            for side, want in ((0, h), (1, 1 - h))
            for j in range(5)
        }
        mean = {cell: v.mean(0) for cell, v in mean.items() if len(v)}
        for j in range(5):
            if (0, j) not in mean or (1, j) not in mean:
                continue
            norm = np.linalg.norm(mean[1, j])
            cosines = {
                other: 1 - scipy.spatial.distance.cosine(mean[0, j], v)
                for (side, other), v in mean.items()
                if side == 1 and 0.5 <= np.linalg.norm(v) / norm <= 2
            }
            same = cosines.pop(j)
            if cosines:
                auc = np.mean([same > other for other in cosines.values()])
                rows.append((j, auc, same, np.mean([*cosines.values()])))
    columns = ["latent", "auc", "same", "others"]
    assert len(rows) >= 5
    np.testing.assert_allclose(found[columns].to_numpy(float), rows, rtol=1e-9)


def test_a_regression_through_the_origin():
    x, y = np.array([1.0, 2.0, -1.0]), np.array([2.0, 3.0, 1.0])
    found = line_of_sums(line_sums(x, y).sum(1))
    slope = np.linalg.lstsq(x[:, None], y, rcond=None)[0][0]
    assert found["slope"] == pytest.approx(slope)
    assert found["r2"] == pytest.approx(1 - ((y - slope * x) ** 2).sum() / 14)
    assert found["same_sign"] == pytest.approx(2 / 3)


def test_latents_of_every_stratum_are_chosen():
    rng = np.random.default_rng(0)
    mean, n_layers = rng.random(120) * 10, rng.random(120) * 5
    mean[100:] = np.nan  # never active
    chosen = stratified(mean, n_layers, 12, rng)
    assert len(set(chosen)) == 12
    assert max(chosen) < 100
    quarter = np.searchsorted(np.quantile(mean[:100], [0.25, 0.5, 0.75]), mean[chosen])
    assert np.bincount(quarter).tolist() == [3, 3, 3, 3]
    assert len(stratified(mean, n_layers, 500, rng)) == 100


def test_the_command_runs_and_resumes_the_study(offline, tmp_path, capsys):
    settings = {"sae": "sae", "dataset_path": "text.parquet", "n_tokens": 64}
    settings |= {"n_latents": 3, "n_tokens_of_latent": 1, "n_steps": 1}
    (tmp_path / "study.json").write_text(json.dumps(settings))
    command = ["study", "interventions", "study.json", "--output", "out"]
    cli.main(command)
    printed = capsys.readouterr().out
    assert "integrated_gradients" in printed
    png = tmp_path / "out/interventions.png"
    assert png.read_bytes().startswith(b"\x89PNG")
    written = png.stat().st_mtime_ns
    cli.main(command)
    assert capsys.readouterr().out == printed
    assert png.stat().st_mtime_ns == written
    with pytest.raises(ValueError, match=r"other settings:\n.*`alpha`"):
        interventions_study(InterventionSettings(**settings, alpha=2.0), "out")


def test_a_null_is_set_in_a_yaml_file_without_quotes(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("sae: sae\ndataset_path: text\nnull: shuffled_layers\n")
    settings = InterventionSettings.from_settings(read_settings_file(path))
    assert settings.null == "shuffled_layers"


def test_bad_input_of_the_study(make_case, tokens):
    sae, model = make_case("HookedTransformer")
    with pytest.raises(ValueError, match=r"finite and not 1.*inf"):
        interventions(sae, model, tokens, alpha=float("inf"))
    with torch.no_grad():
        sae.W_enc[:, 7] = 0
    with pytest.raises(ValueError, match=r"\[7\] never are"):
        interventions(sae, model, tokens, latents=[7])
    sae.cfg.metadata.hook_names = ["blocks.0.hook_mlp_out"]
    with pytest.raises(ValueError, match=r"residual stream.*hook_mlp_out"):
        interventions(sae, model, tokens)
