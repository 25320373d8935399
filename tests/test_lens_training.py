"""Training in the space of a tuned lens: configs, whole runs, checkpoints.

Reference: the same run on vectors that were transformed beforehand; without a lens; and
the definition of the loss.
"""

import copy
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import wandb
from conftest import D_MODEL, N_LAYERS, tiny_model, tiny_sae_config
from sae_lens import (
    SAE,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    StandardTrainingSAEConfig,
    TrainingSAE,
)
from saes import HOOK_NAMES, random_lens
from tuned_lens import TunedLens

from sae_lens_multilayer import LayerLens, MultiLayerConfig, evaluate
from sae_lens_multilayer.lens.config import LensConfig
from sae_lens_multilayer.lens.fit import new_tuned_lens
from sae_lens_multilayer.models import loading
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.store.source import ModelSource
from sae_lens_multilayer.topk.reference import standardize
from sae_lens_multilayer.training.geometric_median import geometric_median

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:sae_lens")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def tuned_lens(model) -> TunedLens:
    lens = new_tuned_lens(model)
    for p in lens.layer_translators.parameters():
        p.data.normal_(std=0.2)
    return lens


@pytest.fixture
def folder(tuned_lens, tmp_path) -> Path:
    tuned_lens.save(tmp_path / "lens")
    return tmp_path / "lens"


@pytest.fixture
def start(model, token_dataset):
    def start(config, **overrides) -> Any:
        settings = {"override_model": model, "override_dataset": token_dataset}
        return LanguageModelSAETrainingRunner(config, **{**settings, **overrides})

    return start


def same(a: Any, b: Any) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


class TestConfig:
    def test_a_stock_architecture_cannot_have_a_lens(self, make_config, folder):
        sae = StandardTrainingSAEConfig(d_in=D_MODEL, d_sae=32)
        with pytest.raises(ValueError, match=r"`lens` needs a multi-layer.*'standard'"):
            make_config(sae=sae, lens=folder)

    @pytest.mark.parametrize("kind", ["folder", "name", "TunedLens", "LayerLens"])
    def test_what_is_saved_with_the_run_is_read_back(
        self, make_config, tuned_lens, folder, kind
    ):
        given = {
            "folder": folder,
            "name": "EleutherAI/pythia-70m-deduped",
            "TunedLens": tuned_lens,
            "LayerLens": LayerLens.from_tuned_lens(tuned_lens, HOOK_NAMES),
        }[kind]
        config = make_config(lens=given)
        saved = json.loads(json.dumps(config.to_dict()))
        again = MultiLayerConfig.from_dict(saved)
        assert json.loads(json.dumps(again.to_dict())) == saved
        if kind in ("folder", "name"):
            assert saved["lens"] == str(given)
        else:
            expected = LensConfig(
                HOOK_NAMES,
                N_LAYERS,
                D_MODEL,
                base_model_name="custom",
                unembed_hash=tuned_lens.config.unembed_hash,
            )
            assert LensConfig(**saved["lens"]) == expected
        assert config.lens is not saved["lens"]

    def test_without_a_lens_the_config_does_not_mention_one(self, make_config):
        assert make_config().to_dict()["lens"] is None


