"""The runner: whole runs on a small model.

Reference: SAELens' runner for the cadence of checkpoints and logs; the same run in
other circumstances (prefetching, compiled, resumed); PCA for what training must beat.
"""

import copy
import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from conftest import (
    D_MODEL,
    D_VOCAB,
    N_LAYERS,
    PAPER_DATA,
    count_calls,
    tiny_sae_config,
)
from datasets import Dataset
from sae_lens import (
    SAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    StandardTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.training._interruption import InterruptedException, interrupt_callback
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae_lens_multilayer import (
    MultiLayerActivationsStore,
    MultiLayerConfig,
    MultiLayerTrainingSAE,
    MultiLayerTrainingSAEConfig,
    NonFiniteActivationError,
    evaluate,
    reconstruction_metrics,
    views,
)
from sae_lens_multilayer.models import loading
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.store.source import ModelSource
from sae_lens_multilayer.training import checkpoint as checkpoint_module
from sae_lens_multilayer.training import runner as runner_module
from sae_lens_multilayer.training.evaluator import MultiLayerEvaluator
from sae_lens_multilayer.training.trainer import MultiLayerTrainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:sae_lens")

RESID_POST = [f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS)]
CHECKPOINT_FILES = {
    "activation_scaler.json",
    "activations_store_state.safetensors",
    "cfg.json",
    "record.json",
    "runner_cfg.json",
    "sae_weights.safetensors",
    "sparsity.safetensors",
    "trainer_state.json",
    "trainer_state.safetensors",
}


@pytest.fixture
def start(model, token_dataset):
    """Create a runner through SAELens' class."""

    def start(config, **overrides) -> runner_module.MultiLayerSAETrainingRunner:
        settings = {"override_model": model, "override_dataset": token_dataset}
        runner = LanguageModelSAETrainingRunner(config, **{**settings, **overrides})
        assert isinstance(runner, runner_module.MultiLayerSAETrainingRunner)
        return runner

    return start


@pytest.fixture
def steps(monkeypatch):
    """Count the steps that trainers take; `steps.before[n]` is called before step n."""

    class Steps:
        n = 0
        before: dict[int, Any] = {}  # noqa: RUF012

    original = MultiLayerTrainer.step

    def step(self, batch):
        Steps.before.pop(Steps.n, lambda: None)()
        Steps.n += 1
        return original(self, batch)

    monkeypatch.setattr(MultiLayerTrainer, "step", step)
    return Steps


