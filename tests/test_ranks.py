"""Several ranks: the update, the shares of the data, resuming, errors.

Reference: one process on the whole batch, for updates; the run that is left alone, bit
for bit, for what is resumed.
"""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PAPER_DATA
from datasets import Dataset
from killed_run import documents
from ranked_runs import steps
from sae_lens import SAE
from safetensors.torch import load_file
from test_kills import N_KILLS

from sae_lens_multilayer.ranks import ALONE, Ranks, bits_of, own_device
from sae_lens_multilayer.training.checkpoint import (
    load_rank_random_states,
    state_of_rank,
    write_rank_states,
)

SCRIPT = Path(__file__).with_name("ranked_runs.py")


class RankedRuns:
    """Controls `ranked_runs.py`."""

    def __init__(self) -> None:
        root = SCRIPT.parents[1]
        shows_bars = os.environ.keys() - {"TQDM_DISABLE"}  # which a test looks for
        environment = {name: os.environ[name] for name in shows_bars}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
            env={**environment, "PYTHONPATH": str(root)},
        )

    def start(self, task: str, folder: Path, count: int, **settings: Any) -> list[int]:
        """Start ranks; returns their PIDs."""
        folder.mkdir(exist_ok=True)
        assert self.process.stdin is not None
        line = json.dumps([task, str(folder), count, settings])
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self._answer("started")

    def wait(self) -> list[int]:
        """Wait until all have ended; returns the statuses of `os.waitpid`."""
        return self._answer("ended")

    def run(self, task: str, folder: Path, count: int = 2, **settings: Any) -> None:
        """Run a task that must succeed on all ranks."""
        self.start(task, folder, count, **settings)
        assert self.wait() == [0] * max(count, 1), logs(folder)

    def fail(self, folder: Path, count: int = 2, **settings: Any) -> str:
        """Train where all ranks must fail; returns their output."""
        self.start("train", folder, count, **settings)
        assert self.wait() == [256] * count, logs(folder)
        return logs(folder)

    def _answer(self, word: str) -> list[int]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith(word), line
        return list(map(int, line.split()[1:]))


@pytest.fixture(scope="module")
def ranked():
    runs = RankedRuns()
    yield runs
    runs.process.kill()
    runs.process.communicate()


def logs(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("rank_*.log")))


