"""Interventions. References: explicit hooks on whole passes, autograd, brute force."""

import json
from contextlib import ExitStack
from functools import partial
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
)
from sae_lens_multilayer.studies.interventions.comparisons import (
    layer_profiles,
    line_through_origin,
    same_meaning,
)
from sae_lens_multilayer.studies.interventions.controls import (
    CONTROLS,
    Clean,
    make_controls,
)
from sae_lens_multilayer.studies.interventions.effects import Additions
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


def a_study(kind: str, make_case: Any, tokens: Tensor) -> Any:
    """A small study of one latent, with the SAE and the model."""
    sae, model = make_case(kind, kind != "bridge")
    norm = final_norm(model)
    norm.weight = torch.nn.Parameter(1 + 0.3 * torch.randn(32, dtype=torch.float64))
    if kind == "HookedTransformer":
        norm.w = norm.weight
    latents = [most_active(sae, model, tokens)]
    options = {"alpha": -1.0, "n_tokens": 2, "n_steps": 3, "max_edits": 5}
    return sae, model, interventions(sae, model, tokens, latents=latents, **options)


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
    assert found.pictures()[""].panels[0].heatmap is not None


def test_whole_passes_give_the_same_result(make_case, tokens):
    """A model with hooks of its user cannot be run from the middle."""
    sae, model = make_case("HookedTransformer")
    call: Any = partial(interventions, sae, model, tokens, n_latents=1, n_steps=2)
    expected = call(n_tokens=1).to_dataframe()
    model.blocks[1].register_forward_hook(lambda *_: None)
    found = call(n_tokens=1).to_dataframe()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


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
    effect = rng.random(36)
    effect[latent == 0] = probs[0][layer[latent == 0]]  # as activations
    effect[latent == 1] = 1 / probs[1][layer[latent == 1]]  # the other way round
    table = layer_profiles(latent, layer, effect, probs, 100, seed=0)
    for j in range(3):
        c = np.bincount(layer[latent == j], effect[latent == j])
        w1 = scipy.stats.wasserstein_distance(range(6), range(6), c, probs[j])
        rank = scipy.stats.spearmanr(c, probs[j])[0]
        assert table.w1[j] == pytest.approx(w1)
        assert table.spearman[j] == pytest.approx(rank)
    assert table.w1[0] == pytest.approx(0)
    assert table.p_w1[0] < 0.05 < table.p_w1[1]
    assert abs(table.spearman_null).max() < 0.2


def test_effects_mean_the_same_at_two_layers():
    """Brute force over pairs, on dense vectors."""
    rng = np.random.default_rng(0)
    n_latents, d_vocab = 5, 7
    latent, layer = np.repeat(np.arange(n_latents), 2), np.tile([0, 1], n_latents)
    own = rng.standard_normal((n_latents, d_vocab))
    values = own[latent] + rng.standard_normal((2 * n_latents, d_vocab))
    values[-1] *= 100  # no other effect has its norm
    ids = np.tile(np.arange(d_vocab), (2 * n_latents, 1))
    row = same_meaning(latent, layer, ids, values, 2).iloc[0]
    wins = []
    for j in range(n_latents):
        a, b = values[2 * j], values[2 * j + 1]
        cosines = []
        for other in values[1::2]:
            ratio = np.linalg.norm(other) / np.linalg.norm(b)
            if other is not b and not np.array_equal(other, b) and 0.5 <= ratio <= 2:
                cosines.append(1 - scipy.spatial.distance.cosine(a, other))
        same = 1 - scipy.spatial.distance.cosine(a, b)
        wins += [np.mean([same > cosine for cosine in cosines])] if cosines else []
    assert row.n_latents == len(wins) == n_latents - 1
    assert row.auc == pytest.approx(np.mean(wins))


def test_a_regression_through_the_origin():
    x, y = np.array([1.0, 2.0, -1.0]), np.array([2.0, 3.0, 1.0])
    found = line_through_origin(x, y)
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