class TestEarlyErrors:
    """All of these are found before a model is loaded."""

    @pytest.fixture
    def check(self, monkeypatch, make_config, token_dataset, model):
        def load(*args, **kwargs):
            raise AssertionError("A model was loaded.")

        monkeypatch.setattr(loading, "load_by_name", load)

        def check(message, lens, **changes):
            config = make_config(lens=lens, **changes)
            if config.model_name == "tiny":
                shape = as_model(model).shape
                monkeypatch.setattr(loading, "shape_by_name", lambda *_: shape)
            with pytest.raises(ValueError, match=message):
                LanguageModelSAETrainingRunner(config, override_dataset=token_dataset)

        return check

    @staticmethod
    def rewrite(folder, tensors):
        held = torch.load(folder / "params.pt", weights_only=True)
        torch.save({**held, **tensors}, folder / "params.pt")

    @pytest.mark.parametrize("kind", ["object", "folder"])
    def test_a_width_other_than_the_saes(self, check, tuned_lens, folder, kind):
        lens = tuned_lens if kind == "object" else folder
        check("`d_in` must be 16.*; got 8", lens, sae=tiny_sae_config(d_in=8))

    def test_a_width_other_than_the_models(self, check, tokenizer):
        lens = new_tuned_lens(tiny_model(tokenizer, d_model=8))
        check("is for 2 blocks of width 8; 'tiny' has 2 of width 16", lens)

    def test_a_hook_that_cannot_have_a_lens(self, check, folder):
        names = ["hook_embed", *HOOK_NAMES]
        check("'hook_embed' cannot have a lens", folder, hook_names=names)

    def test_other_hooks(self, check):
        lens = random_lens(HOOK_NAMES[:1], "tuned_lens")
        check("hooks in the same order", lens)

    def test_another_alignment(self, check):
        check(r"lens_alignment.*'reference'; got 'tuned_lens'", random_lens())

    def test_an_ill_conditioned_translator(self, check, folder):
        weight = torch.zeros(D_MODEL, D_MODEL)
        weight[3, 3] = 2.0**-23 - 1
        self.rewrite(folder, {"1.weight": weight})
        check(r"blocks\.0\.hook_resid_post.*= 8\.39e\+06", folder)

    def test_a_name_that_cannot_be_had(self, check):
        check("There is no tuned lens 'EleutherAI/none'", "EleutherAI/none")

    def test_settings_without_a_checkpoint(self, check, make_config, tuned_lens):
        stated = make_config(lens=tuned_lens).to_dict()["lens"]
        check("its tensors are in the saved SAE", stated)

    def test_a_model_of_another_depth(self, check, tokenizer):
        lens = new_tuned_lens(tiny_model(tokenizer, n_layers=7, d_model=64))
        check(
            "for 7 blocks of width 64; '.*model' has 5 of width 64",
            lens,
            sae=tiny_sae_config(d_in=64),
            model_name=str(Path(__file__).parent / "data" / "paper" / "model"),
            model_class_name="AutoModelForCausalLM",
            hook_name="gpt_neox.layers.{layer}",
        )


