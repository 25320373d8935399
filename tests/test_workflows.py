"""SAELens' workflows and their neighbours take views, as the examples use them.

Reference: brute force with hooks, and the tools themselves. The SAEs are one of ours,
one of ours with a tuned lens, and a published one.
"""

import functools
import importlib.util
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from conftest import PAPER_DATA, tiny_model
from datasets import Dataset
from published_files import plain_files
from sae_lens import SAE, HookedSAETransformer, TopKSAE
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from saes import random_lens, random_sae

from examples import (
    attach_views,
    dashboard,
    host_evals,
    neuronpedia,
    sae_bench_core,
    share,
    steer,
)
from examples.local_hub import local_hub, put
from sae_lens_multilayer import MultiLayerSAE
from sae_lens_multilayer.studies import interventions
from sae_lens_multilayer.studies.interventions import LatentEdit

PUBLISHED = "mlsae-pythia-70m-deduped", "x64-k32"
CONTEXT_SIZE = 8


class Case(NamedTuple):
    """An SAE and a model of the same width."""

    sae: Any
    model: Any
    tokens: torch.Tensor


def _ours() -> Any:
    return random_sae()


def _with_lens() -> Any:
    sae = random_sae()
    sae.lens = random_lens()
    return sae


def _published() -> Any:
    return SAE.from_pretrained(*PUBLISHED)


SAES: dict[str, Callable[[], Any]] = {
    "ours": _ours,
    "ours with a lens": _with_lens,
    "published": _published,
}


@pytest.fixture(params=SAES)
def case(request, tokenizer, offline_hub) -> Case:
    put(offline_hub, "tim-lawson/" + "-".join(PUBLISHED), plain_files())
    sae = SAES[request.param]()
    changes = {"n_layers": len(sae.views()), "d_model": sae.cfg.d_in}
    model = tiny_model(tokenizer, HookedSAETransformer, **changes)
    return Case(sae, model, torch.randint(1, 512, (4, 16)))


@pytest.fixture
def prompts() -> Dataset:
    return Dataset.from_dict({"input_ids": torch.randint(1, 512, (64, 16))})


def memory_of(*saes: SAE[Any]) -> list[tuple[int, Any]]:
    """Address and copy of each parameter."""
    return [(p.data_ptr(), p.clone()) for sae in saes for p in sae.parameters()]


def assert_unchanged(before: list[tuple[int, Any]], *saes: SAE[Any]) -> None:
    after = memory_of(*saes)
    assert [pointer for pointer, _ in after] == [pointer for pointer, _ in before]
    for (_, new), (_, old) in zip(after, before, strict=True):
        assert torch.equal(new, old)


def replace_by(view: Any, x: torch.Tensor, hook: Any) -> torch.Tensor:
    return view(x)


@torch.no_grad()
def test_views_attached_together_are_replacements_one_after_the_other(case):
    views = case.sae.views()[:2]
    hooks = [
        (view.cfg.metadata.hook_name, functools.partial(replace_by, view))
        for view in case.sae.views()[:2]
    ]

    table = attach_views.loss_by_views(case.model, views, case.tokens)

    clean = float(case.model(case.tokens, return_type="loss"))
    both = float(
        case.model.run_with_hooks(case.tokens, fwd_hooks=hooks, return_type="loss")
    )
    assert table["spliced"].tolist()[::2] == pytest.approx([clean, both], abs=1e-5)
    assert abs(both - clean) > 1e-3
    assert table["with error term"].tolist() == pytest.approx([clean] * 3, abs=1e-5)


@pytest.mark.parametrize("kind", SAES)
def test_views_attach_to_an_sae_transformer_bridge(kind, offline_hub):
    put(offline_hub, "tim-lawson/" + "-".join(PUBLISHED), plain_files())
    bridge: Any = SAETransformerBridge.boot_transformers(str(PAPER_DATA / "model"))
    if kind == "published":
        views = _published().views()[:2]
    else:
        sae = random_sae(d_in=64)
        if kind == "ours with a lens":
            sae.lens = random_lens(d_in=64)
        views = sae.views()
    tokens = torch.randint(1, 512, (2, 8))

    table = attach_views.loss_by_views(bridge, views, tokens)

    clean = table["spliced"][0]
    assert abs(table["spliced"][2] - clean) > 1e-3
    assert table["with error term"].tolist() == pytest.approx([clean] * 3, abs=1e-4)
    assert not bridge.acts_to_saes


