"""Training from a cache.

Reference: the run from the model, bit for bit, where neither mixes; and the run from a
cache that is not interrupted.
"""

import os
import random
import shutil
import time

import pytest
import torch
import wandb
from conftest import D_MODEL, N_LAYERS, count_calls, tiny_model
from sae_lens import (
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    StandardTrainingSAEConfig,
)
from saes import random_lens
from test_kills import N_KILLS, Runs, saved

from sae_lens_multilayer import cli
from sae_lens_multilayer.models import loading
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.training import evaluator as evaluator_module

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:sae_lens")


@pytest.fixture
def train(monkeypatch):
    """Train without a dataset; loading a model is an error."""

    def no_model(cfg):
        raise AssertionError("a run from a cache needs no model")

    monkeypatch.setattr(loading, "load_by_name", no_model)

    def train(cfg, **overrides):
        return LanguageModelSAETrainingRunner(cfg, **overrides).run()

    return train


@pytest.fixture
def wandb_logs(monkeypatch) -> list[dict]:
    logs: list[dict] = []
    for name in ("init", "finish"):
        monkeypatch.setattr(wandb, name, lambda **_: None)
    monkeypatch.setattr(wandb, "log", lambda values, step: logs.append(values))
    return logs


def same(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


RUNS = {
    "all layers": {},
    "one layer": {"layers": [1]},
    "other order": {"layers": [1, 0]},
    "stock": {"sae": StandardTrainingSAEConfig(d_in=D_MODEL, d_sae=32)},
    "bfloat16": {"dtype": "bfloat16"},
    "two epochs": {"training_tokens": 1500},
}


@pytest.mark.parametrize("name", RUNS)
def test_ends_as_a_run_from_the_model(
    cache_config, harvest, train, model, token_dataset, name
):
    plain = {"activations_mixing_fraction": 0.0, "output_path": None}
    data = token_dataset.select(range(48))  # 768 tokens
    cfg = cache_config(**plain, **RUNS[name])
    dtype = RUNS[name].get("dtype", "float32")
    harvest(cache_config(training_tokens=768, dtype=dtype), data)
    live = train(cfg, override_model=model, override_dataset=data)
    cached = train(cache_config(**plain, **RUNS[name], use_cached_activations=True))
    assert same(cached, live)
    assert cached.cfg.metadata.hook_names == live.cfg.metadata.hook_names


@pytest.mark.parametrize("alignment", ["reference", "tuned_lens"])
def test_applies_a_lens_to_the_raw_vectors_of_the_cache(
    cache_config, harvest, train, model, token_dataset, alignment
):
    settings = {
        "activations_mixing_fraction": 0.0,
        "output_path": None,
        "lens": random_lens(alignment=alignment),
        "lens_alignment": alignment,
    }
    harvest(cache_config())
    live = train(
        cache_config(**settings), override_model=model, override_dataset=token_dataset
    )
    cached = train(cache_config(**settings, use_cached_activations=True))
    assert same(cached, live)
    without = {**settings, "lens": None, "lens_alignment": "tuned_lens"}
    other = train(cache_config(**without, use_cached_activations=True))
    assert not torch.equal(other.W_dec, cached.W_dec)


def test_a_lens_of_a_model_of_another_depth_is_an_error(cache_config, harvest, train):
    harvest(cache_config())
    lens = random_lens(n_layers=N_LAYERS + 1)
    cfg = cache_config(
        use_cached_activations=True,
        lens=lens,
        lens_alignment="reference",
        hook_names=lens.hook_names,
    )
    with pytest.raises(ValueError, match=r"for 3 blocks of width 16; 'tiny' has 2"):
        train(cfg)


def test_a_cache_that_is_smaller_than_the_run_is_warned_of(
    cache_config, harvest, train, caplog
):
    harvest(cache_config())  # 1,024 tokens, the whole dataset
    settings = {"use_cached_activations": True, "output_path": None}
    train(cache_config(**settings, training_tokens=1024))
    assert "epochs" not in caplog.text
    cfg = cache_config(**settings, training_tokens=1536)
    train(cfg)
    assert "1.50 epochs" in caplog.text


@pytest.mark.parametrize("prefetch", [0, 2])
def test_resumes_exactly(cache_config, harvest, train, prefetch):
    harvest(cache_config())
    settings = {
        "use_cached_activations": True,
        "training_tokens": 3072,  # three epochs
        "lr": 1e-2,
        "prefetch_llm_batches": prefetch,
        "output_path": None,
    }
    cfg = cache_config(**settings, n_checkpoints=3)
    whole = train(cfg)
    names = os.listdir(cfg.checkpoint_path)
    assert len(names) == 3
    for name in names:
        checkpoint = f"{cfg.checkpoint_path}/{name}"
        resumed = cache_config(**settings, resume_from_checkpoint=checkpoint)
        assert same(train(resumed), whole)


def test_resumes_from_a_cache_that_was_moved(
    cache_config, harvest, train, tmp_path, caplog
):
    harvest(cache_config())
    settings = {"use_cached_activations": True, "output_path": None}
    cfg = cache_config(**settings, n_checkpoints=1)
    whole = train(cfg)
    (tmp_path / "cache").rename(tmp_path / "moved")
    settings["cached_activations_path"] = str(tmp_path / "moved")
    (name,) = os.listdir(cfg.checkpoint_path)
    checkpoint = f"{cfg.checkpoint_path}/{name}"
    assert same(
        train(cache_config(**settings, resume_from_checkpoint=checkpoint)), whole
    )
    assert "other settings" not in caplog.text


def test_evaluates_on_text_that_is_not_trained_on(
    cache_config, harvest, model, token_dataset, monkeypatch, wandb_logs
):
    log = LoggingConfig(
        log_to_wandb=True, wandb_log_frequency=1, eval_every_n_wandb_logs=2
    )
    settings = {"training_tokens": 512, "n_eval_batches": 2, "output_path": None}
    harvest(cache_config(**settings))
    monkeypatch.setattr(loading, "load_by_name", lambda *_: model)
    monkeypatch.setattr(loading, "shape_by_name", lambda *_: as_model(model).shape)
    calls = count_calls(monkeypatch, evaluator_module, "evaluate")
    cfg = cache_config(**settings, use_cached_activations=True, logger=log)
    LanguageModelSAETrainingRunner(cfg).run()
    assert len(calls) == 4
    rows = token_dataset.with_format("torch")["input_ids"][:]
    for args, _ in calls:
        assert torch.equal(args[2].ids, torch.as_tensor(rows)[32:40])
    assert any("metrics/delta_ce" in values for values in wandb_logs)


def test_evaluates_with_the_model_of_the_cache_only(
    cache_config, harvest, train, tokenizer
):
    harvest(cache_config())
    cfg = cache_config(use_cached_activations=True)
    with pytest.raises(ValueError, match="`weights_hash`"):
        train(cfg, override_model=tiny_model(tokenizer, seed=1))


def test_a_run_too_short_for_an_evaluation_needs_no_model(
    cache_config, harvest, train, wandb_logs
):
    harvest(cache_config())
    log = LoggingConfig(
        log_to_wandb=True, wandb_log_frequency=1, eval_every_n_wandb_logs=16
    )
    settings = {"use_cached_activations": True, "training_tokens": 15 * 64}
    train(cache_config(**settings, logger=log, output_path=None))
    assert wandb_logs


def test_settings_that_do_not_match_the_cache_fail_before_training(
    cache_config, harvest, train
):
    with pytest.raises(FileNotFoundError, match=r"no record\.json"):
        train(cache_config(use_cached_activations=True))
    harvest(cache_config(layers=[0]))
    with pytest.raises(
        ValueError, match=r"hooks \['blocks.1.hook_resid_post'\] are missing"
    ):
        train(cache_config(use_cached_activations=True))


def test_from_the_command_line(offline, cache_config, tmp_path, capsys):
    settings = (
        "{model_name: tiny, dataset_path: text.parquet, context_size: 16, "
        "training_tokens: 200, train_batch_size_tokens: 50, prepend_bos: false, "
        "store_batch_size_prompts: 2, checkpoint_path: null, "
        "sae: {d_in: 16, d_sae: 64, k: 4}, logger: {log_to_wandb: false}}"
    )
    (tmp_path / "run.yaml").write_text(settings)
    cli.main(["cache", "run.yaml", "--output", "vectors"])
    assert "Written: vectors, 224 tokens" in capsys.readouterr().out
    path = ["--cached_activations_path", "vectors", "--output_path", "trained"]
    options = ["--config", "run.yaml", "--use_cached_activations", "true", *path]
    cli.main(["train", *options])
    assert (tmp_path / "trained" / "sae_weights.safetensors").exists()
    with pytest.raises(SystemExit, match=r"cache: .*No such file.*run\.json"):
        cli.main(["cache", "run.json"])
    (tmp_path / "run.yaml").write_text(settings.replace("200", "300"))
    with pytest.raises(SystemExit, match=r"(?s)other settings.*`training_tokens`: 200"):
        cli.main(["cache", "run.yaml", "--output", "vectors"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_kills_at_any_moment_change_neither_a_cache_nor_a_run(tmp_path):
    """Both the harvest and the training on it are killed."""
    runs = Runs()
    try:
        for what in ("harvest", "cached"):
            runs.start(tmp_path / "whole", 0, what)
            assert runs.wait() == 0
        shards = sorted((tmp_path / "whole" / "cache").glob("shard-*/*"))
        assert len(shards) > 10
        killed = tmp_path / "killed"

        def check() -> None:
            for path in shards:
                copy = killed / path.relative_to(tmp_path / "whole")
                assert copy.read_bytes() == path.read_bytes()
            if (killed / "output").exists():
                assert saved(killed) == saved(tmp_path / "whole")

        choose = random.Random(0)
        made = {"harvest": ["cache"], "cached": ["output", "checkpoints"]}
        for what, folders in made.items():
            n_kills = 0
            while n_kills < N_KILLS // 2:
                process = runs.start(killed, 0.01, what)
                time.sleep(choose.uniform(0, 0.4))
                was_killed = runs.kill(process)
                n_kills += was_killed
                if not was_killed or (killed / "output").exists():
                    check()
                    for folder in folders:
                        shutil.rmtree(killed / folder)
            runs.start(killed, 0, what)
            assert runs.wait() == 0
            check()
        assert (killed / "output").exists()
    finally:
        runs.process.kill()
        runs.process.communicate()
