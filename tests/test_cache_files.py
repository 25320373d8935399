"""The files of a cache: how they are written, and errors if they are invalid.

Reference: a harvest that was not disturbed, byte for byte.
"""

import errno
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import D_VOCAB, N_LAYERS, PAPER_DATA, count_calls, tiny_model
from conftest import tiny_sae_config as sae_config
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from sae_lens_multilayer import ActivationCache, MultiLayerActivationsStore
from sae_lens_multilayer.files import locked
from sae_lens_multilayer.record import model_fingerprints
from sae_lens_multilayer.store import harvest as harvest_module
from sae_lens_multilayer.store import shards as shards_module
from sae_lens_multilayer.store.cache import vector_settings
from sae_lens_multilayer.store.source import CacheSource, ModelSource

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:sae_lens")

RESID_POST = [f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS)]


def files_of(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def cached_store(cache, cfg) -> MultiLayerActivationsStore:
    source = CacheSource.from_config(cache, cfg.resolve_hook_names(N_LAYERS), cfg)
    return MultiLayerActivationsStore.from_source(source, cfg)


def check(cache, cfg, model=None) -> None:
    hashes = None if model is None else model_fingerprints(model)
    cache.check(vector_settings(cfg), cfg.resolve_hook_names(N_LAYERS), hashes)


def drain(store) -> None:
    """More than an epoch."""
    for _ in range(20):
        next(store)


def shard_of(cache: ActivationCache, index: int) -> Path:
    return cache.shards[index].folder / "activations.safetensors"


class TestHarvest:
    @pytest.mark.parametrize("kind", ["tokens", "documents", "short"])
    def test_that_is_interrupted_anywhere_gives_the_same_cache(
        self, cache_config, harvest, monkeypatch, tmp_path, kind, request
    ):
        """Before each folder that is written, and before the last manifest."""
        name = "text_dataset" if kind == "documents" else "token_dataset"
        data = request.getfixturevalue(name)
        data = data.select(range(30)) if kind == "short" else data
        whole = harvest(cache_config(), data)
        n_folders = 1 + len(whole.shards) + 1
        for n_written in range(n_folders + 1):
            path = tmp_path / f"interrupted-{n_written}"
            cfg = cache_config(cached_activations_path=str(path))
            with monkeypatch.context() as patch:
                self.stop_after(n_written, patch)
                with pytest.raises(KeyboardInterrupt):
                    harvest(cfg, data)
            if n_written:
                with pytest.raises(ValueError, match=r"must be complete.*resume"):
                    ActivationCache(path)
                (path / ".partial-of-a-killed-one").mkdir()
            harvest(cfg, data)
            assert files_of(path) == files_of(whole.path)
            assert {p.name[0] for p in path.iterdir()} == {".", "r", "s", "e"}

    @staticmethod
    def stop_after(n_written, patch) -> None:
        """Let a harvest end as a killed one does, but with an error."""
        left = iter(range(n_written))
        for name in ("complete_or_absent", "write_whole"):
            original = getattr(harvest_module, name)

            def stopping(*args, original=original):
                if next(left, None) is None:
                    raise KeyboardInterrupt
                return original(*args)

            patch.setattr(harvest_module, name, stopping)

    def test_resumes_without_running_the_model_on_finished_shards(
        self, cache_config, cache_runner, monkeypatch, caplog
    ):
        runner = cache_runner(cache_config())
        caplog.set_level(logging.INFO)
        calls = count_calls(monkeypatch, ModelSource, "vectors")
        with monkeypatch.context() as patch:
            patch.setattr(shards_module.ShardInMemory, "save", self.fail_at(3))
            with pytest.raises(OSError, match="No space"):
                runner.run()
        assert len(calls) == 8
        cache_runner(cache_config()).run()
        assert len(calls) == 8 + 16 - 6
        assert "Resuming after 3 shards, 384 tokens." in caplog.messages

    @staticmethod
    def fail_at(n, error=None):
        original, saves = shards_module.ShardInMemory.save, []

        def save(self, folder):
            saves.append(folder)
            original(self, folder)
            if len(saves) == n + 1:
                raise error or OSError(errno.ENOSPC, "No space left on device")

        return save

    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.ENOSPC, "No space left on device"),
            SafetensorError("I/O error: No space left on device (os error 28)"),
        ],
    )
    def test_that_fills_the_disk_keeps_complete_shards(
        self, cache_config, harvest, monkeypatch, tmp_path, error
    ):
        with monkeypatch.context() as patch:
            patch.setattr(shards_module.ShardInMemory, "save", self.fail_at(2, error))
            with pytest.raises(OSError, match=r"shard-000002 could not.*No space left"):
                harvest(cache_config())
        names = sorted(path.name for path in (tmp_path / "cache").iterdir())
        assert names == [".lock", "record.json", "shard-000000", "shard-000001"]
        harvest(cache_config()).verify()

    @pytest.mark.parametrize("n_saved", [0, 2])
    def test_can_be_run_again_after_an_error(
        self, cache_config, cache_runner, harvest, monkeypatch, tmp_path, n_saved
    ):
        runner = cache_runner(cache_config())
        with monkeypatch.context() as patch:
            patch.setattr(shards_module.ShardInMemory, "save", self.fail_at(n_saved))
            with pytest.raises(OSError, match="No space"):
                runner.run()
        runner.run()
        path = tmp_path / "undisturbed"
        harvest(cache_config(cached_activations_path=str(path)))
        assert files_of(runner.path) == files_of(path)

    def test_without_disk_space_does_not_start(
        self, cache_config, cache_runner, monkeypatch, tmp_path, caplog
    ):
        caplog.set_level(logging.INFO)
        runner = cache_runner(cache_config())
        usage = shutil.disk_usage(tmp_path)._replace(free=runner.n_bytes - 1)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        needed = rf"needs {runner.n_bytes:,} bytes of disk, and {usage.free:,} are free"
        with pytest.raises(OSError, match=needed):
            runner.run()
        assert not (tmp_path / "cache").exists()
        assert (
            "1,000 tokens x 2 hooks x 16, float32: 128 bytes per token" in caplog.text
        )

    @pytest.mark.parametrize("positions", [(None,), (0, 8)], ids=str)
    def test_has_the_size_that_was_announced(
        self, cache_config, cache_runner, positions
    ):
        changes = {"seqpos_slice": positions, "training_tokens": 500}
        runner = cache_runner(cache_config(**changes))
        runner.run()
        files = files_of(runner.path)
        written = sum(
            len(data) for name, data in files.items() if "activations." in name
        )
        headers = 1000 * len(files)
        assert runner.n_bytes * 0.9 < written < runner.n_bytes + headers

    def test_of_a_finite_dataset_has_one_epoch(
        self, cache_config, harvest, token_dataset, caplog, monkeypatch
    ):
        cfg, data = cache_config(), token_dataset.select(range(30))
        cache = harvest(cfg, data)
        assert cache.n_tokens == 480
        assert "ended after 480 tokens" in caplog.text
        assert "on text that is trained on" in caplog.text
        calls = count_calls(monkeypatch, ModelSource, "vectors")
        assert harvest(cfg, data).n_tokens == 480
        assert not calls

    def test_of_no_token_is_an_error_and_writes_nothing(
        self, cache_config, harvest, tmp_path
    ):
        with pytest.raises(ValueError, match="excludes all of the first 64 tokens"):
            harvest(cache_config(exclude_special_tokens=list(range(D_VOCAB))))
        assert not files_of(tmp_path / "cache")
        harvest(cache_config()).verify()

    def test_keeps_the_prompts_that_follow_for_evaluation(
        self, cache_config, harvest, token_dataset
    ):
        cfg = cache_config(
            training_tokens=512, n_eval_batches=3, eval_batch_size_prompts=5
        )
        cache = harvest(cfg)
        expected = torch.as_tensor(token_dataset.with_format("torch")["input_ids"][:])
        assert torch.equal(cache.evaluation_tokens(), expected[32:47])

    def test_needs_a_path(self, cache_config, cache_runner):
        with pytest.raises(ValueError, match="`cached_activations_path` must be given"):
            cache_runner(cache_config(cached_activations_path=None))

    def test_overwrites_nothing(self, cache_config, cache_runner, tmp_path):
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "thesis.txt").write_text("words")
        with pytest.raises(FileExistsError, match="must be a new or an empty folder"):
            cache_runner(cache_config())

    @pytest.mark.parametrize("is_complete", [True, False])
    def test_another_cache_is_not_resumed(
        self, cache_config, cache_runner, harvest, monkeypatch, is_complete
    ):
        if is_complete:
            harvest(cache_config())
        else:
            monkeypatch.setattr(shards_module.ShardInMemory, "save", self.fail_at(1))
            with pytest.raises(OSError, match="No space"):
                harvest(cache_config())
        message = (
            r"(?s)other settings.*`dtype`: 'float32' in the folder, 'bfloat16'"
            r" here.*`hook_names`.*`training_tokens`: 1000 in the folder, 999 here"
        )
        with pytest.raises(ValueError, match=message):
            cache_runner(
                cache_config(dtype="bfloat16", layers=[1], training_tokens=999)
            )

    def test_resumes_with_the_same_text_and_all_shards_only(
        self, cache_config, harvest, monkeypatch, token_dataset, tmp_path
    ):
        with monkeypatch.context() as patch:
            patch.setattr(shards_module.ShardInMemory, "save", self.fail_at(3))
            with pytest.raises(OSError, match="No space"):
                harvest(cache_config())
        with pytest.raises(ValueError, match="it begins with other tokens"):
            harvest(cache_config(), token_dataset.select(range(1, 64)))
        (tmp_path / "cache" / "shard-000001").rename(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match=r"\['shard-000001'\] missing"):
            harvest(cache_config())
        (tmp_path / "elsewhere").rename(tmp_path / "cache" / "shard-000001")
        harvest(cache_config()).verify()

    def test_is_locked_for_one_process_at_a_time(
        self, cache_config, cache_runner, monkeypatch
    ):
        runner = cache_runner(cache_config())
        with monkeypatch.context() as patch:
            patch.setattr(shards_module.ShardInMemory, "save", self.fail_at(1))
            with pytest.raises(OSError, match="No space"):
                runner.run()
        with locked(runner.path), pytest.raises(OSError, match="Another process"):
            runner.run()
        runner.run().verify()