def test_saelens_store_and_evaluations_take_views(case, prompts):
    views = case.sae.views()[:2]
    before = memory_of(case.sae, *views)

    table = host_evals.evaluate_views(views, case.model, prompts, CONTEXT_SIZE)

    assert table.index.tolist() == [v.cfg.metadata.hook_name for v in views]
    assert (table.l0 > 0).all()
    assert (table.l0 <= case.sae.cfg.k).all()
    assert (table.kl_div_with_sae > 0).all()
    assert (table.explained_variance < 1).all()
    assert_unchanged(before, case.sae, *views)


@torch.no_grad()
def test_steering_adds_the_direction_at_one_layer_only(case):
    hook_name = case.sae.cfg.metadata.hook_names[1]
    latent, activation = steer.strongest_latent(
        case.sae, case.model, case.tokens[:1], hook_name
    )

    run = interventions.steer(
        case.sae, case.model, case.tokens, activation, [latent], [1]
    )

    direction = case.sae.W_dec[latent]
    if case.sae.lens is not None:
        direction = case.sae.lens.invert_difference(direction, hook_name)
    before = run.clean_vectors[hook_name]
    z = before if case.sae.lens is None else case.sae.lens.transform(before, hook_name)
    assert activation > 0
    torch.testing.assert_close(
        run.vectors[hook_name] - before,
        activation * z.std(-1, keepdim=True) * direction,
        rtol=1e-3,
        atol=1e-4,
    )
    assert case.sae.cfg.metadata.hook_names[0] not in run.vectors
    edit = LatentEdit("add", [hook_name], [latent], 1e3 * activation)
    steered = steer.steered_continuation(case.model, case.sae, edit)
    assert steered != steer.continuation(case.model)


def remove_part_of(view: Any, latent: int, x: torch.Tensor, hook: Any) -> torch.Tensor:
    """`x` minus the latent's contribution to its reconstruction."""
    acts = view.encode(x)
    whole = view.decode(acts)
    view.encode(x)
    acts[..., latent] = 0
    return x - whole + view.decode(acts)


@torch.no_grad()
@pytest.mark.parametrize("n_layers", [1, 2])
def test_ablating_a_latent_removes_only_its_contribution(case, n_layers):
    names = case.sae.cfg.metadata.hook_names[:n_layers]
    latent, _ = steer.strongest_latent(case.sae, case.model, case.tokens[:1], names[0])
    hooks = [
        (v.cfg.metadata.hook_name, functools.partial(remove_part_of, v, latent))
        for v in case.sae.views()[:n_layers]
    ]

    run = interventions.ablate(case.sae, case.model, case.tokens, [latent], names)

    expected = case.model.run_with_hooks(case.tokens, fwd_hooks=hooks)
    clean = case.model(case.tokens)
    torch.testing.assert_close(run.logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run.clean_logits, clean, rtol=1e-4, atol=1e-4)
    assert (run.logits - clean).abs().max() > 1e-3
    assert not case.model.acts_to_saes


def test_an_sae_and_its_views_go_through_an_upload_and_a_download(case, tmp_path):
    x = torch.randn(3, case.sae.cfg.d_in)
    view = case.sae.views()[1]
    with local_hub(tmp_path / "hub"):
        loaded = share.share(case.sae, layer=1)

    whole, one = loaded.values()
    assert type(whole) is MultiLayerSAE
    assert type(one) is (TopKSAE if case.sae.lens is None else MultiLayerSAE)
    assert whole.cfg.metadata.hook_names == case.sae.cfg.metadata.hook_names
    assert one.cfg.metadata.hook_name == view.cfg.metadata.hook_name
    for name, tensor in case.sae.state_dict().items():
        assert torch.equal(whole.state_dict()[name], tensor)
    with torch.no_grad():
        torch.testing.assert_close(one(x), view(x))


