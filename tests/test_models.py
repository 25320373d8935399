"""Every kind of model that a run can be given.

Authority: Hugging Face's `hidden_states` for the vectors of the model in
`tests/data/paper/model`; it is loaded by its folder, with no hub.
"""

from typing import Any

import pytest
import torch
from conftest import D_VOCAB, PAPER_DATA, tiny_model, tiny_sae_config
from sae_lens import SAE, HookedSAETransformer, LanguageModelSAETrainingRunner
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from torch import Tensor
from transformers import AutoModelForCausalLM

from sae_lens_multilayer import (
    MultiLayerActivationsStore,
    reconstruction_metrics,
    views,
)
from sae_lens_multilayer.training import run_model
from sae_lens_multilayer.training.run_model import load_any_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:sae_lens")

FOLDER = str(PAPER_DATA / "model")
D_IN, BLOCKS = 64, 5


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


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
        model = load_any_model(config)
        store = MultiLayerActivationsStore.from_config(model, config, token_dataset)
        acts = store.get_multi_hook_activations(tokens)
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
            load_any_model(config), config, token_dataset
        )
        acts = list(store.get_multi_hook_activations(tokens).values())
        torch.testing.assert_close(acts[0], hidden_states[0])
        torch.testing.assert_close(acts[1], hidden_states[1])

    def test_bridge_that_only_knows_the_names_of_its_own(
        self, make_config, token_dataset, tokens, hidden_states
    ):
        """SAETransformerBridge ignores the alias `hook_resid_post` without a word."""
        model = SAETransformerBridge.boot_transformers(FOLDER, device="cpu")
        config = folder_config(make_config, hook_name="blocks.{layer}.hook_resid_post")
        store = MultiLayerActivationsStore.from_config(model, config, token_dataset)
        acts = store.get_multi_hook_activations(tokens)
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

    def test_a_model_of_ones_own(self, make_config, token_dataset, tokenizer):
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
        assert next(load_any_model(config).parameters()).dtype == torch.bfloat16


class TestErrors:
    @pytest.fixture
    def loads(self, monkeypatch) -> list[str]:
        calls: list[str] = []
        original = run_model.load_any_model

        def load(config):
            calls.append(config.model_name)
            return original(config)

        monkeypatch.setattr(run_model, "load_any_model", load)
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
        self.check(config, token_dataset, r"no hook.*The nearest are.*blocks.0.hook_")

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
    def test_what_the_configuration_tells_is_checked_before_the_weights_are_loaded(
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
        self.check(
            config, token_dataset, r"same width.*dense_h_to_4h: 256.*layers.1: 64"
        )

    def test_unknown_kind_of_model(self, make_config, token_dataset):
        config = folder_config(make_config, model_class_name="Oracle")
        self.check(config, token_dataset, "Oracle")
