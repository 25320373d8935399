"""Every kind of model that a run can be given.

References: Hugging Face's `hidden_states` for the vectors of the model in
`tests/data/paper/model`, loaded from its folder without the hub; the hooks and
configurations that the models of TransformerLens, SAELens and Transformers list.
"""

import re
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import D_VOCAB, PAPER_DATA, tiny_model, tiny_sae_config
from sae_lens import SAE, HookedSAETransformer, LanguageModelSAETrainingRunner
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.load_model import HookedProxyLM, load_model
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoModelForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from sae_lens_multilayer import (
    MultiLayerActivationsStore,
    MultiLayerConfig,
    reconstruction_metrics,
    views,
)
from sae_lens_multilayer.cli.options import ModelOptions
from sae_lens_multilayer.hooks import stop_at_layer
from sae_lens_multilayer.lens.fit import fit_tuned_lens
from sae_lens_multilayer.models import loading
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.models.loading import check_modules, shape_by_name
from sae_lens_multilayer.models.model import ModelShape, check_widths
from sae_lens_multilayer.store.source import ModelSource

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:sae_lens")

FOLDER = str(PAPER_DATA / "model")
D_IN, BLOCKS = 64, 5
FOLDER_SHAPE = ModelShape(n_layers=BLOCKS, d_model=D_IN, n_ctx=256, d_vocab=D_VOCAB)
KINDS = ["HookedTransformer", "TransformerBridge", "AutoModelForCausalLM"]
POST = [f"blocks.{layer}.hook_resid_post" for layer in range(BLOCKS)]


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
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


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(1, D_VOCAB, (4, 16), generator=torch.Generator())