def test_saelens_reads_the_uploaded_files(tmp_path):
    with local_hub(tmp_path):
        share.share(random_sae(), layer=0)

    (snapshot,) = (tmp_path / "models--you--your-mlsae" / "snapshots").iterdir()
    found = {str(p.relative_to(snapshot)) for p in snapshot.rglob("*.*") if p.is_file()}
    assert found == {
        "README.md",
        "all/cfg.json",
        "all/sae_weights.safetensors",
        "all/blocks.0.hook_resid_post/cfg.json",
        "all/blocks.0.hook_resid_post/sae_weights.safetensors",
    }


def test_an_upload_replaces_what_was_uploaded_before(tmp_path):
    with local_hub(tmp_path):
        share.share(random_sae(k=2), layer=0)
        sae = random_sae(k=5)
        loaded = share.share(sae, layer=0)["all"]

    assert loaded.cfg.k == 5
    for name, tensor in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def needs(package: str) -> pytest.MarkDecorator:
    is_missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(is_missing, reason="needs `make neighbours`")


@needs("sae_dashboard")
def test_saedashboard_draws_latents_of_a_view(case, tmp_path):
    view, sibling = case.sae.views()[:2]
    before = memory_of(case.sae, view, sibling)
    latents = dashboard.most_active_latents(case.model, view, case.tokens, 3)

    page = dashboard.write_dashboard(
        view, case.model, case.tokens, latents, tmp_path / "page.html"
    )

    html = page.read_text()
    assert "<div class='grid-container'>" in html
    for latent in latents:
        assert f'"{latent}"' in html
    assert_unchanged(before, case.sae, view, sibling)


@needs("sae_dashboard")
def test_neuronpedia_files_of_a_view(case, tmp_path):
    from sae_dashboard.neuronpedia.neuronpedia_dashboard import (  # pyright: ignore[reportMissingImports]
        NeuronpediaDashboardBatch,
    )

    view, sibling = case.sae.views()[:2]
    before = memory_of(case.sae, view, sibling)
    latents = dashboard.most_active_latents(case.model, view, case.tokens, 3)

    bundle = neuronpedia.write_bundle(
        view, case.model, case.tokens, latents, tmp_path, "res-mlsae", "tiny"
    )

    assert bundle.name == "0-res-mlsae"
    settings = json.loads((bundle / "run_settings.json").read_text())
    assert settings["n_tokens_in_prompt"] == 16
    batch = NeuronpediaDashboardBatch(
        **json.loads((bundle / "batch-0.json").read_text())
    )
    assert (batch.model_id, batch.layer, batch.sae_set) == ("tiny", 0, "res-mlsae")
    acts = view.encode(
        case.model.run_with_cache(case.tokens)[1][view.cfg.metadata.hook_name]
    )
    assert [f.feature_index for f in batch.features] == latents
    for feature in batch.features:
        own = acts[..., feature.feature_index]
        values = [value for act in feature.activations for value in act.values]
        assert max(values) == pytest.approx(own.max().item(), abs=2e-3)
        share = (own > 0).double().mean().item()
        assert feature.frac_nonzero == pytest.approx(share, abs=1e-3)
    assert_unchanged(before, case.sae, view, sibling)


@needs("sae_bench")
def test_sae_bench_measures_a_view(case, prompts):
    view, sibling = case.sae.views()[:2]
    before = memory_of(case.sae, view, sibling)
    settings = sibling.cfg.to_dict()

    metrics = sae_bench_core.core_metrics(view, case.model, prompts, CONTEXT_SIZE)

    assert 0 < metrics["l0"] <= case.sae.cfg.k
    assert metrics["kl_div_with_sae"] > 0
    assert 0 < metrics["cossim"] <= 1
    assert_unchanged(before, case.sae, view, sibling)
    assert sibling.cfg.to_dict() == settings