@pytest.fixture(autouse=True)
def default_signal_handlers():
    """SAELens' own runner leaves its handlers behind."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def listing(path) -> set[str]:
    """Names of what is in a folder, hidden ones too."""
    return set(os.listdir(path)) if Path(path).exists() else set()


def weights(sae) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in sae.named_parameters()}


def same(a, b) -> bool:
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def fail(*args: Any, **kwargs: Any) -> None:
    raise OSError("The disk is full")


class TestQuality:
    def test_beats_the_best_linear_reconstruction_from_as_many_components(
        self, make_config
    ):
        """Both take standardised vectors of held-out tokens at all layers; PCA is
        fitted on the training tokens, one for all layers, with the same k."""
        rng = np.random.default_rng(0)
        train = rng.integers(1, D_VOCAB, (500, 16))
        test = torch.from_numpy(rng.integers(1, D_VOCAB, (60, 16)))
        k = 8
        config = make_config(
            sae=MultiLayerTrainingSAEConfig(d_in=64, d_sae=512, k=k),
            model_name=str(PAPER_DATA / "model"),
            model_class_name="AutoModelForCausalLM",
            hook_name="gpt_neox.layers.{layer}",
            layers=[0, 2, 4],
            training_tokens=150 * 192,
            train_batch_size_tokens=192,
            store_batch_size_prompts=32,
            n_batches_in_buffer=256,
            lr=3e-3,
        )
        runner = LanguageModelSAETrainingRunner(
            config, override_dataset=Dataset.from_dict({"input_ids": train})
        )
        sae = runner.run()
        store = runner.activations_store
        assert isinstance(store, MultiLayerActivationsStore)
        assert isinstance(store.source, ModelSource)
        activations = store.source.activations

        def vectors(tokens):
            acts = activations(tokens)
            rows = torch.cat([a.flatten(0, 1) for a in acts.values()])
            std, mean = torch.std_mean(rows, dim=1, keepdim=True)
            return (rows - mean) / std

        fitted = vectors(torch.from_numpy(train[:300]))
        held_out = vectors(test)
        mean = fitted.mean(0)
        basis = torch.linalg.svd(fitted - mean, full_matrices=False).Vh[:k]
        pca = (held_out - mean) @ basis.T @ basis + mean
        with torch.no_grad():
            ours = sae(held_out)
        total = (held_out - held_out.mean(0)).square().sum()
        fvu_pca = ((pca - held_out).square().sum() / total).item()
        fvu = ((ours - held_out).square().sum() / total).item()
        assert fvu < 0.5 * fvu_pca
        # And at every layer in raw space it explains something.
        assert (reconstruction_metrics(sae, runner.model, test).fvu < 0.8).all()


class TestRuns:
    def test_checkpoints_inside_the_output_are_an_error(self, start, make_config):
        config = make_config(output_path="out", checkpoint_path="out")
        with pytest.raises(ValueError, match="`checkpoint_path` must lie outside"):
            start(config)

    def test_a_long_name_can_be_saved(self, start, make_config, tmp_path):
        config = make_config(output_path=str(tmp_path / ("x" * 250)))
        start(config).run()
        assert (Path(config.output_path) / "cfg.json").is_file()

    @pytest.mark.parametrize("token", [-1, D_VOCAB])
    def test_a_token_outside_the_vocabulary_is_an_error(
        self, start, make_config, token
    ):
        rows = np.full((64, 16), 3)
        rows[5, 3] = token
        dataset = Dataset.from_dict({"input_ids": rows})
        with pytest.raises(ValueError, match=r"Token ids must be in \[0, 512\)"):
            start(make_config(), override_dataset=dataset).run()

    def test_total_that_is_no_multiple_of_the_batch_takes_whole_batches(
        self, start, make_config, steps
    ):
        start(make_config(training_tokens=200)).run()
        assert steps.n == 4

    def test_one_layer_end_to_end(self, start, make_config, model, token_dataset):
        config = make_config(layers=[1], training_tokens=1024, lr=1e-2)
        runner = start(config)
        runner.run()
        loaded = SAE.load_from_disk(config.output_path)
        assert loaded.cfg.metadata.hook_names == [RESID_POST[1]]
        (view,) = views(loaded)
        tokens = torch.tensor(token_dataset.with_format(None)["input_ids"][:8])
        metrics = reconstruction_metrics(loaded, model, tokens)
        assert metrics.fvu.shape == (1,)
        assert metrics.fvu.item() < 0.5
        assert view.cfg.metadata.hook_name == RESID_POST[1]

    def test_run_off_the_main_thread(self, start, make_config):
        results: list[Any] = []

        def work():
            results.append(start(make_config()).run())

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert isinstance(results[0], MultiLayerTrainingSAE)

    def test_signal_handlers_are_restored_after_a_run(self, start, make_config):
        before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
        start(make_config()).run()
        after = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
        assert after == before

    def test_same_seed_same_weights(self, start, make_config):
        first, second = (start(make_config(output_path=None)).run() for _ in range(2))
        assert same(first, second)
        other = start(make_config(output_path=None, seed=1)).run()
        assert not same(first, other)

    def test_prefetching_gives_the_same_weights_and_no_more_model_passes(
        self, start, make_config, model, monkeypatch
    ):
        def train(prefetch):
            runner = start(make_config(output_path=None, prefetch_llm_batches=prefetch))
            with monkeypatch.context() as patch:
                passes = count_calls(patch, model, "run_with_cache")
                return runner.run(), passes

        plain, passes = train(False)
        for prefetch in (True, 4):
            sae, passes_ahead = train(prefetch)
            assert same(sae, plain)
            assert len(passes_ahead) == len(passes) == 8

    def test_compiling_the_model_gives_the_same_weights(
        self, start, make_config, model, monkeypatch
    ):
        settings = {"output_path": None, "training_tokens": 128, "layers": [0]}
        plain = start(make_config(**settings)).run()
        compile_ = torch.compile
        # Tracing is what can go wrong here; a C++ compiler is not needed for it.
        monkeypatch.setattr(
            torch, "compile", lambda f, **_: compile_(f, backend="eager")
        )
        original = model.run_with_cache
        runner = start(make_config(compile_llm=True, **settings))
        assert model.run_with_cache is not original
        assert same(runner.run(), plain)

    def test_global_random_state_does_not_matter(self, start, make_config):
        torch.manual_seed(1)
        first = start(make_config(output_path=None)).run()
        torch.manual_seed(2)
        assert same(first, start(make_config(output_path=None)).run())

    def test_bad_activation_stops_the_run_and_saves_nothing_over(
        self, start, make_config, model
    ):
        config = make_config(n_checkpoints=7, n_batches_in_buffer=1)
        runner = start(config)
        served = itertools.count()

        def spoil(module, args, output):
            return output * (float("nan") if next(served) >= 5 else 1.0)

        model.blocks[0].hook_resid_post.register_forward_hook(spoil, prepend=True)
        with pytest.raises(NonFiniteActivationError, match=RESID_POST[0]):
            runner.run()
        saved = listing(config.checkpoint_path)
        assert saved
        assert all(name.isdigit() for name in saved)
        for name in saved:
            tensors = load_file(
                f"{config.checkpoint_path}/{name}/sae_weights.safetensors"
            )
            assert all(t.isfinite().all() for t in tensors.values())
        assert not Path(config.output_path).exists()


class TestFinite:
    """No weights that are not finite are saved."""

    @pytest.mark.parametrize("bandwidth", [1e-40, float("nan")])
    def test_every_gradient_is_checked(self, start, make_config, bandwidth):
        sae = JumpReLUTrainingSAEConfig(
            d_in=D_MODEL, d_sae=32, jumprelu_bandwidth=bandwidth
        )
        config = make_config(sae=sae, lr=1e-2)
        with pytest.raises(FloatingPointError, match="threshold"):
            start(config).run()
        assert not Path(config.output_path).exists()

    def test_weights_after_the_last_step_are_checked(self, start, make_config):
        config = make_config(training_tokens=64, lr=1e39, save_final_checkpoint=True)
        with pytest.raises(FloatingPointError, match=r"must be finite.*W_enc"):
            start(config).run()
        assert not Path(config.output_path).exists()
        assert listing(config.checkpoint_path) == set()


class TestSchedules:
    @pytest.mark.parametrize("name", ["constant", "cosineannealing"])
    @pytest.mark.parametrize(("n_tokens", "n_steps"), [(32, 1), (200, 4)])
    def test_a_partial_last_step_has_a_learning_rate(
        self, start, make_config, name, n_tokens, n_steps, monkeypatch
    ):
        rates = []
        update = MultiLayerTrainer._update_weights

        def record(trainer):
            rates.append(trainer.optimizer.param_groups[0]["lr"])
            update(trainer)

        monkeypatch.setattr(MultiLayerTrainer, "_update_weights", record)
        settings = {"lr_scheduler_name": name, "lr_end": 0.0, "output_path": None}
        start(make_config(training_tokens=n_tokens, **settings)).run()
        assert len(rates) == n_steps
        assert min(rates) > 0

    def test_a_schedule_without_steps_is_an_error(self, make_config):
        with pytest.raises(ValueError, match="`lr_warm_up_steps`"):
            make_config(lr_scheduler_name="cosineannealing", lr_warm_up_steps=8)


class TestCheckpoints:
    @pytest.mark.parametrize(
        ("n_checkpoints", "final"), [(0, False), (3, True), (7, False), (20, False)]
    )
    def test_cadence_is_the_hosts(
        self, start, make_config, tmp_path, model, token_dataset, n_checkpoints, final
    ):
        cadence = {"n_checkpoints": n_checkpoints, "save_final_checkpoint": final}
        config = make_config(**cadence)
        start(config).run()
        host_config = LanguageModelSAERunnerConfig(
            sae=StandardTrainingSAEConfig(d_in=D_MODEL, d_sae=32),
            hook_name=RESID_POST[0],
            checkpoint_path=str(tmp_path / "host"),
            output_path=None,
            **cadence,
            **{
                name: getattr(config, name)
                for name in (
                    "model_name",
                    "context_size",
                    "training_tokens",
                    "train_batch_size_tokens",
                    "store_batch_size_prompts",
                    "n_batches_in_buffer",
                    "logger",
                    "prepend_bos",
                    "verbose",
                )
            },
        )
        host = LanguageModelSAETrainingRunner(
            host_config, override_dataset=token_dataset, override_model=model
        )
        assert not isinstance(host, runner_module.MultiLayerSAETrainingRunner)
        host.run()
        assert listing(config.checkpoint_path) == listing(host_config.checkpoint_path)
        for name in listing(config.checkpoint_path):
            folder = Path(config.checkpoint_path) / name
            assert listing(folder) == CHECKPOINT_FILES
            assert isinstance(TrainingSAE.load_from_disk(folder), MultiLayerTrainingSAE)

    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.ENOSPC, "No space left on device"),
            SafetensorError("I/O error: No space left on device (os error 28)"),
        ],
    )
    def test_a_full_disk_is_logged_and_the_run_continues(
        self, start, make_config, monkeypatch, caplog, error
    ):
        config = make_config(n_checkpoints=3, keep_last_n_checkpoints=1)
        runner = start(config)
        saves = itertools.count()
        save = runner.save_checkpoint

        def fail_once(checkpoint_path):
            if next(saves) == 1:
                assert listing(config.checkpoint_path) > {"192"}  # and a partial one
                raise error
            save(checkpoint_path)

        monkeypatch.setattr(runner, "save_checkpoint", fail_once)
        keep = checkpoint_module.keep_newest
        seen = []
        monkeypatch.setattr(
            checkpoint_module,
            "keep_newest",
            lambda folder, n: (seen.append(listing(folder)), keep(folder, n)),
        )
        sae = runner.run()
        assert seen == [{"192"}, {"192", "448"}]
        assert listing(config.checkpoint_path) == {"448"}
        assert listing(f"{config.checkpoint_path}/448") == CHECKPOINT_FILES
        (message,) = [m for m in caplog.messages if "could not be saved" in m]
        assert "No space left" in message
        assert "320" in message
        undisturbed = start(make_config(output_path=None, checkpoint_path=None))
        assert same(sae, undisturbed.run())

    def test_the_newest_are_kept(self, start, make_config):
        config = make_config(
            n_checkpoints=7, keep_last_n_checkpoints=2, save_final_checkpoint=True
        )
        start(config).run()
        assert listing(config.checkpoint_path) == {"448", "512", "final_512"}

    @pytest.mark.parametrize("where", ["save_inference_model", "to_dict"])
    def test_final_sae_is_all_there_or_not_at_all(
        self, start, make_config, monkeypatch, tmp_path, where
    ):
        config = make_config()
        runner = start(config)
        owner = runner.sae if "save" in where else runner.cfg
        monkeypatch.setattr(owner, where, fail)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        with pytest.raises(OSError, match="disk is full"):
            runner.run()
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

    def test_an_sae_that_cannot_be_saved_is_saved_elsewhere(
        self, start, make_config, monkeypatch
    ):
        config = make_config()
        runner, write = start(config), runner_module.complete_or_absent

        def write_elsewhere(path):
            return fail() if path == Path(config.output_path) else write(path)

        monkeypatch.setattr(runner_module, "complete_or_absent", write_elsewhere)
        with pytest.raises(OSError, match=r"disk is full.*is saved at") as info:
            runner.run()
        folder = str(info.value).split("is saved at ")[1].rstrip(".")
        assert Path(folder).parent == Path(config.checkpoint_path)
        runner.save_final_sae(runner.sae, config.output_path + "-again")
        again = SAE.load_from_disk(config.output_path + "-again")
        assert same(SAE.load_from_disk(folder), again)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_waits_for_the_final_save(
        self, start, make_config, monkeypatch, number
    ):
        def interrupted(*_args):
            raise KeyboardInterrupt

        signal.signal(number, interrupted)
        config = make_config()
        runner = start(config)
        save = runner.sae.save_inference_model

        def slow(folder):
            signal.raise_signal(number)
            return save(folder)

        monkeypatch.setattr(runner.sae, "save_inference_model", slow)
        with pytest.raises(KeyboardInterrupt):
            runner.run()
        SAE.load_from_disk(config.output_path)

    def test_final_sae_has_its_config_and_its_runs(self, start, make_config):
        config = make_config(
            layers=[1, 0], seqpos_slice=(1, None), micro_batch_size_tokens=16
        )
        start(config).run()
        assert listing(config.output_path) == {
            "cfg.json",
            "runner_cfg.json",
            "sae_weights.safetensors",
            "sparsity.safetensors",
        }
        saved = json.loads(Path(config.output_path, "runner_cfg.json").read_text())
        assert MultiLayerConfig.from_dict(saved) == config
        again = json.dumps(MultiLayerConfig.from_dict(saved).to_dict())
        assert json.loads(again) == saved
        metadata = SAE.load_from_disk(config.output_path).cfg.metadata
        assert metadata.hook_names == RESID_POST[::-1]
        assert 0 < metadata.l0 <= 4

    def test_without_paths_nothing_is_written(
        self, start, make_config, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        config = make_config(
            output_path=None,
            checkpoint_path=None,
            n_checkpoints=3,
            save_final_checkpoint=True,
        )
        start(config).run()
        assert listing(tmp_path) == set()


class TestResuming:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"sae": tiny_sae_config(k=8)}, "'k': 8.*it has.*'k': 4"),
            ({"layers": [0]}, "hook_names.*it has"),
            (
                {"hook_name": "blocks.{layer}.hook_resid_pre"},
                "hook_names.*hook_resid_pre",
            ),
            (
                {"sae": tiny_sae_config(normalize_activations="none")},
                "'normalize_activations': 'none'",
            ),
        ],
    )
    def test_the_checkpoint_of_another_run_is_an_error(
        self, start, make_config, tmp_path, changes, message
    ):
        first = make_config(n_checkpoints=1)
        start(first).run()
        (folder,) = Path(first.checkpoint_path).iterdir()
        config = make_config(
            **changes,
            output_path=str(tmp_path / "other"),
            resume_from_checkpoint=str(folder),
        )
        with pytest.raises(ValueError, match=message):
            start(config)

    @pytest.mark.parametrize("prefetch", [0, 3])
    @pytest.mark.parametrize(
        ("sae_config", "changes"),
        [
            (
                tiny_sae_config(dead_after_tokens=100, k=1),
                {"exclude_special_tokens": [3]},
            ),
            (
                StandardTrainingSAEConfig(
                    d_in=D_MODEL, d_sae=32, normalize_activations="covariance_whitening"
                ),
                {"standardize_stock_inputs": False, "n_batches_for_norm_estimate": 2},
            ),
            (
                BatchTopKTrainingSAEConfig(d_in=D_MODEL, d_sae=32, k=4),
                {"dtype": "bfloat16"},
            ),
            (JumpReLUTrainingSAEConfig(d_in=D_MODEL, d_sae=32), {"lr_decay_steps": 20}),
        ],
        ids=["multilayer", "standard", "batchtopk", "jumprelu"],
    )
    def test_resumed_weights_equal_those_of_an_uninterrupted_run(
        self,
        start,
        make_config,
        tmp_path,
        steps,
        text_dataset,
        sae_config,
        changes,
        prefetch,
    ):
        """Also in the next epochs, and with prompts taken out for evaluations."""
        settings = {
            "sae": sae_config,
            "training_tokens": 3072,
            "lr": 1e-2,
            "prefetch_llm_batches": prefetch,
            **changes,
        }
        data = text_dataset.to_iterable_dataset()
        whole = make_config(**settings, n_checkpoints=2)
        unbroken = start(whole, override_dataset=data).run()
        names = listing(whole.checkpoint_path)
        assert len(names) == 2
        for name in names:
            steps.n = 0
            again = start(
                make_config(
                    **settings,
                    resume_from_checkpoint=f"{whole.checkpoint_path}/{name}",
                    output_path=None,
                ),
                override_dataset=data,
            ).run()
            assert steps.n == (3072 - int(name)) // 64
            assert same(again, unbroken)
            assert again.cfg.metadata.l0 == unbroken.cfg.metadata.l0

    @pytest.mark.parametrize("prefetch", [0, 1, 4])
    def test_evaluations_do_not_change_where_a_run_ends(
        self, start, make_config, monkeypatch, prefetch
    ):
        FakeWandb(monkeypatch)
        settings = {
            "training_tokens": 1024,
            "n_eval_batches": 2,
            "n_checkpoints": 3,
            "output_path": None,
            "logger": LoggingConfig(wandb_log_frequency=5, eval_every_n_wandb_logs=1),
        }
        whole = make_config(**settings)
        unbroken = start(whole).run()
        names = listing(whole.checkpoint_path)
        assert str(5 * 64) in names  # saved right after an evaluation
        for name in names:
            config = make_config(
                **settings,
                prefetch_llm_batches=prefetch,
                resume_from_checkpoint=f"{whole.checkpoint_path}/{name}",
            )
            assert same(start(config).run(), unbroken)

    def test_other_settings_are_reported(self, start, make_config, caplog):
        first = make_config(n_checkpoints=1, output_path=None)
        start(first).run()
        (folder,) = Path(first.checkpoint_path).iterdir()
        again = make_config(
            resume_from_checkpoint=str(folder), lr=1e-3, output_path=None
        )
        start(again).run()
        (message,) = [m for m in caplog.messages if "other settings" in m]
        names = [line.split(": ")[0] for line in message.splitlines()[1:]]
        assert names == ["  `lr`", "  `lr_end`"]

    @pytest.mark.parametrize("is_file", [True, False])
    def test_other_inputs_of_the_same_names_are_reported(
        self, start, make_config, model, token_dataset, tmp_path, caplog, is_file
    ):
        def inputs(data):
            if not is_file:
                return {"override_dataset": data}
            data.to_parquet(tmp_path / "text.parquet")
            return {"override_dataset": None}

        settings = {"dataset_path": str(tmp_path / "text.parquet"), "output_path": None}
        first = make_config(**settings, n_checkpoints=1)
        start(first, **inputs(token_dataset)).run()
        (folder,) = Path(first.checkpoint_path).iterdir()
        with torch.no_grad():
            model.W_U[0, 0] += 1
        again = make_config(**settings, resume_from_checkpoint=str(folder))
        start(again, **inputs(token_dataset.select(range(1, 64)))).run()
        (message,) = [m for m in caplog.messages if "other settings" in m]
        names = [line.split(": ")[0] for line in message.splitlines()[1:]]
        assert names == ["  `weights_hash`", "  `dataset_hash`"]

    def test_settings_that_may_change_take_effect(self, start, make_config):
        first = make_config(n_checkpoints=1, output_path=None)
        start(first).run()
        (folder,) = Path(first.checkpoint_path).iterdir()
        changes = {"lr": 1e-9, "adam_beta1": 0.5, "adam_eps": 1e-3}
        config = make_config(
            resume_from_checkpoint=str(folder),
            lr_scheduler_name="cosineannealing",
            output_path=None,
            **changes,
        )
        runner = start(config)
        trainer = runner._make_trainer(iter([]))
        runner._resume(trainer, folder)
        (group,) = trainer.optimizer.param_groups
        assert group["betas"] == (0.5, 0.999)
        assert group["eps"] == 1e-3
        assert 1e-10 < group["lr"] < 1e-9  # 5 of 8 steps on

    def test_settings_that_would_have_no_effect_are_an_error(self, start, make_config):
        first = make_config(n_checkpoints=1, output_path=None)
        start(first).run()
        (folder,) = Path(first.checkpoint_path).iterdir()
        with pytest.raises(ValueError, match=r"`seed`: \d+ in the folder, 7 here"):
            start(make_config(resume_from_checkpoint=str(folder), seed=7))

    def test_other_weights_and_another_tokenizer_are_reported(
        self, start, make_config, model, caplog
    ):
        first = make_config(n_checkpoints=1, output_path=None)
        start(first).run()
        (folder,) = Path(first.checkpoint_path).iterdir()
        model.blocks[0].mlp.b_out.data += 1.0
        model.tokenizer = copy.deepcopy(model.tokenizer)
        model.tokenizer.add_tokens(["new"])
        start(make_config(resume_from_checkpoint=str(folder), output_path=None)).run()
        (message,) = [m for m in caplog.messages if "or inputs" in m]
        names = [line.split(": ")[0] for line in message.splitlines()[1:]]
        assert names == ["  `weights_hash`", "  `tokenizer_hash`"]

    def test_a_smaller_buffer_than_the_checkpoints_is_an_error(
        self, start, make_config
    ):
        settings = {"training_tokens": 2048, "output_path": None}
        first = make_config(**settings, n_checkpoints=1, n_batches_in_buffer=60)
        start(first).run()
        (folder,) = Path(first.checkpoint_path).iterdir()
        config = make_config(**settings, resume_from_checkpoint=str(folder))
        with pytest.raises(ValueError, match=r"must hold the \d+ tokens"):
            start(config).run()

    @pytest.mark.parametrize(
        "name",
        [
            "activations_store_state.safetensors",
            "sae_weights.safetensors",
            "trainer_state.safetensors",
            "trainer_state.json",
            "record.json",
            "cfg.json",
        ],
    )
    def test_a_damaged_file_is_an_error_that_names_it(self, start, make_config, name):
        first = make_config(n_checkpoints=1, output_path=None)
        start(first).run()
        (folder,) = Path(first.checkpoint_path).iterdir()
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        config = make_config(resume_from_checkpoint=str(folder), output_path=None)
        with pytest.raises(ValueError, match=f"{name} must be .* use another"):
            start(config).run()

    @pytest.mark.parametrize("where", ["model", "step"])
    def test_a_resumed_run_repeats_the_failed_batch(
        self, start, make_config, model, steps, where
    ):
        """Neither previous steps nor the position in the data are lost."""
        settings = {"n_batches_in_buffer": 1, "output_path": None}
        config = make_config(**settings)
        runner = start(config)
        passes = itertools.count()

        def spoil(module, args, output):
            return output * (float("nan") if next(passes) == 5 else 1.0)

        def fail():
            raise FloatingPointError("The loss must be finite")

        if where == "model":
            model.blocks[0].hook_resid_post.register_forward_hook(spoil)
        else:
            steps.before[5] = fail
        with pytest.raises((NonFiniteActivationError, FloatingPointError)):
            runner.run()
        (name,) = listing(config.checkpoint_path)
        assert name == str(64 * steps.n)
        folder = f"{config.checkpoint_path}/{name}"
        resumed = start(make_config(**settings, resume_from_checkpoint=folder)).run()
        assert same(resumed, start(make_config(**settings)).run())

    def test_a_finished_run_is_not_trained_again(
        self, start, make_config, tmp_path, steps
    ):
        first = make_config(save_final_checkpoint=True)
        sae = start(first).run()
        steps.n = 0
        config = make_config(
            resume_from_checkpoint=f"{first.checkpoint_path}/final_512",
            output_path=str(tmp_path / "again"),
        )
        assert same(start(config).run(), sae)
        assert steps.n == 0

    def test_b_dec_is_not_initialised_again(self, start, make_config, tmp_path):
        first = make_config(training_tokens=1024, lr=1e-2)
        trained = start(first).run()
        before = trained.b_dec.detach().clone()
        same_start = {"lr": 1e-30, "output_path": None}
        pretrained = start(
            make_config(from_pretrained_path=first.output_path, **same_start)
        )
        assert same(pretrained.sae, trained)
        assert torch.equal(pretrained.run().b_dec, before)
        given = start(make_config(**same_start), override_sae=trained).run()
        assert torch.equal(given.b_dec, before)
        fresh = start(make_config(**same_start)).run()
        assert fresh.b_dec.abs().max() > 0

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    @pytest.mark.parametrize("prefetch", [False, True])
    def test_a_signal_saves_a_checkpoint_that_resumes(
        self, start, make_config, tmp_path, steps, number, prefetch
    ):
        config = make_config(prefetch_llm_batches=prefetch)
        handler = signal.getsignal(number)
        steps.before[3] = lambda: signal.raise_signal(number)
        with pytest.raises(InterruptedException):
            start(config).run()
        assert signal.getsignal(number) is handler
        assert steps.n == 4
        assert listing(config.checkpoint_path) == {"256"}
        assert not Path(config.output_path).exists()
        folder = Path(config.checkpoint_path, "256")
        assert listing(folder) == CHECKPOINT_FILES
        again = make_config(resume_from_checkpoint=str(folder))
        start(again).run()
        assert steps.n == 8
        assert listing(again.output_path)

    @pytest.mark.parametrize(
        "handler", [signal.default_int_handler, interrupt_callback]
    )
    def test_a_second_signal_stops_at_once(self, start, make_config, steps, handler):
        signal.signal(signal.SIGINT, handler)

        def twice():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

        config = make_config()
        steps.before[2] = twice
        with pytest.raises(KeyboardInterrupt):
            start(config).run()
        assert listing(config.checkpoint_path) == set()

    def test_a_signal_at_the_last_step_loses_nothing(self, start, make_config, steps):
        config = make_config()
        steps.before[7] = lambda: signal.raise_signal(signal.SIGTERM)
        with pytest.raises(InterruptedException):
            start(config).run()
        assert listing(config.checkpoint_path) == {"512"}

    def test_a_killed_process_leaves_a_checkpoint_that_resumes(
        self, start, make_config, tmp_path
    ):
        """SIGTERM from outside, as a cluster sends it."""
        script = textwrap.dedent(f"""
            import sys
            sys.path[:0] = [{str(Path(__file__).parent)!r}]
            import numpy as np
            from conftest import PAPER_DATA, tiny_model, tiny_sae_config
            from datasets import Dataset
            from sae_lens import LoggingConfig, LanguageModelSAETrainingRunner
            from transformers import AutoTokenizer
            from sae_lens_multilayer import MultiLayerConfig
            from sae_lens_multilayer.training.trainer import MultiLayerTrainer

            original = MultiLayerTrainer.step
            def step(self, batch):
                if self.n_training_steps == 2:
                    print("ready", flush=True)
                return original(self, batch)
            MultiLayerTrainer.step = step
            config = MultiLayerConfig(
                sae=tiny_sae_config(), model_name="tiny", context_size=16,
                training_tokens=10**9, train_batch_size_tokens=64,
                store_batch_size_prompts=4, n_batches_in_buffer=16,
                logger=LoggingConfig(log_to_wandb=False), prepend_bos=False,
                output_path={str(tmp_path / "out")!r}, verbose=False,
                checkpoint_path={str(tmp_path / "killed")!r},
            )
            rows = np.random.default_rng(0).integers(1, 512, (64, 16))
            LanguageModelSAETrainingRunner(
                config,
                override_dataset=Dataset.from_dict({{"input_ids": rows}}),
                override_model=tiny_model(
                    AutoTokenizer.from_pretrained(PAPER_DATA / "model")
                ),
            ).run()
        """)
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "TQDM_DISABLE": "1"},
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=300)
        finally:
            process.kill()
        assert process.returncode != 0
        assert "InterruptedException" in errors
        assert not (tmp_path / "out").exists()
        (run,) = (tmp_path / "killed").iterdir()
        (folder,) = run.iterdir()
        assert listing(folder) == CHECKPOINT_FILES
        n_trained = int(folder.name)
        config = make_config(
            resume_from_checkpoint=str(folder), training_tokens=n_trained + 128
        )
        start(config).run()
        assert listing(config.output_path)


class TestLatest:
    def test_resumes_the_newest_checkpoint_of_a_run_with_these_settings(
        self, start, make_config, tmp_path, steps
    ):
        settings = {"checkpoint_path": str(tmp_path / "runs"), "output_path": None}
        first = make_config(**settings, n_checkpoints=3)
        whole = start(first).run()
        start(make_config(**settings, n_checkpoints=1, seed=5)).run()
        leftover = Path(first.checkpoint_path) / ".partial-0123"
        leftover.mkdir()
        steps.n = 0
        runner = start(make_config(**settings, resume_from_checkpoint="latest"))
        assert runner.cfg.resume_from_checkpoint == f"{first.checkpoint_path}/448"
        assert runner.cfg.checkpoint_path == first.checkpoint_path
        assert not leftover.exists()
        assert same(runner.run(), whole)
        assert steps.n == 1

    def test_starts_a_new_run_if_there_is_none(self, start, make_config, steps, caplog):
        caplog.set_level("INFO", "sae_lens_multilayer")
        config = make_config(resume_from_checkpoint="latest", output_path=None)
        start(config).run()
        assert steps.n == 8
        assert not any("starting anew" in message for message in caplog.messages)

    def test_a_named_run_has_a_folder_of_its_own(self, start, make_config, tmp_path):
        def config(name, **changes):
            logger = LoggingConfig(log_to_wandb=False, wandb_id=name)
            path = str(tmp_path / "runs")
            return make_config(
                logger=logger, checkpoint_path=path, output_path=None, **changes
            )

        start(config("a", n_checkpoints=1)).run()
        again = start(config("a", resume_from_checkpoint="latest"))
        assert again.cfg.resume_from_checkpoint == str(tmp_path / "runs/a/320")
        other = start(config("b", resume_from_checkpoint="latest"))
        assert other.cfg.resume_from_checkpoint is None

    def test_latest_needs_a_checkpoint_path(self, make_config):
        with pytest.raises(ValueError, match="`checkpoint_path` must be given"):
            make_config(checkpoint_path=None, resume_from_checkpoint="latest")


class TestEarlyErrors:
    @pytest.fixture
    def loads(self, monkeypatch) -> list[Any]:
        """The calls that load a model; each is an error."""
        calls: list[Any] = []

        def load(*args, **kwargs):
            calls.append(args)
            raise AssertionError("A model was loaded.")

        monkeypatch.setattr(loading, "load_by_name", load)
        return calls

    def check(self, config, loads, error, match):
        with pytest.raises(error, match=match):
            LanguageModelSAETrainingRunner(
                config, override_dataset=Dataset.from_dict({"input_ids": [[1] * 16]})
            )
        assert loads == []

    def test_valid_settings_load_the_model(self, make_config, loads):
        with pytest.raises(AssertionError, match="A model was loaded"):
            LanguageModelSAETrainingRunner(paper_config(make_config))
        assert len(loads) == 1

    def test_output_path_below_a_file(self, make_config, loads, tmp_path):
        (tmp_path / "file").write_text("")
        path = str(tmp_path / "file" / "output")
        self.check(
            paper_config(make_config, output_path=path),
            loads,
            OSError,
            "`output_path` must be a path that can be written",
        )
        self.check(
            paper_config(make_config, checkpoint_path=path),
            loads,
            OSError,
            "`checkpoint_path` must be a path that can be written",
        )

    def test_output_path_without_permission(
        self, make_config, loads, tmp_path, monkeypatch
    ):
        def refuse(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)
        self.check(paper_config(make_config), loads, OSError, "Permission denied")

    def test_occupied_output_path(self, make_config, loads, tmp_path):
        occupied = tmp_path / "occupied"
        occupied.mkdir()
        (occupied / "thesis.txt").write_text("")
        config = paper_config(make_config, output_path=str(occupied))
        self.check(config, loads, FileExistsError, "new or an empty folder")
        assert listing(occupied) == {"thesis.txt"}

    @pytest.mark.parametrize(
        "setting", ["from_pretrained_path", "resume_from_checkpoint"]
    )
    def test_checkpoint_of_another_sae(
        self, start, make_config, model, loads, tmp_path, setting, monkeypatch
    ):
        shape = as_model(model).shape
        monkeypatch.setattr(loading, "shape_by_name", lambda *_: shape)
        first = make_config(save_final_checkpoint=True)
        start(first).run()
        folder = f"{first.checkpoint_path}/final_512"

        def check(error, match, **changes):
            settings = {
                "sae": tiny_sae_config(),
                setting: folder,
                "output_path": str(tmp_path / "other"),
            }
            config = make_config(**{**settings, **changes})
            self.check(config, loads, error, match)

        check(
            ValueError,
            r"'d_sae': 128.*it has .*'d_sae': 64",
            sae=tiny_sae_config(d_sae=128),
        )
        check(
            ValueError,
            r"'architecture': 'standard'.*it has .*'architecture': 'multilayer'",
            sae=StandardTrainingSAEConfig(d_in=D_MODEL, d_sae=64),
        )
        check(FileNotFoundError, r"cfg.json is not there", **{setting: str(tmp_path)})
        if setting == "resume_from_checkpoint":
            # A final SAE has no state of a trainer.
            output = {setting: first.output_path}
            check(FileNotFoundError, r"trainer_state.*is not there", **output)

    @pytest.mark.parametrize(
        ("given", "match"),
        [
            (tiny_sae_config(d_in=8), r"'d_in': 16.*it has .*'d_in': 8"),
            (tiny_sae_config(d_sae=32), r"'d_sae': 64.*it has .*'d_sae': 32"),
            (
                StandardTrainingSAEConfig(d_in=D_MODEL, d_sae=64),
                r"'multilayer'.*it has .*'standard'",
            ),
        ],
    )
    def test_given_sae_that_is_not_the_configs(self, make_config, loads, given, match):
        sae = TrainingSAE.from_dict(given.to_dict())
        with pytest.raises(ValueError, match=match):
            LanguageModelSAETrainingRunner(make_config(), override_sae=sae)
        assert loads == []

    def test_pretrained_stock_sae_that_takes_raw_vectors(self, start, make_config):
        config = make_config(sae=StandardTrainingSAEConfig(d_in=D_MODEL, d_sae=32))
        raw = TrainingSAE.from_dict(config.get_training_sae_cfg_dict())
        with pytest.raises(ValueError, match=r"'layer_norm'.*it has .*'none'"):
            start(config, override_sae=raw)


def paper_config(make_config, **changes) -> MultiLayerConfig:
    settings = {
        "sae": tiny_sae_config(d_in=64),
        "model_name": str(PAPER_DATA / "model"),
        "model_class_name": "AutoModelForCausalLM",
        "hook_name": "gpt_neox.layers.{layer}",
    }
    return make_config(**{**settings, **changes})


class FakeWandb:
    """Records what is sent to Weights & Biases."""

    def __init__(self, monkeypatch) -> None:
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.calls: list[str] = []
        self.files: list[tuple[str, str]] = []
        fake = self

        class Artifact:
            def __init__(self, name, type, metadata) -> None:
                fake.calls.append("Artifact")
                self.name, self.type = name, type

            def add_file(self, path) -> None:
                assert Path(path).is_file()
                fake.files.append((self.type, Path(path).name))

        def record(name):
            return lambda *args, **kwargs: fake.calls.append(name)

        def log(values, step) -> None:
            fake.calls.append("log")
            fake.logged.append((step, dict(values)))

        monkeypatch.setattr(wandb, "Artifact", Artifact)
        monkeypatch.setattr(wandb, "log", log)
        for name in ("init", "finish", "log_artifact", "Histogram"):
            monkeypatch.setattr(wandb, name, record(name))


class TestWandb:
    @pytest.mark.parametrize("sae", ["multilayer", "standard"])
    def test_a_run_with_the_real_wandb_saves_and_evaluates(
        self, start, make_config, tmp_path, monkeypatch, sae
    ):
        """No fake: names of artifacts and ranges of histograms are checked by it."""
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_SILENT", "true")
        monkeypatch.chdir(tmp_path)
        logger = LoggingConfig(wandb_log_frequency=2, eval_every_n_wandb_logs=2)
        stock = StandardTrainingSAEConfig(d_in=D_MODEL, d_sae=32)
        config = make_config(
            sae=stock if sae == "standard" else None,
            logger=logger,
            n_checkpoints=1,
            n_eval_batches=1,
        )
        start(config).run()
        assert (Path(config.output_path) / "sae_weights.safetensors").is_file()
        assert len(list(Path(config.checkpoint_path).iterdir())) == 1

    def test_a_failing_upload_leaves_what_was_saved(
        self, start, make_config, monkeypatch
    ):
        FakeWandb(monkeypatch)

        def fail(*args, **kwargs):
            raise RuntimeError("upload failed")

        monkeypatch.setattr(wandb, "log_artifact", fail)
        config = make_config(logger=LoggingConfig())
        with pytest.raises(RuntimeError, match="upload failed"):
            start(config).run()
        assert (Path(config.output_path) / "sae_weights.safetensors").is_file()

    def test_layers_are_logged_at_the_hosts_cadence(
        self, start, make_config, monkeypatch
    ):
        fake = FakeWandb(monkeypatch)
        logger = LoggingConfig(
            log_to_wandb=True, wandb_log_frequency=3, eval_every_n_wandb_logs=2
        )
        config = make_config(
            logger=logger, n_checkpoints=1, feature_sampling_window=4, layers=[1, 0]
        )
        start(config).run()
        train = {
            step: values for step, values in fake.logged if "layer_0/fvu" in values
        }
        # The host logs when (steps before + 1) is a multiple of the frequency.
        assert sorted(train) == [2, 5]
        for values in train.values():
            for layer, name in itertools.product((0, 1), ("fvu", "mse", "l0", "l1")):
                assert values[f"layer_{layer}/{name}"] > 0
            assert values["metrics/fvu"] == pytest.approx(
                (values["layer_0/fvu"] + values["layer_1/fvu"]) / 2
            )
            assert values["layer_0/l0"] <= 4
            assert {"losses/overall_loss", "losses/mse_loss"} <= values.keys()
            assert values["details/current_learning_rate"] == pytest.approx(1e-4)
        assert train[5]["details/n_training_samples"] == 6 * 64
        assert any("sparsity/below_1e-5" in values for _, values in fake.logged)
        assert fake.calls[0] == "init"
        assert fake.calls[-1] == "finish"
        assert fake.files.count(("model", "sae_weights.safetensors")) == 2
        assert fake.files.count(("log_feature_sparsity", "sparsity.safetensors")) == 2

    @pytest.mark.parametrize("prefetch", [False, True])
    def test_layers_are_spliced_at_the_hosts_cadence(
        self, start, make_config, monkeypatch, prefetch
    ):
        fake = FakeWandb(monkeypatch)
        logger = LoggingConfig(
            log_to_wandb=True, wandb_log_frequency=3, eval_every_n_wandb_logs=2
        )
        config = make_config(
            logger=logger, n_eval_batches=2, prefetch_llm_batches=prefetch
        )
        start(config).run()
        evals = {s: values for s, values in fake.logged if "layer_0/kl_div" in values}
        assert list(evals) == [5]
        for layer in ("layer_0", "layer_1", "metrics"):
            assert evals[5][f"{layer}/kl_div"] > 0
            assert f"{layer}/delta_ce" in evals[5]
            assert f"{layer}/fvu" not in evals[5]

    def test_the_evaluator_is_evaluate_on_the_next_tokens(
        self, model, make_config, token_dataset
    ):
        config = make_config(exclude_special_tokens=[3, 4])
        store, same = (
            MultiLayerActivationsStore.from_config(model, config, token_dataset)
            for _ in range(2)
        )
        sae = TrainingSAE.from_dict(config.sae.to_dict())
        sae.cfg.metadata.hook_names = store.hook_names
        found = MultiLayerEvaluator(model, store, n_batches=2, batch_size_prompts=3)(
            sae, store, ActivationScaler()
        )
        tokens = same.get_batch_tokens(6)
        expected = evaluate(sae, model, tokens, exclude_tokens=[3, 4]).to_log_dict()
        for name in ("layer_0/delta_ce", "layer_1/kl_div", "layer_1/ce_loss_score"):
            assert found[name] == pytest.approx(expected[name], abs=1e-6)

    def test_stock_sae_logs_the_same_keys(self, start, make_config, monkeypatch):
        fake = FakeWandb(monkeypatch)
        config = make_config(
            sae=StandardTrainingSAEConfig(d_in=D_MODEL, d_sae=32),
            logger=LoggingConfig(log_to_wandb=True, wandb_log_frequency=4),
        )
        start(config).run()
        train = {
            step: values for step, values in fake.logged if "layer_0/fvu" in values
        }
        assert sorted(train) == [3, 7]
        for values in train.values():
            for layer, name in itertools.product((0, 1), ("fvu", "mse", "l0", "l1")):
                assert values[f"layer_{layer}/{name}"] > 0
            assert values["details/l1_coefficient"] == 1.0

    def test_wandb_is_never_called_when_it_is_off(
        self, start, make_config, monkeypatch
    ):
        fake = FakeWandb(monkeypatch)
        config = make_config(
            n_checkpoints=2, save_final_checkpoint=True, feature_sampling_window=2
        )
        start(config).run()
        assert fake.calls == []
