"""Authorities: the list of bad input in issue 2; models of TransformerLens, SAELens and
Transformers, which say themselves what hooks they have; the paper's model on disk."""

import re

import huggingface_hub
import pytest
import torch
from conftest import PAPER_DATA
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.load_model import load_model
from transformer_lens.model_bridge import TransformerBridge

from sae_lens_multilayer.hooks import (
    DEFAULT_HOOK_NAME,
    ModelShape,
    check_context_size,
    check_hf_hook_names,
    check_hook_choice,
    check_width,
    check_widths,
    find_hook,
    layer_labels,
    model_hook_names,
    resolve_hook_names,
    shape_of_model,
    shape_of_named_model,
    stop_at_layer,
)

FOLDER = str(PAPER_DATA / "model")
FOLDER_SHAPE = ModelShape(n_layers=5, d_model=64, n_ctx=256)
KINDS = ["HookedTransformer", "TransformerBridge", "AutoModelForCausalLM"]
POST = [f"blocks.{layer}.hook_resid_post" for layer in range(5)]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test here reaches the hub, or waits for it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def bridges():
    return {
        cls: cls.boot_transformers(FOLDER, device="cpu")
        for cls in (TransformerBridge, SAETransformerBridge)
    }


@pytest.fixture(scope="module")
def hf_model():
    return load_model("AutoModelForCausalLM", FOLDER, device="cpu")


# Choice of hooks


def test_default_is_the_output_of_every_block_in_order():
    assert resolve_hook_names(DEFAULT_HOOK_NAME, None, None, 5) == POST


def test_layers_keep_the_order_they_were_given_in():
    names = resolve_hook_names("model.layers.{layer}", None, [3, 0], 5)
    assert names == ["model.layers.3", "model.layers.0"]


def test_any_sequence_of_layers_is_taken():
    assert resolve_hook_names(DEFAULT_HOOK_NAME, None, range(5), 5) == POST
    assert resolve_hook_names(DEFAULT_HOOK_NAME, None, (4,), 5) == POST[4:]


def test_explicit_names_replace_the_template():
    names = ["hook_embed", "blocks.1.hook_resid_pre"]
    assert resolve_hook_names(DEFAULT_HOOK_NAME, names, None, 5) == names


def test_a_name_without_template_is_one_hook():
    assert resolve_hook_names("hook_embed", None, None, 5) == ["hook_embed"]
    assert resolve_hook_names("hook_embed", None, [0], 5) == ["hook_embed"]
    assert resolve_hook_names(POST[3], None, [3], 5) == [POST[3]]


@pytest.mark.parametrize("layers", [[5], [0, 7], [10**6]])
def test_a_layer_out_of_range_is_an_error(layers):
    message = f"must be distinct and in [0, 5) for 'tiny'; got {layers}. Use `layers=N"
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve_hook_names(DEFAULT_HOOK_NAME, None, layers, 5, "tiny")


@pytest.mark.parametrize("layers", [[0, 0], [1, 2, 1], [], [-1], [0, -1]])
def test_repeated_negative_or_no_layers_are_an_error_without_a_model(layers):
    message = f"at least one block number, each once and from 0; got {layers}."
    with pytest.raises(ValueError, match=re.escape(message)):
        check_hook_choice(DEFAULT_HOOK_NAME, None, layers)


def test_several_layers_need_a_template():
    message = (
        r"`hook_name` must contain '\{layer\}'.*as in 'blocks\.\{layer\}\.hook_resid_"
        r"post'; got 'blocks\.0\.hook_resid_post'"
    )
    with pytest.raises(ValueError, match=message):
        check_hook_choice(POST[0], None, [0, 1])


def test_a_layer_that_is_not_the_one_in_the_hook_name_is_an_error():
    with pytest.raises(ValueError, match=r"must mean the same block; got \[3\].*ks\.0"):
        check_hook_choice(POST[0], None, [3])


def test_names_and_layers_together_are_an_error():
    with pytest.raises(ValueError, match="either `hook_names` or `layers`, not both"):
        check_hook_choice(DEFAULT_HOOK_NAME, POST, [0])


@pytest.mark.parametrize("names", [[], [POST[0], POST[1], POST[0]]])
def test_repeated_or_no_names_are_an_error(names):
    message = f"must hold at least one name, each once; got {names}"
    with pytest.raises(ValueError, match=re.escape(message)):
        check_hook_choice(DEFAULT_HOOK_NAME, names, None)


