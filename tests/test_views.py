"""Views: ordinary SAELens SAEs for one hook each, over the memory of the whole.

References: the whole SAE at that layer; stock SAELens (loading in a process without
this package, HookedSAETransformer, SAETransformerBridge, ActivationsStore, run_evals).
"""

import copy
import json

import pytest
import torch
from conftest import D_MODEL, PAPER_DATA, tiny_model
from sae_lens import (
    SAE,
    ActivationsStore,
    BatchTopKTrainingSAEConfig,
    GatedSAE,
    GatedTrainingSAEConfig,
    HookedSAETransformer,
    JumpReLUSAE,
    JumpReLUTrainingSAEConfig,
    LanguageModelSAETrainingRunner,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    StandardTrainingSAEConfig,
    TopKSAE,
    TopKTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler
from saes import HOOK_NAMES, random_acts, random_sae, run_fresh
from safetensors.torch import load_file, save_file

from sae_lens_multilayer import view, views

both_classes = pytest.mark.parametrize(
    "training", [False, True], ids=["inference", "training"]
)
WEIGHTS = ("W_enc", "W_dec", "b_dec")

STOCK = {
    "standard": (StandardTrainingSAEConfig, {"l1_coefficient": 0.1}, StandardSAE),
    "gated": (GatedTrainingSAEConfig, {}, GatedSAE),
    "jumprelu": (JumpReLUTrainingSAEConfig, {}, JumpReLUSAE),
    "topk": (TopKTrainingSAEConfig, {"k": 4}, TopKSAE),
    "batchtopk": (BatchTopKTrainingSAEConfig, {"k": 4}, JumpReLUSAE),
    "matryoshka": (
        MatryoshkaBatchTopKTrainingSAEConfig,
        {"k": 4, "matryoshka_widths": [16, 64]},
        JumpReLUSAE,
    ),
}


def state(sae: SAE) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in sae.state_dict().items()}


# What a view is


@both_classes
def test_a_view_is_a_stock_topk_sae_of_one_hook(training):
    sae = random_sae(training)

    for hook_name, each in zip(HOOK_NAMES, sae.views(), strict=True):
        assert isinstance(each, TopKSAE)
        assert each.cfg.architecture() == "topk"
        assert each.cfg.k == sae.cfg.k
        assert each.cfg.metadata.hook_name == hook_name
        assert "hook_names" not in each.cfg.metadata
        assert each.cfg.metadata.model_name == "tiny"
        assert (each.dtype, each.device) == (sae.dtype, sae.device)
        assert each.cfg.device == "cpu"
        assert {p.device.type for p in each.parameters()} == {"cpu"}


@both_classes
def test_a_view_shares_the_memory_of_the_multi_layer_sae(training):
    sae = random_sae(training)

    for each in [*sae.views(), sae.view(1), view(sae, HOOK_NAMES[0])]:
        for name in WEIGHTS:
            mine, whole = getattr(each, name), getattr(sae, name)
            assert mine is not whole
            assert mine.data_ptr() == whole.data_ptr()
            assert mine.stride() == whole.stride()
        assert not each.b_enc.any()


def test_a_view_changes_with_training_of_the_multi_layer_sae():
    sae, x = random_sae(True), random_acts(5)
    each = sae.view(0)
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.1)

    sae.accumulate_gradients(x.unsqueeze(1), None, micro_batch_size=5)
    optimizer.step()

    torch.testing.assert_close(each(x), sae(x))