def saved(folder: Path) -> dict[str, bytes]:
    """The bytes of all tensors in the output of a run."""
    return {
        name: tensor.numpy().tobytes()
        for file in (folder / "output").glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoints/*/*"))


def prompts(folder: Path, index: int) -> list[tuple[int, ...]]:
    return list(map(tuple, json.loads((folder / f"{index}.json").read_text())))


class TestUpdate:
    @pytest.mark.parametrize(
        "sae",
        ["multilayer", "raw", "crosscoder", "routed", "standard", "topk", "scaled"],
    )
    def test_two_ranks_with_half_the_batch_make_the_update_of_one_process(
        self, ranked, tmp_path, sae
    ):
        expected = steps(ALONE, sae)
        ranked.run("save_steps", tmp_path, sae=sae)
        found = [load_file(tmp_path / f"{index}.safetensors") for index in range(2)]
        if sae != "standard" and sae != "scaled":
            assert expected["n_dead.5"] > 0
            assert expected["losses.5.auxiliary_reconstruction_loss"] > 0
        if sae in ("multilayer", "raw", "crosscoder", "routed"):
            norms = expected["W_dec"].norm(dim=1)
            torch.testing.assert_close(norms, torch.ones_like(norms))
            # Too far from 0 for ten steps of 0.01: it starts at the geometric median.
            b_dec = expected["b_dec"]
            assert b_dec.norm() > 0.1 * len(b_dec) ** 0.5
        for name, tensor in expected.items():
            assert torch.equal(found[0][name], found[1][name]), name
            torch.testing.assert_close(
                found[0][name],
                tensor,
                rtol=1e-4,
                atol=1e-5,
                msg=lambda text, name=name: f"{name}: {text}",
            )

    def test_what_batchtopk_estimates_is_the_same_on_all_ranks(self, ranked, tmp_path):
        ranked.run("save_steps", tmp_path, sae="batchtopk")
        one, other = (load_file(tmp_path / f"{i}.safetensors") for i in range(2))
        assert one["topk_threshold"] > 0
        assert bits_of(one) == bits_of(other)


class TestShares:
    @pytest.mark.parametrize("n_rows", [11, 12])
    @pytest.mark.parametrize("skipped", [0, 3])
    def test_every_row_is_one_ranks(self, n_rows, skipped):
        rows = Dataset.from_dict({"row": list(range(n_rows))})
        for dataset in (
            rows,
            rows.to_iterable_dataset(),
            rows.to_iterable_dataset(num_shards=4),
        ):
            own: Any = [Ranks(i, 2).own_rows(dataset) for i in range(2)]
            wholes = [[row["row"] for row in share] for share in own]
            assert sorted(wholes[0] + wholes[1]) == list(range(n_rows))
            assert abs(len(wholes[0]) - len(wholes[1])) <= 1
            for share, whole in zip(own, wholes, strict=True):
                rest = [row["row"] for row in share.skip(skipped)]
                assert rest == whole[skipped:]

    @pytest.mark.parametrize("streaming", [False, True])
    def test_ranks_harvest_different_tokens_over_epochs_of_uneven_lengths(
        self, ranked, tmp_path, streaming
    ):
        n_rows = 25
        ranked.run("train", tmp_path, n_rows=n_rows, streaming=streaming)
        harvested = [prompts(tmp_path, index) for index in range(2)]
        assert not set(harvested[0]) & set(harvested[1])
        texts = documents()["text"][:n_rows]
        for index, own in enumerate(harvested):
            n_words = sum(len(text.split()) for text in texts[index::2])
            n_contexts = (n_words + len(texts[index::2])) // 16
            first_epoch = own[: n_contexts - 1]
            assert len(set(first_epoch)) == len(first_epoch)
            assert len(own) > 2 * len(first_epoch)
            # Half of 1,280 tokens in contexts of 16, rounded up to model batches.
            assert 40 <= len(own) < 44

    def test_a_batch_that_does_not_divide_is_refused(self, ranked, tmp_path):
        output = ranked.fail(tmp_path, train_batch_size_tokens=65)
        assert "processes, which share it; got 65 and 2" in output


class TestRuns:
    @pytest.mark.parametrize("sae", ["multilayer", "crosscoder", "routed"])
    def test_a_resumed_run_ends_with_the_same_bits_and_one_rank_writes(
        self, ranked, tmp_path, sae
    ):
        whole, stopped = tmp_path / "whole", tmp_path / "stopped"
        ranked.run("train", whole, n_checkpoints=2, sae=sae)
        assert "output" in os.listdir(whole)
        assert not list(whole.glob("output-*"))
        assert len(checkpoints(whole)) == 2
        output = ranked.fail(stopped, stop_at=640, sae=sae)
        assert output.count("InterruptedException\n") == 2
        assert output.count("The run has ended early; resume from") == 1
        assert checkpoints(stopped) == ["640"]
        ranked.run("train", stopped, resume_from_checkpoint="latest", sae=sae)
        assert saved(stopped) == saved(whole)
        assert {"W_enc", "W_dec", "b_dec", "sparsity"} <= saved(whole).keys()

    def test_one_process_equals_a_run_without_torchrun(self, ranked, tmp_path):
        ranked.run("train", tmp_path / "torchrun", count=1)
        ranked.run("train", tmp_path / "alone", count=0)
        assert saved(tmp_path / "torchrun") == saved(tmp_path / "alone")

    def test_the_first_rank_logs_and_evaluates(self, ranked, tmp_path):
        ranked.run("train", tmp_path, wandb=True)
        assert not (tmp_path / "logged_1.json").exists()
        logged = set(json.loads((tmp_path / "logged_0.json").read_text()))
        assert {"4 losses/overall_loss", "9 layer_0/kl_div"} <= logged
        assert not set(prompts(tmp_path, 0)) & set(prompts(tmp_path, 1))

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (math.nan, "Rank 1 has failed: NonFiniteActivationError"),
            (1e30, "FloatingPointError: The loss and its gradient must be finite"),
        ],
    )
    def test_a_nan_on_one_rank_ends_all_ranks_with_a_checkpoint(
        self, ranked, tmp_path, value, message
    ):
        whole, failed = tmp_path / "whole", tmp_path / "failed"
        ranked.run("train", whole)
        ranked.fail(failed, fail_at=9, value=value)
        for index in range(2):
            assert message in (failed / f"rank_{index}.log").read_text()
        (name,) = checkpoints(failed)
        assert 0 < int(name) < 1280
        ranked.run("train", failed, resume_from_checkpoint="latest")
        assert saved(failed) == saved(whole)

    def test_a_rank_that_dies_ends_the_run_and_leaves_the_last_checkpoint(
        self, ranked, tmp_path
    ):
        whole, killed = tmp_path / "whole", tmp_path / "killed"
        ranked.run("train", whole)
        _, other = ranked.start("train", killed, 2, n_checkpoints=6, seconds=0.25)
        while not checkpoints(killed):
            time.sleep(0.02)
        time.sleep(0.2)
        os.kill(other, signal.SIGKILL)
        assert ranked.wait() == [256, signal.SIGKILL]
        assert "Rank 0 of 2 has lost the connection" in logs(killed)
        newest = max(killed.glob("checkpoints/*/[0-9]*"), key=lambda p: int(p.name))
        assert SAE.load_from_disk(newest).cfg.d_sae == 256
        ranked.run("train", killed, resume_from_checkpoint="latest")
        assert saved(killed) == saved(whole)

    def test_kills_of_the_ranks_do_not_change_where_a_run_ends(self, ranked, tmp_path):
        whole, killed = tmp_path / "whole", tmp_path / "killed"
        ranked.run("train", whole)
        choose, n_kills = random.Random(0), 0
        settings = {"n_checkpoints": 12, "resume_from_checkpoint": "latest"}
        while n_kills < N_KILLS:
            pids = ranked.start("train", killed, 2, seconds=0.05, **settings)
            time.sleep(choose.uniform(0, 1.5))
            for pid in choose.sample(
                pids, 2
            ):  # torchrun ends the others of a dead rank
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            n_kills += signal.SIGKILL in ranked.wait()
            if (killed / "output").exists():
                assert saved(killed) == saved(whole)
                killed.rename(tmp_path / f"ended-{n_kills}")
        ranked.run("train", killed, **settings)
        assert saved(killed) == saved(whole)

    def test_an_error_on_one_rank_ends_all_without_a_checkpoint(self, ranked, tmp_path):
        output = ranked.fail(tmp_path, break_at=640)
        assert "RuntimeError: no memory on this rank" in output
        assert "Rank 0 of 2 has lost the connection" in output
        assert checkpoints(tmp_path) == []

    def test_ranks_with_different_initial_weights_are_refused(self, ranked, tmp_path):
        output = ranked.fail(tmp_path, differ="weights")
        assert "The SAE must be the same on all ranks; ranks 0 and 1" in output
        assert "['W_dec']" in output

    def test_ranks_with_different_settings_are_refused(self, ranked, tmp_path):
        output = ranked.fail(tmp_path, differ="settings")
        assert "Settings must be the same on all ranks" in output
        assert "['lr', 'lr_end']" in output

    def test_the_command_line_trains_on_ranks(self, ranked, tmp_path):
        documents().to_json(tmp_path / "text.jsonl")
        settings = {
            "sae": {"d_in": 64, "d_sae": 128, "k": 4},
            "model_class_name": "TransformerBridge",
            "model_name": str(PAPER_DATA / "model"),
            "dataset_path": "text.jsonl",
            "context_size": 16,
            "training_tokens": 256,
            "train_batch_size_tokens": 64,
            "store_batch_size_prompts": 4,
            "n_batches_in_buffer": 16,
            "output_path": "output",
            "checkpoint_path": None,
            "logger": {"log_to_wandb": False},
        }
        (tmp_path / "run.json").write_text(json.dumps(settings))
        arguments = ["train", "--config", "run.json"]
        ranked.run("command", tmp_path, arguments=arguments)
        assert SAE.load_from_disk(tmp_path / "output").cfg.d_sae == 128
        first, other = ((tmp_path / f"rank_{i}.log").read_text() for i in range(2))
        for message in ("Training SAE", "Activation buffer"):
            assert message in first
            assert message not in other

    def test_another_number_of_ranks_is_refused(self, ranked, tmp_path):
        ranked.fail(tmp_path, stop_at=640)
        output = ranked.fail(tmp_path, count=1, resume_from_checkpoint="latest")
        assert "a run of 2 processes" in output
        assert "torchrun --nproc_per_node 2" in output


class TestRanks:
    def test_random_numbers_continue_on_every_rank(self, tmp_path):
        torch.manual_seed(7)
        write_rank_states([b"", state_of_rank({})], tmp_path)
        expected = torch.rand(3)
        load_rank_random_states(tmp_path, 1)
        assert torch.equal(torch.rand(3), expected)

    def test_bit_sums_differ_for_swapped_rows_and_negative_zero(self):
        rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        assert bits_of({"a": rows}) == bits_of({"a": rows.clone()})
        assert bits_of({"a": rows}) != bits_of({"a": rows.flip(0)})
        assert bits_of({"a": torch.tensor(0.0)}) != bits_of({"a": torch.tensor(-0.0)})

    def test_a_rank_uses_the_gpu_of_its_local_rank(self, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "3")
        assert own_device("cuda") == own_device("cuda:0") == "cuda:3"
        assert own_device("cpu") == "cpu"
        with pytest.raises(ValueError, match="must be 'cuda'"):
            own_device("cuda:1")