# Labels and positions


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        ([POST[0], POST[3]], ["layer_0", "layer_3"]),
        (["blocks.10.hook_resid_pre"], ["layer_10"]),
        (["model.layers.2", "model.layers.1"], ["layer_2", "layer_1"]),
        (["transformer.h.7"], ["layer_7"]),
        (["hook_embed"], ["hook_embed"]),
        (["hook_embed", POST[0]], ["hook_embed", POST[0]]),
        (["blocks.0.hook_resid_pre", POST[0]], ["blocks.0.hook_resid_pre", POST[0]]),
    ],
)
def test_labels_are_layers_where_these_are_clear_and_else_names(names, labels):
    assert layer_labels(names) == labels


def test_a_hook_is_found_by_name_or_by_block_number():
    names = [POST[4], POST[0], "hook_embed"]
    assert find_hook(names, 4) == 0
    assert find_hook(names, 0) == 1
    assert find_hook(names, "hook_embed") == 2


@pytest.mark.parametrize("wanted", [7, -1, 1, "blocks.7.hook_resid_post", "0"])
def test_an_unknown_hook_is_an_error_that_lists_the_known(wanted):
    names = [POST[0], POST[3]]
    message = f"{wanted!r} is not a hook of this SAE; its hooks are {names}"
    with pytest.raises(ValueError, match=re.escape(message)):
        find_hook(names, wanted)


def test_a_block_with_two_hooks_is_ambiguous_but_its_names_are_not():
    names = ["blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"]
    with pytest.raises(ValueError, match=r"1 names several hooks.*one of these names"):
        find_hook(names, 1)
    assert find_hook(names, names[1]) == 1


# How far the model must run


@pytest.mark.parametrize(
    ("names", "stop"),
    [
        ([POST[2], POST[0]], 3),
        (["blocks.0.hook_resid_pre"], 1),
        (["blocks.11.attn.hook_z", POST[2]], 12),
        (["hook_embed"], 0),
        (["hook_embed", "hook_pos_embed"], 0),
        (["embed.hook_out", "blocks.1.hook_out"], 2),
        (["model.layers.3", "model.layers.1"], 4),
        ([POST[0], "ln_final.hook_normalized"], None),
        (["model.embed_tokens"], None),
    ],
)
def test_the_model_stops_after_the_last_hook(names, stop):
    assert stop_at_layer(names) == stop


@pytest.mark.parametrize(
    "names",
    [["hook_embed"], [POST[0]], ["blocks.1.hook_resid_pre"], [POST[1], "hook_embed"]],
)
def test_a_hooked_transformer_that_stops_there_has_run_these_hooks(model, names):
    tokens = torch.arange(6).view(1, 6)
    _, whole = model.run_with_cache(tokens, names_filter=names)
    stop = stop_at_layer(names)
    _, part = model.run_with_cache(tokens, names_filter=names, stop_at_layer=stop)
    for name in names:
        torch.testing.assert_close(part[name], whole[name], rtol=0, atol=0)


def test_no_block_runs_after_the_last_hook(model):
    ran = []
    hooks = [(name, lambda x, hook: ran.append(hook.name)) for name in POST[:2]]
    stop = stop_at_layer([POST[0]])
    model.run_with_hooks(torch.ones(1, 2).long(), stop_at_layer=stop, fwd_hooks=hooks)
    assert ran == [POST[0]]


# The model's own names


def test_a_hooked_transformer_knows_the_usual_names(model):
    names = ["hook_embed", "blocks.0.hook_resid_pre", POST[1]]
    assert model_hook_names(model, names) == names


def test_a_bridge_is_asked_by_the_names_it_knows(bridges):
    names = ["hook_embed", "blocks.0.hook_resid_pre", POST[4]]
    own = ["embed.hook_out", "blocks.0.hook_in", "blocks.4.hook_out"]
    assert model_hook_names(bridges[TransformerBridge], names) == names
    assert model_hook_names(bridges[SAETransformerBridge], names) == own
    assert model_hook_names(bridges[SAETransformerBridge], own) == own


@pytest.mark.parametrize("cls", [TransformerBridge, SAETransformerBridge])
def test_a_bridge_gives_the_vectors_of_the_paper_under_these_names(bridges, cls):
    """`hidden_states` of Transformers: entry l is before block l, so after l - 1."""
    bridge, names = bridges[cls], ["hook_embed", "blocks.2.hook_resid_pre", POST[1]]
    own = model_hook_names(bridge, names)
    tokens = torch.arange(1, 9).view(1, 8)
    _, cache = bridge.run_with_cache(
        tokens, names_filter=own, stop_at_layer=stop_at_layer(own)
    )
    with torch.no_grad():
        states = bridge.original_model(tokens, output_hidden_states=True).hidden_states
    for name, state in zip(own, (states[0], states[2], states[2]), strict=True):
        torch.testing.assert_close(cache[name], state, rtol=1e-4, atol=1e-4)