@both_classes
@pytest.mark.parametrize("norm", ["layer_norm", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_view_equals_the_multi_layer_sae_at_its_layer(training, norm, dtype):
    sae = random_sae(training, normalize_activations=norm).to(dtype)
    x = random_acts(6, 2).to(dtype)

    whole_acts, whole_out = sae.encode(x), sae(x)

    for layer, each in enumerate(sae.views()):
        torch.testing.assert_close(each.encode(x[:, layer]), whole_acts[:, layer])
        torch.testing.assert_close(each(x[:, layer]), whole_out[:, layer])


@pytest.mark.parametrize("which", [1, HOOK_NAMES[1]])
def test_a_view_is_chosen_by_block_number_or_hook_name(which):
    sae = random_sae()

    assert sae.view(which).cfg.metadata.hook_name == HOOK_NAMES[1]
    assert view(sae, which).cfg.metadata.hook_name == HOOK_NAMES[1]


def test_a_block_number_means_the_block_and_not_the_position():
    names = ["blocks.7.hook_resid_post", "blocks.3.hook_resid_post", "hook_embed"]
    sae = random_sae(metadata=SAEMetadata(hook_names=names))

    assert [v.cfg.metadata.hook_name for v in sae.views()] == names
    assert sae.view(3).cfg.metadata.hook_name == names[1]
    assert sae.view("hook_embed").cfg.metadata.hook_name == "hook_embed"
    with pytest.raises(ValueError, match="0 is not a hook of this SAE"):
        sae.view(0)


def test_a_block_number_that_two_hooks_share_is_an_error():
    names = ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post"]
    sae = random_sae(metadata=SAEMetadata(hook_names=names))

    with pytest.raises(ValueError, match=r"names several hooks.*resid_pre.*resid_pos"):
        sae.view(0)


@pytest.mark.parametrize("which", [2, -1, "blocks.2.hook_resid_post", "hook_embed"])
def test_an_unknown_hook_is_an_error_that_lists_the_known_ones(which):
    with pytest.raises(ValueError, match="is not a hook of this SAE") as caught:
        random_sae().view(which)

    assert all(name in str(caught.value) for name in HOOK_NAMES)
    assert repr(which) in str(caught.value)


def test_an_sae_that_names_no_hooks_has_no_views():
    stock = StandardSAE(StandardSAEConfig(d_in=16, d_sae=32))
    stock.cfg.metadata.hook_name = HOOK_NAMES[0]

    for attempt in (lambda: view(stock, 0), lambda: views(stock)):
        with pytest.raises(ValueError, match=r"cfg\.metadata\.hook_names"):
            attempt()
    with pytest.raises(ValueError, match="must name its hooks"):
        view(random_sae().view(0), 0)


# Nothing done to one view changes another, or the whole


def into_zeros(each: SAE) -> None:
    each.load_state_dict({name: t * 0 for name, t in each.state_dict().items()})


def backward(each: SAE) -> None:
    each(random_acts(3)).sum().backward()


def edit_settings(each: SAE) -> None:
    each.cfg.metadata.hook_name = "elsewhere"
    each.cfg.metadata.model_name = "another"
    each.cfg.metadata.exclude_special_tokens.append(9)
    each.cfg.dtype = "float16"
    each.cfg.k = 1


CHANGES = {
    "to a dtype": lambda v: v.to(torch.bfloat16),
    "to a dtype and back": lambda v: (
        v.to(torch.float64).to(torch.float32).W_dec.data.zero_()
    ),
    "half": lambda v: v.half(),
    "double": lambda v: v.double(),
    "fold_W_dec_norm": lambda v: v.fold_W_dec_norm(),
    "fold_and_get_W_dec_norm": lambda v: v.fold_and_get_W_dec_norm(),
    "fold_activation_norm_scaling_factor": (
        lambda v: v.fold_activation_norm_scaling_factor(3.0)
    ),
    "fold_activation_whitening": (
        lambda v: v.fold_activation_whitening(
            torch.ones(16), 2 * torch.eye(16), torch.eye(16) / 2
        )
    ),
    "load_state_dict": into_zeros,
    "requires_grad_": lambda v: v.requires_grad_(False),
    "requires_grad of one": lambda v: v.W_dec.requires_grad_(False),
    "gradient": backward,
    "settings": edit_settings,
    "hook": lambda v: v.hook_sae_acts_post.add_hook(lambda a, hook: a * 0),
    "use_error_term": lambda v: setattr(v, "_use_error_term", True),
    "encode": lambda v: v.encode(random_acts(2)),
    "hook_z": lambda v: setattr(v, "reshape_fn_in", lambda x: x * 0),
    "deep copy zeroed": lambda v: [
        p.data.zero_() for p in copy.deepcopy(v).parameters()
    ],
    "new parameter": lambda v: setattr(v, "b_dec", torch.nn.Parameter(torch.ones(16))),
}


NEEDS_RAW_INPUTS = {"fold_activation_norm_scaling_factor", "fold_activation_whitening"}


@pytest.mark.parametrize(
    ("change", "norm"),
    [
        (change, norm)
        for change in CHANGES
        for norm in ("layer_norm", "none")
        if norm == "none" or change not in NEEDS_RAW_INPUTS
    ],
)
def test_changing_a_view_changes_neither_other_views_nor_the_sae(change, norm):
    metadata = SAEMetadata(hook_names=HOOK_NAMES, exclude_special_tokens=[0])
    sae = random_sae(normalize_activations=norm, metadata=metadata)
    with torch.no_grad():
        sae.W_dec *= 1.005  # norms that folding would change
    x = random_acts(5)
    first, second = sae.views()
    others = [sae, second]
    before = [(state(o), o(x).clone(), copy.deepcopy(o.cfg)) for o in others]

    CHANGES[change](first)

    for other, (weights, out, cfg) in zip(others, before, strict=True):
        for name, t in other.state_dict().items():
            assert t.dtype == torch.float32
            assert torch.equal(t, weights[name]), name
        assert torch.equal(other(x), out)
        assert other.cfg == cfg
        assert all(p.requires_grad and p.grad is None for p in other.parameters())


def test_statistics_of_several_views_do_not_mix():
    first, second = random_sae().views()
    a, b = random_acts(4), random_acts(4)
    whole_a, whole_b = first(a), second(b)

    acts_a, acts_b = first.encode(a), second.encode(b)

    torch.testing.assert_close(first.decode(acts_a), whole_a)
    torch.testing.assert_close(second.decode(acts_b), whole_b)


def test_a_deep_copy_of_a_view_keeps_its_own_statistics_and_memory():
    each = random_sae().view(0)
    twin = copy.deepcopy(each)
    a, b = random_acts(4), random_acts(4)
    whole_a, whole_b = each(a), each(b)

    acts_a, acts_b = twin.encode(a), each.encode(b)

    torch.testing.assert_close(each.decode(acts_b), whole_b)
    torch.testing.assert_close(twin.decode(acts_a), whole_a)
    assert twin.W_dec.data_ptr() != each.W_dec.data_ptr()
    assert twin.cfg is not each.cfg


def test_converting_the_multi_layer_sae_does_not_change_its_views():
    sae, x = random_sae(), random_acts(5)
    each = sae.view(0)
    before = each(x)

    sae.to(torch.bfloat16)

    assert each.dtype == each.W_dec.dtype == torch.float32
    assert torch.equal(each(x), before)


def test_a_view_trains_separately_only_after_a_copy():
    sae, x = random_sae(), random_acts(5)
    before = state(sae)
    each = copy.deepcopy(sae.view(0))

    each(x).square().sum().backward()
    torch.optim.Adam(each.parameters(), lr=0.1).step()

    assert all(torch.equal(t, before[name]) for name, t in sae.state_dict().items())


def test_folding_unit_norms_keeps_a_view_in_shared_memory():
    sae = random_sae()
    each = sae.view(0)

    each.fold_W_dec_norm()

    assert each.W_dec.data_ptr() == sae.W_dec.data_ptr()


def test_folding_other_norms_of_a_topk_view_is_an_error():
    sae = random_sae()
    sae.W_dec.data[0] *= 2

    with pytest.raises(ValueError, match="one is off by 1"):
        sae.view(0).fold_W_dec_norm()


def test_folding_a_scale_into_a_view_gives_the_same_map_of_unscaled_inputs():
    each = random_sae(normalize_activations="none", dtype="float64").view(0)
    x = random_acts(5)
    acts, out = each.encode(x / 4), each(x / 4)

    each.fold_activation_norm_scaling_factor(0.25)

    torch.testing.assert_close(each.encode(x), acts)
    torch.testing.assert_close(each(x), out * 4)


# On disk

WITHOUT_THIS_PACKAGE = """
import json, sys
from sae_lens import SAE
from safetensors.torch import load_file, save_file
x = load_file(sys.argv[1])["x"]
out, report = {}, {}
for folder in sys.argv[3:]:
    sae = SAE.load_from_disk(folder)
    acts = sae.encode(x)
    out |= {f"{folder}/acts": acts, f"{folder}/out": sae.decode(acts)}
    report[folder] = [type(sae).__name__, str(sae.dtype), sae.cfg.metadata.hook_name]
assert not any(name.startswith("sae_lens_multilayer") for name in sys.modules)
save_file({name: t.detach().contiguous() for name, t in out.items()}, sys.argv[2])
print(json.dumps(report))
"""


def train_stock(name, make_config, dataset, model):
    config_class, settings, _ = STOCK[name]
    cfg = make_config(
        sae=config_class(d_in=D_MODEL, d_sae=64, **settings),
        lr=1e-2,
        dead_feature_window=2,
    )
    runner = LanguageModelSAETrainingRunner(
        cfg, override_dataset=dataset, override_model=model
    )
    return runner.run(), cfg.output_path


@pytest.fixture
def stock_saes(make_config, token_dataset, model, tmp_path):
    """Every stock architecture trained for 8 steps: the trained SAE and its folder."""

    def make(**changes):
        return make_config(
            **changes, output_path=str(tmp_path / changes["sae"].architecture())
        )

    return {name: train_stock(name, make, token_dataset, model) for name in STOCK}


def test_stock_saelens_loads_saved_views_without_this_package(stock_saes, tmp_path):
    x, expected, known = random_acts(5), {}, {}
    save_file({"x": x}, tmp_path / "x")
    wholes = {
        "float32": random_sae(),
        "bfloat16": random_sae(dtype="bfloat16"),
        "trained": random_sae(True),
        "unstandardised": random_sae(normalize_activations="none"),
        **{
            name: SAE.load_from_disk(folder) for name, (_, folder) in stock_saes.items()
        },
    }
    for name, whole in wholes.items():
        path = str(tmp_path / f"view-{name}")
        each = whole.view(1) if hasattr(whole, "view") else view(whole, 1)
        each.save_model(path)
        expected |= {f"{path}/acts": whole.encode(x), f"{path}/out": whole(x)}
        stock_class = STOCK[name][2] if name in STOCK else TopKSAE
        known[path] = [stock_class.__name__, str(whole.dtype), HOOK_NAMES[1]]

    printed = run_fresh(WITHOUT_THIS_PACKAGE, tmp_path / "x", tmp_path / "out", *known)

    assert json.loads(printed.splitlines()[-1]) == known
    for name, t in load_file(tmp_path / "out").items():
        torch.testing.assert_close(t, expected[name].detach(), rtol=1e-4, atol=1e-4)


def test_saving_a_view_leaves_it_in_shared_memory(tmp_path):
    sae = random_sae()
    each = sae.view(0)

    each.save_model(tmp_path)

    assert each.W_enc.data_ptr() == sae.W_enc.data_ptr()
    assert each.W_enc.stride() == sae.W_enc.stride()


# Stock architectures trained on many layers


def test_views_of_stock_architectures_equal_the_stock_sae(stock_saes):
    x = random_acts(5)
    for name, (trained, folder) in stock_saes.items():
        loaded = SAE.load_from_disk(folder)
        assert type(loaded) is STOCK[name][2]
        assert loaded.cfg.metadata.hook_names == HOOK_NAMES
        for hook_name, each, of_trained in zip(
            HOOK_NAMES, views(loaded), views(trained), strict=True
        ):
            assert isinstance(each, STOCK[name][2])
            assert each.cfg.metadata.hook_name == hook_name
            assert each.W_dec.data_ptr() == loaded.W_dec.data_ptr()
            acts = each.encode(x)
            assert (acts > 0).any(), name
            assert torch.equal(acts, loaded.encode(x)), name
            assert torch.equal(each(x), loaded(x)), name
            torch.testing.assert_close(of_trained.encode(x), acts)
            torch.testing.assert_close(of_trained(x), each(x))


def test_views_of_stock_architectures_do_not_change_each_other(stock_saes):
    x = random_acts(5)
    for name, (trained, folder) in stock_saes.items():
        for whole in (SAE.load_from_disk(folder), trained):
            first, second = views(whole)
            before, weights, out = state(whole), state(second), second(x)
            first.fold_and_get_W_dec_norm()
            first.to(torch.bfloat16)
            assert all(torch.equal(t, before[n]) for n, t in whole.state_dict().items())
            assert all(
                torch.equal(t, weights[n]) for n, t in second.state_dict().items()
            ), name
            assert torch.equal(second(x), out), name


@pytest.mark.parametrize("name", STOCK)
def test_making_views_of_a_stock_training_sae_does_not_change_it(name):
    config_class, settings, stock_class = STOCK[name]
    cfg = config_class(d_in=D_MODEL, d_sae=64, **settings)
    cfg.metadata.hook_names = HOOK_NAMES
    sae, x = TrainingSAE.from_dict(cfg.to_dict()), random_acts(5)
    before, out = state(sae), sae(x)

    first, second = views(sae)

    assert isinstance(first, stock_class)
    assert all(torch.equal(t, before[n]) for n, t in sae.state_dict().items())
    assert first.W_dec.data_ptr() == second.W_dec.data_ptr() != sae.W_dec.data_ptr()
    if name == "topk":  # its decoder rows have norm 0.1, which saving folds
        torch.testing.assert_close(first(x), out)


@pytest.mark.parametrize("name", ["standard", "gated", "jumprelu"])
def test_folding_decoder_norms_into_a_stock_view_keeps_its_map(stock_saes, name):
    whole, x = SAE.load_from_disk(stock_saes[name][1]), random_acts(5)
    first, second = views(whole)
    out = second(x)

    first.fold_W_dec_norm()

    torch.testing.assert_close(first.W_dec.norm(dim=-1), torch.ones(64))
    torch.testing.assert_close(first(x), out, rtol=1e-4, atol=1e-4)
    assert torch.equal(second(x), out)


# Views in SAELens


@pytest.fixture
def sae_model(tokenizer):
    return tiny_model(tokenizer, HookedSAETransformer)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(1, 512, (3, 8))


def test_several_views_run_at_once_in_a_hooked_sae_transformer(sae_model, tokens):
    sae = random_sae()
    _, plain = sae_model.run_with_cache(tokens)

    _, cache = sae_model.run_with_cache_with_saes(tokens, saes=sae.views())

    first, last = (f"{name}.hook_sae" for name in HOOK_NAMES)
    torch.testing.assert_close(cache[f"{first}_input"], plain[HOOK_NAMES[0]])
    for name in (first, last):
        x = cache[f"{name}_input"]
        torch.testing.assert_close(cache[f"{name}_acts_post"], sae.encode(x))
        torch.testing.assert_close(cache[f"{name}_output"], sae(x))
    assert not sae_model.acts_to_saes


def test_the_error_term_of_several_views_restores_the_logits(sae_model, tokens):
    sae = random_sae()
    clean = sae_model(tokens)

    spliced = sae_model.run_with_saes(tokens, saes=sae.views())
    restored, cache = sae_model.run_with_cache_with_saes(
        tokens, saes=sae.views(), use_error_term=True
    )

    assert (spliced - clean).abs().max() > 0.01
    torch.testing.assert_close(restored, clean, rtol=1e-4, atol=1e-4)
    x = cache[f"{HOOK_NAMES[1]}.hook_sae_input"]
    error = cache[f"{HOOK_NAMES[1]}.hook_sae_error"]
    torch.testing.assert_close(error, x - sae(x), rtol=1e-4, atol=1e-5)


def test_views_run_in_an_sae_transformer_bridge():
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    bridge = SAETransformerBridge.boot_transformers(str(PAPER_DATA / "model"))
    names = [f"blocks.{layer}.hook_resid_post" for layer in (0, 2, 4)]
    metadata = SAEMetadata(hook_names=names)
    sae = random_sae(d_in=64, d_sae=128, metadata=metadata)
    tokens = torch.randint(1, 512, (2, 6))
    clean = bridge(tokens)

    spliced, cache = bridge.run_with_cache_with_saes(tokens, saes=sae.views())
    restored = bridge.run_with_saes(tokens, saes=sae.views(), use_error_term=True)

    assert (spliced - clean).abs().max() > 0.01
    torch.testing.assert_close(restored, clean, rtol=1e-3, atol=1e-3)
    for each in sae.views():
        x = cache[bridge.get_sae_hook_name(each, "hook_sae_input")]
        acts = cache[bridge.get_sae_hook_name(each)]
        torch.testing.assert_close(acts, sae.encode(x))


def test_saelens_store_and_evals_take_a_view(model, token_dataset):
    metadata = SAEMetadata(
        hook_names=HOOK_NAMES, context_size=16, prepend_bos=False, model_name="tiny"
    )
    sae = random_sae(metadata=metadata, k=16)
    each = sae.view(1)

    store = ActivationsStore.from_sae(
        model,
        each,
        token_dataset,
        streaming=False,
        store_batch_size_prompts=4,
        train_batch_size_tokens=32,
    )
    rows = store.get_activations(store.get_batch_tokens())
    assert store.hook_name == HOOK_NAMES[1]
    assert rows.shape[-1] == D_MODEL

    metrics, features = run_evals(
        each,
        store,
        model,
        ActivationScaler(),
        EvalConfig(
            batch_size_prompts=4,
            n_eval_reconstruction_batches=2,
            n_eval_sparsity_variance_batches=2,
            compute_kl=True,
            compute_ce_loss=True,
            compute_l2_norms=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
            compute_featurewise_density_statistics=True,
            compute_featurewise_weight_based_metrics=True,
        ),
        exclude_special_tokens=False,
    )

    flat = {k: v for group in metrics.values() for k, v in group.items()}
    assert 0 < flat["l0"] <= 16
    assert flat["explained_variance"] < 1
    assert flat["kl_div_with_sae"] > 0
    assert len(features["feature_density"]) == 64