class TestRuns:
    def test_a_lens_of_another_model_is_a_warning_that_names_both(
        self, start, make_config, model, tuned_lens
    ):
        other = tiny_model(model.tokenizer, n_layers=3)
        with pytest.raises(ValueError, match=r"one of the 2 blocks of 'custom'"):
            start(make_config(lens=tuned_lens), override_model=other)
        tuned_lens.config.unembed_hash = "a1b2"
        with pytest.warns(UserWarning, match="'custom' with unembedding hash a1b2"):
            start(make_config(lens=tuned_lens))

    def test_every_way_to_give_it_is_the_same(
        self, start, make_config, tuned_lens, folder
    ):
        lens = LayerLens.from_tuned_lens(tuned_lens, HOOK_NAMES)
        first, *others = (
            start(make_config(lens=given, output_path=None)).run()
            for given in (tuned_lens, folder, str(folder), lens)
        )
        assert all(same(first, sae) for sae in others)
        assert {tuple(t.shape) for t in first.lens.buffers()} == {
            (D_MODEL, D_MODEL),
            (D_MODEL,),
        }

    def test_it_is_trained_on_transformed_vectors(
        self, start, make_config, model, monkeypatch
    ):
        """As a run without a lens on vectors that were transformed on harvesting."""
        lens = random_lens()
        config = make_config(lens=lens, lens_alignment="reference", output_path=None)
        with_lens = start(config).run()
        activations = ModelSource.activations

        def transformed(source, tokens):
            acts = activations(source, tokens)
            return {name: lens.transform(x, name) for name, x in acts.items()}

        monkeypatch.setattr(ModelSource, "activations", transformed)
        beforehand = start(make_config(output_path=None)).run()
        with_lens.lens = None
        for name, tensor in beforehand.state_dict().items():
            torch.testing.assert_close(with_lens.state_dict()[name], tensor)

    def test_an_identity_changes_nothing(self, start, make_config, model):
        plain = start(make_config(output_path=None)).run()
        lens = new_tuned_lens(model)
        sae = start(make_config(output_path=None, lens=lens)).run()
        sae.lens = None
        assert same(sae, plain)

    def test_b_dec_starts_in_the_space_of_the_lens(
        self, start, make_config, tuned_lens
    ):
        runner = start(make_config(lens=tuned_lens, lr=1e-12))
        batch = next(runner.activations_store)
        runner._make_trainer(iter([])).step(batch)
        z = standardize(runner.sae.lens.transform(batch).flatten(0, 1))[0]
        torch.testing.assert_close(runner.sae.b_dec.data, geometric_median(z))

    def test_it_is_saved_and_used_without_a_word(
        self, start, make_config, model, tuned_lens, token_dataset
    ):
        config = make_config(lens=tuned_lens, n_checkpoints=1, lr=1e-2)
        trained = start(config).run()
        loaded: Any = SAE.load_from_disk(config.output_path)
        assert loaded.lens.config == trained.lens.config
        assert loaded.cfg.metadata.training_architecture == "multilayer"
        (checkpoint,) = Path(config.checkpoint_path).iterdir()
        assert TrainingSAE.load_from_disk(checkpoint).lens is not None
        tokens = torch.tensor(token_dataset.with_format(None)["input_ids"][:8])
        tables = [
            evaluate(sae, model, tokens).to_dataframe()
            for sae in (trained, loaded, loaded.views())
        ]
        for table in tables[1:]:
            torch.testing.assert_close(
                torch.tensor(table["fvu"].to_numpy()),
                torch.tensor(tables[0]["fvu"].to_numpy()),
                atol=1e-6,
                rtol=1e-5,
            )
        saved = json.loads((Path(config.output_path) / "runner_cfg.json").read_text())
        assert saved["lens"] == loaded.cfg.metadata.lens

    def test_hugging_face_names_have_lenses_too(self, make_config, token_dataset):
        path = str(Path(__file__).parent / "data" / "paper" / "model")
        names = {
            "AutoModelForCausalLM": "gpt_neox.layers.{layer}",
            "TransformerBridge": "blocks.{layer}.hook_resid_post",
        }
        saes: list[Any] = []
        for kind, name in names.items():
            config = make_config(
                sae=tiny_sae_config(d_in=64),
                model_name=path,
                model_class_name=kind,
                hook_name=name,
                output_path=None,
                training_tokens=128,
            )
            runner = LanguageModelSAETrainingRunner(
                config, override_dataset=token_dataset
            )
            torch.manual_seed(0)
            lens = new_tuned_lens(runner.model)
            for p in lens.layer_translators.parameters():
                p.data.normal_(std=0.05)
            config.lens = lens
            runner = LanguageModelSAETrainingRunner(
                config, override_dataset=token_dataset, override_model=runner.model
            )
            saes.append(runner.run())
        for name, tensor in saes[0].state_dict().items():
            found = saes[1].state_dict()[name]
            torch.testing.assert_close(found, tensor, atol=1e-3, rtol=0)

    def test_log_keys_name_the_space(self, start, make_config, tuned_lens, monkeypatch):
        logged: dict[str, Any] = {}
        monkeypatch.setattr(wandb, "log", lambda values, step: logged.update(values))
        for name in ("init", "finish", "Histogram"):
            monkeypatch.setattr(wandb, name, lambda *args, **kwargs: None)
        logger = LoggingConfig(
            wandb_log_frequency=3, eval_every_n_wandb_logs=2, log_weights_to_wandb=False
        )
        config = make_config(lens=tuned_lens, logger=logger, output_path=None)
        start(config).run()
        for prefix in ("layer_0", "layer_1", "metrics"):
            for name in ("lens_fvu", "lens_mse", "l0", "fvu", "mse", "delta_ce"):
                assert logged[f"{prefix}/{name}"] is not None
        assert logged["layer_0/lens_mse"] != pytest.approx(logged["layer_0/mse"], 0.05)