def test_a_hook_that_does_not_exist_is_an_error_that_lists_near_ones(model):
    message = (
        r"has no hook 'blocks\.0\.hook_resid_pots'.*nearest are.*'blocks\.0\.hook_r"
    )
    with pytest.raises(ValueError, match=message):
        model_hook_names(model, [POST[0], "blocks.0.hook_resid_pots"])
    with pytest.raises(ValueError, match=r"no hook 'blocks\.2\.hook_resid_post'"):
        model_hook_names(model, [POST[2]])


def test_a_hook_like_no_other_is_an_error_too(model):
    with pytest.raises(ValueError, match=r"no hook 'qqqq'. The nearest are \['"):
        model_hook_names(model, ["qqqq"])


# Sizes


def test_shape_of_a_loaded_model_of_every_kind(model, hf_model, bridges):
    assert shape_of_model(model) == ModelShape(n_layers=2, d_model=16, n_ctx=16)
    assert shape_of_model(hf_model) == FOLDER_SHAPE
    for bridge in bridges.values():
        assert shape_of_model(bridge) == FOLDER_SHAPE


def test_shape_of_something_else_is_an_error(hf_model):
    message = "must be a HookedTransformer.*loaded by SAELens; got GPTNeoXForCausalLM"
    with pytest.raises(ValueError, match=message):
        shape_of_model(hf_model.model)


@pytest.mark.parametrize("kind", KINDS)
def test_shape_is_read_before_the_model_is_loaded(kind, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "__init__", None)  # no model is made
    assert shape_of_named_model(kind, FOLDER) == FOLDER_SHAPE
    assert shape_of_named_model(kind, FOLDER, {}) == FOLDER_SHAPE


@pytest.mark.parametrize(
    ("kind", "kwargs", "shape"),
    [
        ("HookedTransformer", {"n_ctx": 512}, ModelShape(5, 64, 512)),
        ("HookedTransformer", {"first_n_layers": 2}, ModelShape(2, 64, 256)),
        ("HookedTransformer", {"dtype": "float32"}, FOLDER_SHAPE),
        ("TransformerBridge", {"n_ctx": 512}, ModelShape(5, 64, 512)),
        (
            "TransformerBridge",
            {"hf_config_overrides": {"num_hidden_layers": 2}},
            ModelShape(2, 64, 256),
        ),
        ("AutoModelForCausalLM", {"num_hidden_layers": 2}, ModelShape(2, 64, 256)),
        ("AutoModelForCausalLM", {"device_map": "cpu"}, FOLDER_SHAPE),
        ("AutoModelForCausalLM", {"torch_dtype": torch.bfloat16}, FOLDER_SHAPE),
    ],
)
def test_arguments_that_change_the_model_change_its_shape(kind, kwargs, shape):
    before = dict(kwargs)
    assert shape_of_named_model(kind, FOLDER, kwargs) == shape
    assert kwargs == before


def test_the_hosts_loader_makes_the_same_use_of_such_arguments():
    kwargs = {"num_hidden_layers": 2}
    model = load_model("AutoModelForCausalLM", FOLDER, "cpu", kwargs)
    assert shape_of_model(model) == ModelShape(2, 64, 256)