class TestFaults:
    @pytest.fixture
    def cache(self, cache_config, harvest) -> ActivationCache:
        return harvest(cache_config())

    def test_no_cache(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"'cache'.*no record\.json"):
            ActivationCache(tmp_path)

    def test_a_missing_record_is_an_error_that_names_it(
        self, cache, cache_config, cache_runner
    ):
        before = files_of(cache.path)
        record = before.pop("record.json")
        (cache.path / "record.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"no record\.json"):
            ActivationCache(cache.path)
        with pytest.raises(FileExistsError, match="nothing is overwritten"):
            cache_runner(cache_config())
        assert files_of(cache.path) == before
        (cache.path / "record.json").write_bytes(record)
        ActivationCache(cache.path).verify()

    def test_every_missing_and_truncated_shard_is_named(self, cache):
        shutil.rmtree(shard_of(cache, 1).parent)
        os.truncate(shard_of(cache, 3), 1000)
        message = r"(?s)shard-000001 is missing.*shard-000003 has 1000 bytes, not \d+"
        with pytest.raises(ValueError, match=message) as error:
            ActivationCache(cache.path)
        assert str(error.value).count("shard-") == 2

    def test_a_damaged_header_is_an_error_on_reading(self, cache, cache_config):
        with shard_of(cache, 2).open("r+b") as file:
            file.write(b"\xff" * 8)
        store = cached_store(ActivationCache(cache.path), cache_config())
        with pytest.raises(ValueError, match=r"shard-000002 is missing or damaged"):
            drain(store)
        with pytest.raises(ValueError, match=r"shard-000002 is missing or damaged"):
            cache.verify()

    @pytest.mark.parametrize("name", [*RESID_POST, "tokens", "prompt", "position"])
    def test_verify_finds_changed_and_swapped_shards(self, cache, name):
        path = shard_of(cache, 2)
        tensors = load_file(path)
        tensors[name][2] += 1
        save_file(tensors, path, {"hash": cache.shards[2].hash})
        shutil.copy(shard_of(cache, 4), shard_of(cache, 5))
        message = r"(?s)shard-000002 was changed.*shard-000005 was changed"
        with pytest.raises(ValueError, match=message) as error:
            ActivationCache(cache.path).verify()
        assert str(error.value).count("shard-") == 2

    def test_a_shard_that_goes_while_it_is_read_is_named(self, cache, cache_config):
        store = cached_store(cache, cache_config())
        next(store)
        shutil.rmtree(shard_of(cache, 6).parent)
        with pytest.raises(ValueError, match="shard-000006 is missing"):
            drain(store)

    def test_changed_prompts_for_evaluation_are_found(self, cache):
        path = cache.path / "evaluation" / "tokens.safetensors"
        save_file({"tokens": load_file(path)["tokens"] + 1}, path)
        with pytest.raises(ValueError, match=r"tokens\.safetensors was changed"):
            ActivationCache(cache.path).verify()

    @pytest.mark.parametrize("name", ["record.json", "shards.json"])
    def test_a_damaged_file_is_an_error_that_names_it(self, cache, name):
        path = cache.path / name
        path.write_text(path.read_text()[:-100])
        with pytest.raises(ValueError, match=f"{name} must be JSON"):
            ActivationCache(cache.path)


DIFFERENCES = {
    "model_name": ("other", "'tiny' in the folder, 'other' here"),
    "model_class_name": ("TransformerBridge", "'HookedTransformer' in the folder"),
    "model_from_pretrained_kwargs": ({"fold_ln": True}, "{'fold_ln': True} here"),
    "model_kwargs": ({"attention_mask": None}, "{'attention_mask': None} here"),
    "autocast_lm": (True, "False in the folder, True here"),
    "hook_head_index": (1, "None in the folder, 1 here"),
    "dataset_path": ("elsewhere", "'text' in the folder, 'elsewhere' here"),
    "context_size": (8, "16 in the folder, 8 here"),
    "prepend_bos": (True, "False in the folder, True here"),
    "sequence_separator_token": ("eos", "'bos' in the folder, 'eos' here"),
    "disable_concat_sequences": (True, "False in the folder, True here"),
    "seqpos_slice": ((1,), r"[None] in the folder, [1] here"),
    "exclude_special_tokens": ([5], "False in the folder, [5] here"),
    "dtype": ("bfloat16", "'float32' in the folder, 'bfloat16' here"),
}


class TestDifferences:
    @pytest.fixture
    def cache(self, cache_config, harvest) -> ActivationCache:
        return harvest(cache_config(dataset_path="text"))

    @pytest.mark.parametrize("name", DIFFERENCES)
    def test_each_is_named(self, cache, cache_config, name):
        value, message = DIFFERENCES[name]
        as_default = {"model_from_pretrained_kwargs": {"center_writing_weights": False}}
        cfg = cache_config(**{"dataset_path": "text", **as_default, name: value})
        with pytest.raises(ValueError, match="must hold what this run needs") as error:
            check(cache, cfg)
        lines = str(error.value).splitlines()[1:-1]
        assert len(lines) == 1
        assert lines[0].strip().startswith(f"`{name}`: ")
        assert message in lines[0]

    def test_of_chat_formatting_is_named(self, cache, cache_config):
        cfg = cache_config(use_chat_formatting=True, is_dataset_tokenized=False)
        with pytest.raises(ValueError, match=r"`use_chat_formatting`: False in the"):
            check(cache, cfg)

    def test_of_width_and_hooks_are_named_together(self, cache, cache_config):
        names = [RESID_POST[1], "blocks.0.hook_resid_pre"]
        cfg = cache_config(sae=sae_config(d_in=8), hook_names=names)
        message = (
            r"(?s)`d_in`: 16 in the folder, 8 here.*"
            r"hooks \['blocks.0.hook_resid_pre'\] are missing; it has "
        )
        with pytest.raises(ValueError, match=message):
            check(cache, cfg)

    def test_of_settings_without_effect_are_ignored(self, cache, cache_config):
        check(
            cache,
            cache_config(
                training_tokens=77,
                train_batch_size_tokens=7,
                store_batch_size_prompts=9,
                seed=5,
                layers=[1],
                dtype="torch.float32",
                lr=1e-2,
                dataset_path="",  # the run does not say, and needs none
            ),
        )

    def test_of_the_model_are_named(self, cache, cache_config, model, tokenizer):
        cfg = cache_config()
        check(cache, cfg, model)
        with pytest.raises(ValueError, match="`weights_hash`"):
            check(cache, cfg, tiny_model(tokenizer, seed=1))
        other = AutoTokenizer.from_pretrained(PAPER_DATA / "model")
        other.add_tokens(["new"])
        model.tokenizer = other
        with pytest.raises(ValueError, match="`tokenizer_hash`"):
            check(cache, cfg, model)