@pytest.fixture(scope="module")
def hidden_states(tokens) -> tuple[Tensor, ...]:
    """The residual stream before each block, and after the last one.

    The last entry that Hugging Face gives is after the final norm; a hook replaces it.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(FOLDER)
    after_last: list[Tensor] = []
    model.get_submodule("gpt_neox.layers.4").register_forward_hook(
        lambda _, __, out: after_last.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
    return (*states[:-1], after_last[0])


def load_model_of(config: MultiLayerConfig):
    hook_names = config.resolve_hook_names(BLOCKS)
    return loading.load_by_name(*config.named_model, "cpu", hook_names)


def folder_config(make_config, **changes):
    settings = {
        "sae": tiny_sae_config(d_in=D_IN, d_sae=128),
        "model_name": FOLDER,
        "model_class_name": "AutoModelForCausalLM",
        "hook_name": "gpt_neox.layers.{layer}",
    }
    return make_config(**{**settings, **changes})


class TestVectors:
    @pytest.mark.parametrize(
        ("model_class_name", "hook_name", "first"),
        [
            ("AutoModelForCausalLM", "gpt_neox.layers.{layer}", 1),
            ("TransformerBridge", "blocks.{layer}.hook_resid_post", 1),
            ("TransformerBridge", "blocks.{layer}.hook_resid_pre", 0),
            ("TransformerBridge", "blocks.{layer}.hook_out", 1),
        ],
    )
    @pytest.mark.parametrize("layers", [None, [3, 1]])
    def test_vectors_are_hugging_faces_hidden_states(
        self,
        make_config,
        token_dataset,
        tokens,
        hidden_states,
        model_class_name,
        hook_name,
        first,
        layers,
    ):
        config = folder_config(
            make_config,
            model_class_name=model_class_name,
            hook_name=hook_name,
            layers=layers,
        )
        model = load_model_of(config)
        store = MultiLayerActivationsStore.from_config(model, config, token_dataset)
        assert isinstance(store.source, ModelSource)
        acts = store.source.activations(tokens)
        chosen = range(BLOCKS) if layers is None else layers
        assert list(acts) == [hook_name.format(layer=layer) for layer in chosen]
        for layer, found in zip(chosen, acts.values(), strict=True):
            torch.testing.assert_close(
                found, hidden_states[layer + first], rtol=1e-4, atol=1e-4
            )

    def test_embedding_of_a_hugging_face_model(
        self, make_config, token_dataset, tokens, hidden_states
    ):
        config = folder_config(
            make_config, hook_names=["gpt_neox.embed_in", "gpt_neox.layers.0"]
        )
        store = MultiLayerActivationsStore.from_config(
            load_model_of(config), config, token_dataset
        )
        assert isinstance(store.source, ModelSource)
        acts = list(store.source.activations(tokens).values())
        torch.testing.assert_close(acts[0], hidden_states[0])
        torch.testing.assert_close(acts[1], hidden_states[1])

    def test_a_bridge_with_only_its_own_hook_names(
        self, make_config, token_dataset, tokens, hidden_states
    ):
        """SAETransformerBridge ignores the alias `hook_resid_post` without a word."""
        model = SAETransformerBridge.boot_transformers(FOLDER, device="cpu")
        config = folder_config(make_config, hook_name="blocks.{layer}.hook_resid_post")
        store = MultiLayerActivationsStore.from_config(model, config, token_dataset)
        assert isinstance(store.source, ModelSource)
        acts = store.source.activations(tokens)
        for layer, found in enumerate(acts.values()):
            torch.testing.assert_close(
                found, hidden_states[layer + 1], rtol=1e-4, atol=1e-4
            )


class TestRuns:
    @pytest.mark.parametrize(
        ("model_class_name", "hook_name"),
        [
            ("AutoModelForCausalLM", "gpt_neox.layers.{layer}"),
            ("TransformerBridge", "blocks.{layer}.hook_resid_post"),
        ],
    )
    def test_a_model_in_a_folder_end_to_end(
        self, make_config, token_dataset, tokens, model_class_name, hook_name
    ):
        config = folder_config(
            make_config,
            model_class_name=model_class_name,
            hook_name=hook_name,
            training_tokens=1024,
            lr=1e-2,
        )
        runner = LanguageModelSAETrainingRunner(config, override_dataset=token_dataset)
        runner.run()
        loaded = SAE.load_from_disk(config.output_path)
        assert loaded.cfg.metadata.hook_names == [
            hook_name.format(layer=layer) for layer in range(BLOCKS)
        ]
        assert loaded.cfg.metadata.model_class_name == model_class_name
        metrics = reconstruction_metrics(loaded, runner.model, tokens)
        assert (metrics.fvu < 0.95).all()
        assert len(views(loaded)) == BLOCKS

    @pytest.mark.parametrize("text", [False, True])
    def test_text_is_tokenised_by_a_hugging_face_models_tokenizer(
        self, make_config, text_dataset, token_dataset, text
    ):
        dataset = text_dataset if text else token_dataset
        config = folder_config(make_config, output_path=None)
        runner = LanguageModelSAETrainingRunner(config, override_dataset=dataset)
        assert next(runner.activations_store).shape == (64, BLOCKS, D_IN)

    def test_a_custom_model(self, make_config, token_dataset, tokenizer):
        model = tiny_model(tokenizer, HookedSAETransformer)
        assert isinstance(model, HookedSAETransformer)
        runner = LanguageModelSAETrainingRunner(
            make_config(), override_dataset=token_dataset, override_model=model
        )
        assert runner.model is model
        sae = runner.run()
        tokens = torch.tensor(token_dataset.with_format(None)["input_ids"][:4])
        _, cache = model.run_with_cache_with_saes(tokens, saes=views(sae))
        name = "blocks.1.hook_resid_post.hook_sae_acts_post"
        assert cache[name].shape == (4, 16, 64)

    def test_model_kwargs_reach_the_model(self, make_config, token_dataset):
        config = folder_config(
            make_config,
            model_from_pretrained_kwargs={"dtype": torch.bfloat16},
        )
        assert next(load_model_of(config).parameters()).dtype == torch.bfloat16


class TestErrors:
    @pytest.fixture
    def loads(self, monkeypatch) -> list[str]:
        calls: list[str] = []
        original = loading.load_by_name

        def load(*args):
            calls.append(args[1])
            return original(*args)

        monkeypatch.setattr(loading, "load_by_name", load)
        return calls

    def check(self, config, token_dataset, match) -> None:
        with pytest.raises(ValueError, match=match):
            LanguageModelSAETrainingRunner(config, override_dataset=token_dataset)

    @pytest.mark.parametrize("model_class_name", ["AutoModelForCausalLM"])
    def test_hook_that_does_not_exist_is_found_before_the_weights_are_loaded(
        self, make_config, token_dataset, loads, model_class_name
    ):
        config = folder_config(make_config, hook_name="gpt_neox.layer.{layer}")
        self.check(
            config, token_dataset, r"no hook 'gpt_neox.layer.0'.*'gpt_neox.layers.0'"
        )
        assert loads == []

    def test_hook_that_a_bridge_does_not_have_lists_near_ones(
        self, make_config, token_dataset
    ):
        config = folder_config(
            make_config,
            model_class_name="TransformerBridge",
            hook_name="blocks.{layer}.hook_residual_post",
        )
        self.check(config, token_dataset, r"no hook.*Known.*blocks.0.hook_")

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"layers": [0, 5]}, r"in \[0, 5\) for .*got \[0, 5\]"),
            ({"context_size": 257, "training_tokens": 1024}, r"at most 256.*got 257"),
        ],
    )
    @pytest.mark.parametrize(
        ("model_class_name", "hook_name"),
        [
            ("AutoModelForCausalLM", "gpt_neox.layers.{layer}"),
            ("TransformerBridge", "blocks.{layer}.hook_resid_post"),
        ],
    )
    def test_the_configuration_is_checked_before_the_weights_are_loaded(
        self,
        make_config,
        token_dataset,
        loads,
        model_class_name,
        hook_name,
        changes,
        match,
    ):
        config = folder_config(
            make_config,
            model_class_name=model_class_name,
            hook_name=hook_name,
            **changes,
        )
        self.check(config, token_dataset, match)
        assert loads == []

    @pytest.mark.parametrize(
        ("model_class_name", "hook_name"),
        [
            ("AutoModelForCausalLM", "gpt_neox.layers.{layer}"),
            ("TransformerBridge", "blocks.{layer}.hook_resid_post"),
        ],
    )
    def test_wrong_d_in_is_found_before_the_weights_are_loaded(
        self, make_config, token_dataset, loads, model_class_name, hook_name
    ):
        config = folder_config(
            make_config,
            sae=tiny_sae_config(d_in=32),
            model_class_name=model_class_name,
            hook_name=hook_name,
        )
        self.check(config, token_dataset, r"`d_in` must be 64.*got 32")
        assert loads == []

    def test_hooks_of_different_widths(self, make_config, token_dataset):
        config = folder_config(
            make_config,
            hook_names=["gpt_neox.layers.0.mlp.dense_h_to_4h", "gpt_neox.layers.1"],
        )
        self.check(config, token_dataset, r"must be 256.*dense_h_to_4h.*got 64")

    def test_unknown_kind_of_model(self, make_config, token_dataset):
        config = folder_config(make_config, model_class_name="Oracle")
        self.check(config, token_dataset, "Oracle")


# Folders


@pytest.mark.parametrize(
    ("hook_name", "model_class_name"),
    [
        ("blocks.{layer}.hook_resid_post", "TransformerBridge"),
        ("gpt_neox.layers.{layer}", "AutoModelForCausalLM"),
    ],
)
def test_a_folder_needs_no_class_name(
    make_config, token_dataset, hook_name, model_class_name
):
    config = make_config(
        sae=tiny_sae_config(d_in=D_IN), model_name=FOLDER, hook_name=hook_name
    )
    assert config.model_class_name == model_class_name
    runner = LanguageModelSAETrainingRunner(config, override_dataset=token_dataset)
    metadata: Any = runner.run().cfg.metadata
    assert metadata.model_class_name == model_class_name
    # A command on an SAE that was trained on a model of a name, or without one.
    for saved in (SAEMetadata(), SAEMetadata(model_class_name="HookedTransformer")):
        hook_names: list[str] = metadata.hook_names
        model = ModelOptions(model_name=FOLDER).load(saved, hook_names)
        assert as_model(model).own_hook_names(hook_names) == hook_names


def test_a_name_keeps_its_class(make_config):
    assert make_config(model_name="gpt2").model_class_name == "HookedTransformer"


# How far the model must run


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


def test_a_hooked_transformer_has_the_usual_hook_names(model):
    names = ["hook_embed", "blocks.0.hook_resid_pre", POST[1]]
    assert as_model(model).own_hook_names(names) == names


def test_a_bridge_uses_its_own_hook_names(bridges):
    names = ["hook_embed", "blocks.0.hook_resid_pre", POST[4]]
    own = ["embed.hook_out", "blocks.0.hook_in", "blocks.4.hook_out"]
    assert as_model(bridges[TransformerBridge]).own_hook_names(names) == names
    assert as_model(bridges[SAETransformerBridge]).own_hook_names(names) == own
    assert as_model(bridges[SAETransformerBridge]).own_hook_names(own) == own


@pytest.mark.parametrize("cls", [TransformerBridge, SAETransformerBridge])
def test_a_bridge_gives_the_vectors_of_the_paper_under_these_names(bridges, cls):
    """`hidden_states` of Transformers: entry l is before block l, so after l - 1."""
    bridge, names = bridges[cls], ["hook_embed", "blocks.2.hook_resid_pre", POST[1]]
    own = as_model(bridge).own_hook_names(names)
    tokens = torch.arange(1, 9).view(1, 8)
    _, cache = bridge.run_with_cache(
        tokens, names_filter=own, stop_at_layer=stop_at_layer(own)
    )
    with torch.no_grad():
        states = bridge.original_model(tokens, output_hidden_states=True).hidden_states
    for name, state in zip(own, (states[0], states[2], states[2]), strict=True):
        torch.testing.assert_close(cache[name], state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cls", [TransformerBridge, SAETransformerBridge])
def test_a_bridge_computes_no_logits_after_the_last_hook(bridges, cls):
    bridge, tokens = bridges[cls], torch.arange(1, 9).view(1, 8)
    model, ran = as_model(bridge), []
    names = [POST[0], f"blocks.{model.shape.n_layers - 1}.hook_resid_post"]
    own = model.own_hook_names(names)
    _, whole = bridge.run_with_cache(tokens, names_filter=own)
    unembedding = bridge.original_model.get_output_embeddings()
    handle = unembedding.register_forward_hook(lambda *_: ran.append("logits"))
    with torch.no_grad():
        vectors = model.vectors(tokens, names)
        assert ran == []
        bridge(tokens)
    handle.remove()
    assert ran == ["logits"]
    for name, x in zip(own, vectors, strict=True):
        torch.testing.assert_close(x, whole[name], rtol=0, atol=0)


def test_a_hook_that_does_not_exist_is_an_error_that_lists_near_ones(model):
    message = r"has no hook 'blocks\.0\.hook_resid_pots'.*Known.*'blocks\.0\.hook_r"
    with pytest.raises(ValueError, match=message):
        as_model(model).own_hook_names([POST[0], "blocks.0.hook_resid_pots"])
    with pytest.raises(ValueError, match=r"no hook 'blocks\.2\.hook_resid_post'"):
        as_model(model).own_hook_names([POST[2]])


def test_a_hook_like_no_other_is_an_error_too(model):
    with pytest.raises(ValueError, match=r"no hook 'qqqq'. Known: \['"):
        as_model(model).own_hook_names(["qqqq"])


# Sizes


@pytest.mark.parametrize("name", ["attn.hook_result", "hook_mlp_in"])
def test_a_hook_that_is_switched_off_is_an_error_that_names_it(model, name):
    with pytest.raises(ValueError, match=rf"blocks\.0\.{name}.*switched off"):
        as_model(model).vectors(torch.ones(1, 2).long(), [f"blocks.0.{name}"])


def test_a_model_whose_embedding_is_projected_has_no_lens():
    config = OPTConfig(
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=16,
    )
    no_tokenizer: Any = None
    model = HookedProxyLM(OPTForCausalLM(config), no_tokenizer)
    with pytest.raises(ValueError, match=r"the width 32 .* have 16"):
        fit_tuned_lens(model, torch.ones(1, 4).long(), n_steps=1)


def test_shape_of_a_loaded_model_of_every_kind(model, hf_model, bridges):
    assert as_model(model).shape == ModelShape(
        n_layers=2, d_model=16, n_ctx=16, d_vocab=D_VOCAB
    )
    assert as_model(hf_model).shape == FOLDER_SHAPE
    for bridge in bridges.values():
        assert as_model(bridge).shape == FOLDER_SHAPE


def test_shape_of_something_else_is_an_error(hf_model):
    message = "must be a HookedTransformer.*HookedProxyLM.*got GPTNeoXForCausalLM"
    with pytest.raises(ValueError, match=message):
        as_model(hf_model.model)


@pytest.mark.parametrize("kind", KINDS)
def test_shape_is_read_before_the_model_is_loaded(kind, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "__init__", None)  # no model is made
    assert shape_by_name(kind, FOLDER) == FOLDER_SHAPE
    assert shape_by_name(kind, FOLDER, {}) == FOLDER_SHAPE


@pytest.mark.parametrize(
    ("kind", "kwargs", "shape"),
    [
        ("HookedTransformer", {"n_ctx": 512}, ModelShape(5, 64, 512, D_VOCAB)),
        ("HookedTransformer", {"dtype": "float32"}, FOLDER_SHAPE),
        ("TransformerBridge", {"n_ctx": 512}, ModelShape(5, 64, 512, D_VOCAB)),
        (
            "TransformerBridge",
            {"hf_config_overrides": {"num_hidden_layers": 2}},
            ModelShape(2, 64, 256, D_VOCAB),
        ),
        (
            "AutoModelForCausalLM",
            {"num_hidden_layers": 2},
            ModelShape(2, 64, 256, D_VOCAB),
        ),
        ("AutoModelForCausalLM", {"device_map": "cpu"}, FOLDER_SHAPE),
        ("AutoModelForCausalLM", {"torch_dtype": torch.bfloat16}, FOLDER_SHAPE),
    ],
)
def test_arguments_that_change_the_model_change_its_shape(kind, kwargs, shape):
    before = dict(kwargs)
    assert shape_by_name(kind, FOLDER, kwargs) == shape
    assert kwargs == before


def test_transformer_lens_changes_the_shape_by_arguments_of_its_own(monkeypatch):
    monkeypatch.setattr(loading, "_is_folder", lambda _: False)
    kwargs = {"first_n_layers": 2, "n_ctx": 512}
    shape = shape_by_name("HookedTransformer", FOLDER, kwargs)
    assert shape == ModelShape(2, 64, 512, D_VOCAB)


def test_the_hosts_loader_makes_the_same_use_of_such_arguments():
    kwargs = {"num_hidden_layers": 2}
    model = load_model("AutoModelForCausalLM", FOLDER, "cpu", kwargs)
    assert as_model(model).shape == ModelShape(2, 64, 256, D_VOCAB)


@pytest.mark.parametrize("name", ["pythia-70m-deduped", "gpt2", "solu-1l"])
def test_an_official_name_out_of_reach_has_no_shape_yet(name, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert shape_by_name("HookedTransformer", name) is None


@pytest.mark.parametrize("kind", ["TransformerBridge", "AutoModelForCausalLM"])
@pytest.mark.parametrize("name", ["no-such-model", "no/such-model", "/no/such/model"])
def test_an_unknown_name_is_left_to_the_loader(kind, name):
    assert shape_by_name(kind, name) is None


def test_a_name_unknown_to_transformer_lens_is_an_error_with_the_nearest():
    with pytest.raises(ValueError, match=r"folder.* no model 'pythia-7m'.*pythia-70m"):
        shape_by_name("HookedTransformer", "pythia-7m")


def test_a_class_without_a_small_configuration_has_no_shape():
    assert shape_by_name("HookedMamba", "state-spaces/mamba-130m") is None


# Submodules of a Hugging Face model


@pytest.fixture
def t5(tokenizer, tmp_path) -> str:
    settings: dict[str, Any] = {"vocab_size": 512, "decoder_start_token_id": 0}
    settings |= {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = T5Config(**settings)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def test_an_encoder_decoder_model_is_an_early_error(t5, tokenizer):
    raw = T5ForConditionalGeneration.from_pretrained(t5)
    bridge = TransformerBridge.boot_transformers(t5, device="cpu")
    message = f"must be a decoder, .*'{t5}' has an encoder and a decoder .*'t5'.*GPT-2"
    for model in (HookedProxyLM(raw, tokenizer), bridge):
        with pytest.raises(ValueError, match=message):
            as_model(model)
    for kind in ("TransformerBridge", "HookedTransformer"):
        with pytest.raises(ValueError, match=message):
            shape_by_name(kind, t5)


def test_a_model_that_is_no_causal_one_is_a_short_error(t5):
    message = f"^`model_name` must be a causal .*'{t5}' is none.*T5Config.{{,70}}$"
    with pytest.raises(ValueError, match=message):
        loading.load_by_name("AutoModelForCausalLM", t5, None, "cpu")
    with pytest.raises(ValueError, match=message):
        check_modules("AutoModelForCausalLM", t5, {}, ["decoder.block.0"])


def test_submodules_that_exist_pass():
    names = ["gpt_neox.layers.0", "gpt_neox.layers.4", "gpt_neox.embed_in"]
    check_modules("AutoModelForCausalLM", FOLDER, {}, names)


@pytest.mark.parametrize(
    "name", ["model.layers.0", "gpt_neox.layers.5", "gpt_neox.lay"]
)
def test_a_missing_submodule_is_an_error_that_lists_near_ones(name):
    message = rf"no hook '{re.escape(name)}'. Known: \[.*'gpt_neox\.lay"
    with pytest.raises(ValueError, match=message):
        check_modules("AutoModelForCausalLM", FOLDER, {}, ["gpt_neox.layers.0", name])


def test_arguments_that_change_the_model_change_its_submodules():
    kwargs = {"num_hidden_layers": 2}
    check_modules("AutoModelForCausalLM", FOLDER, kwargs, ["gpt_neox.layers.1"])
    with pytest.raises(ValueError, match=r"no hook 'gpt_neox\.layers\.2'"):
        check_modules("AutoModelForCausalLM", FOLDER, kwargs, ["gpt_neox.layers.2"])


def test_trust_in_remote_code_is_passed_on(monkeypatch):
    from transformers import AutoModelForCausalLM

    given = []
    make = AutoModelForCausalLM.from_config

    def record(config, **kwargs):
        given.append(kwargs)
        return make(config)

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", record)
    kwargs = {"trust_remote_code": True, "device_map": "cpu"}
    check_modules("AutoModelForCausalLM", FOLDER, kwargs, ["gpt_neox.layers.0"])
    assert given == [{"trust_remote_code": True}]


# Widths and contexts


@pytest.mark.parametrize("context_size", [1, 256])
def test_a_context_that_the_model_can_read_passes(context_size):
    FOLDER_SHAPE.check_context_size(context_size, "tiny")


def test_a_context_longer_than_the_models_is_an_error():
    with pytest.raises(ValueError, match=r"at most 256 tokens.*of 'tiny'; got 257"):
        FOLDER_SHAPE.check_context_size(257, "tiny")


def test_a_model_that_states_no_context_takes_any():
    ModelShape(1, 1).check_context_size(10**6, "tiny")


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
    FOLDER_SHAPE.check_width([name], 64)
    message = f"`d_in` must be 64, the width of the model at {name!r}; got 512"
    with pytest.raises(ValueError, match=re.escape(message)):
        FOLDER_SHAPE.check_width([name], 512)


@pytest.mark.parametrize("name", OTHER_HOOKS)
def test_the_width_elsewhere_is_not_guessed(name):
    FOLDER_SHAPE.check_width([name], 512)


def test_residual_hooks_have_the_width_of_the_model(bridges, hf_model, model):
    tokens = torch.arange(1, 5).view(1, 4)
    for lm in (*bridges.values(), hf_model, model):
        shape = as_model(lm).shape
        _, cache = lm.run_with_cache(tokens)
        for name in set(cache) & set(lm.hook_dict):
            acts = cache[name]
            if isinstance(acts, torch.Tensor) and acts.ndim >= 3:
                shape.check_width([name], acts.flatten(2).shape[-1])


def test_hooks_of_different_widths_are_an_error_that_names_them():
    with pytest.raises(ValueError, match=r"must be 32, .*hook_post'; got 16"):
        check_widths({"hook_embed": 16, "blocks.0.mlp.hook_post": 32}, 16)


def test_a_measured_width_that_is_not_d_in_is_an_error():
    check_widths({POST[0]: 16, POST[1]: 16}, 16)
    with pytest.raises(ValueError, match=r"`d_in` must be 16.*at 'blocks.0.*; got 32"):
        check_widths({POST[0]: 16, POST[1]: 16}, 32)