@pytest.mark.parametrize("name", ["pythia-70m-deduped", "gpt2", "solu-1l"])
def test_an_official_name_out_of_reach_has_no_shape_yet(name, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert shape_of_named_model("HookedTransformer", name) is None


@pytest.mark.parametrize("kind", ["TransformerBridge", "AutoModelForCausalLM"])
@pytest.mark.parametrize("name", ["no-such-model", "no/such-model", "/no/such/model"])
def test_an_unknown_name_is_left_to_the_loader(kind, name):
    assert shape_of_named_model(kind, name) is None


def test_a_name_that_transformer_lens_does_not_know_is_an_error_with_the_nearest():
    with pytest.raises(ValueError, match=r"no model 'pythia-7m' .*pythia-70m.*Bridge"):
        shape_of_named_model("HookedTransformer", "pythia-7m")
    with pytest.raises(ValueError, match=r"no model '0!0'; for"):
        shape_of_named_model("HookedTransformer", "0!0")


def test_a_class_without_a_small_configuration_has_no_shape():
    assert shape_of_named_model("HookedMamba", "state-spaces/mamba-130m") is None


# Submodules of a Hugging Face model


def test_submodules_that_exist_pass():
    names = ["gpt_neox.layers.0", "gpt_neox.layers.4", "gpt_neox.embed_in"]
    check_hf_hook_names(FOLDER, names, {})


@pytest.mark.parametrize(
    "name", ["model.layers.0", "gpt_neox.layers.5", "gpt_neox.lay"]
)
def test_a_missing_submodule_is_an_error_that_lists_near_ones(name):
    message = rf"no hook '{re.escape(name)}'. The nearest are \[.*'gpt_neox\.lay"
    with pytest.raises(ValueError, match=message):
        check_hf_hook_names(FOLDER, ["gpt_neox.layers.0", name], {})


def test_arguments_that_change_the_model_change_its_submodules():
    kwargs = {"num_hidden_layers": 2}
    check_hf_hook_names(FOLDER, ["gpt_neox.layers.1"], kwargs)
    with pytest.raises(ValueError, match=r"no hook 'gpt_neox\.layers\.2'"):
        check_hf_hook_names(FOLDER, ["gpt_neox.layers.2"], kwargs)


def test_submodules_of_a_model_out_of_reach_are_left_to_the_loader():
    check_hf_hook_names("no/such-model", ["whatever"], {})


def test_trust_in_remote_code_is_passed_on(monkeypatch):
    from transformers import AutoModelForCausalLM

    given = []
    make = AutoModelForCausalLM.from_config

    def record(config, **kwargs):
        given.append(kwargs)
        return make(config)

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", record)
    kwargs = {"trust_remote_code": True, "device_map": "cpu"}
    check_hf_hook_names(FOLDER, ["gpt_neox.layers.0"], kwargs)
    assert given == [{"trust_remote_code": True}]


# Widths and contexts


@pytest.mark.parametrize("context_size", [1, 256])
def test_a_context_that_the_model_can_read_passes(context_size):
    check_context_size(context_size, FOLDER_SHAPE, "tiny")


def test_a_context_longer_than_the_models_is_an_error():
    with pytest.raises(ValueError, match=r"at most 256 tokens.*of 'tiny'; got 257"):
        check_context_size(257, FOLDER_SHAPE, "tiny")


def test_a_model_that_states_no_context_takes_any():
    check_context_size(10**6, ModelShape(1, 1, None), "tiny")


RESIDUAL_HOOKS = [
    "hook_embed",
    "embed.hook_out",
    "blocks.0.hook_resid_pre",
    "blocks.0.hook_resid_mid",
    "blocks.0.hook_resid_post",
    "blocks.0.hook_in",
    "blocks.0.hook_out",
    "gpt_neox.layers.3",
    "model.layers.3",
    "model.language_model.layers.3",
    "transformer.h.3",
]
OTHER_HOOKS = [
    "blocks.0.mlp.hook_post",
    "blocks.0.attn.q.hook_out",
    "blocks.0.mlp.in.hook_out",
    "unembed.hook_out",
    "model.layers.3.mlp.up_proj",
    "model.vision_tower.encoder.layers.3",
]


@pytest.mark.parametrize("name", RESIDUAL_HOOKS)
def test_a_wrong_d_in_on_the_residual_stream_is_an_error(name):
    check_width([name], 64, FOLDER_SHAPE)
    message = f"`d_in` must be 64, the width of the model at {name!r}; got 512"
    with pytest.raises(ValueError, match=re.escape(message)):
        check_width([name], 512, FOLDER_SHAPE)


@pytest.mark.parametrize("name", OTHER_HOOKS)
def test_the_width_elsewhere_is_not_guessed(name):
    check_width([name], 512, FOLDER_SHAPE)


def test_what_is_said_of_residual_hooks_is_true_of_the_models(bridges, hf_model, model):
    tokens = torch.arange(1, 5).view(1, 4)
    for lm in (*bridges.values(), hf_model, model):
        shape = shape_of_model(lm)
        _, cache = lm.run_with_cache(tokens)
        for name in set(cache) & set(lm.hook_dict):
            acts = cache[name]
            if isinstance(acts, torch.Tensor) and acts.ndim >= 3:
                check_width([name], acts.flatten(2).shape[-1], shape)


def test_hooks_of_different_widths_are_an_error_that_names_them():
    message = "same width; got hook_embed: 16, blocks.0.mlp.hook_post: 32. Choose"
    with pytest.raises(ValueError, match=re.escape(message)):
        check_widths({"hook_embed": 16, "blocks.0.mlp.hook_post": 32}, 16)


def test_a_measured_width_that_is_not_d_in_is_an_error():
    check_widths({POST[0]: 16, POST[1]: 16}, 16)
    with pytest.raises(ValueError, match=r"`d_in` must be 16.*at 'blocks.0.*; got 32"):
        check_widths({POST[0]: 16, POST[1]: 16}, 32)