class TestCheckpoints:
    @pytest.fixture
    def checkpoint(self, start, make_config, tuned_lens, tmp_path) -> str:
        config = make_config(
            lens=tuned_lens, n_checkpoints=1, output_path=str(tmp_path / "first")
        )
        start(config).run()
        (path,) = Path(config.checkpoint_path).iterdir()
        return str(path)

    @pytest.mark.parametrize("given", ["nothing", "object", "settings"])
    def test_a_resumed_run_continues_in_the_lens_space(
        self, start, make_config, checkpoint, tuned_lens, given, caplog
    ):
        saved = json.loads(Path(checkpoint, "runner_cfg.json").read_text())["lens"]
        lens = {"nothing": None, "object": tuned_lens, "settings": saved}[given]
        config = make_config(
            lens=lens, resume_from_checkpoint=checkpoint, training_tokens=640
        )
        sae = start(config).run()
        # Of the settings that differ it names no lens, which is the same.
        (message,) = [m for m in caplog.messages if "other settings" in m]
        assert "`training_tokens`: 512" in message
        assert len(message.splitlines()) == 2
        x = torch.randn(3, D_MODEL)
        torch.testing.assert_close(
            sae.lens.transform(x, 0), tuned_lens.transform_hidden(x, 1)
        )
        assert SAE.load_from_disk(config.output_path).lens is not None

    def test_a_checkpoint_with_another_lens_is_an_error(
        self, start, make_config, checkpoint, tuned_lens
    ):
        other = copy.deepcopy(tuned_lens)
        other[1].bias.data += 1
        for name in ("resume_from_checkpoint", "from_pretrained_path"):
            config = make_config(lens=other, **{name: checkpoint})
            with pytest.raises(ValueError, match=r"The checkpoint at .*other tensors"):
                start(config)

    def test_a_checkpoint_without_a_lens_is_an_error(
        self, start, make_config, tuned_lens, tmp_path
    ):
        first = make_config(n_checkpoints=1, output_path=str(tmp_path / "first"))
        start(first).run()
        (path,) = Path(first.checkpoint_path).iterdir()
        config = make_config(lens=tuned_lens, resume_from_checkpoint=str(path))
        with pytest.raises(ValueError, match=r"must have the run's.*it has none"):
            start(config)

    def test_an_sae_that_is_trained_on_keeps_its_lens(
        self, start, make_config, checkpoint, tuned_lens
    ):
        config = make_config(from_pretrained_path=checkpoint, output_path=None)
        assert start(config).run().lens is not None
        given: Any = TrainingSAE.load_from_disk(checkpoint)
        config = make_config(lens=tuned_lens, output_path=None)
        assert start(config, override_sae=given).run() is given
        given.lens = None
        with pytest.raises(ValueError, match="`override_sae` must have the run's"):
            start(config, override_sae=given)

    def test_a_lens_of_other_hooks_than_the_runs_is_an_error(
        self, start, make_config, checkpoint
    ):
        config = make_config(from_pretrained_path=checkpoint, layers=[0])
        with pytest.raises(ValueError, match="hooks in the same order"):
            start(config)

    @pytest.mark.parametrize("way", ["resume_from_checkpoint", "from_pretrained_path"])
    def test_another_alignment_than_the_checkpoints_is_an_error(
        self, start, make_config, checkpoint, way
    ):
        config = make_config(lens_alignment="reference", **{way: checkpoint})
        with pytest.raises(
            ValueError, match=r"lens_alignment.*'tuned_lens'; got 'reference'"
        ):
            start(config)

    def test_another_alignment_than_the_given_saes_is_an_error(
        self, start, make_config, checkpoint
    ):
        given: Any = TrainingSAE.load_from_disk(checkpoint)
        config = make_config(lens_alignment="reference")
        with pytest.raises(
            ValueError, match=r"lens_alignment.*'tuned_lens'; got 'reference'"
        ):
            start(config, override_sae=given)
