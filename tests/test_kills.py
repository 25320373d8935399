"""A run that is killed repeatedly ends with the weights of an undisturbed run.

Reference: the same run without a kill, bit for bit. `KILLS=200 pytest
tests/test_kills.py -s` kills more often.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sae_lens_multilayer.lens.jacobian import read_jacobians

SCRIPT = Path(__file__).with_name("killed_run.py")
N_KILLS = int(os.environ.get("KILLS", "3"))
STEP_SECONDS = 0.01


class Runs:
    """Controls `killed_run.py`."""

    def __init__(self) -> None:
        root = SCRIPT.parents[1]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root), "TQDM_DISABLE": "1"},
        )

    def start(self, folder: Path, seconds: float, task: str = "train") -> int:
        """Start or resume a run; returns its PID just before the task starts."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{task} {folder} {seconds}\n")
        self.process.stdin.flush()
        return self._answer("started")

    def wait(self) -> int:
        """Wait until the run has ended; returns the status of `os.waitpid`."""
        return self._answer("ended")

    def kill(self, process: int) -> bool:
        """Kill the run and wait; returns False if it had ended before."""
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        return self.wait() == signal.SIGKILL

    def _answer(self, word: str) -> int:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith(word), line
        return int(line.split()[1])


@pytest.fixture
def runs():
    runs = Runs()
    yield runs
    runs.process.kill()
    runs.process.communicate()


def saved(folder: Path) -> dict[str, bytes]:
    """The bytes of all tensors in the output of a run."""
    return {
        name: tensor.numpy().tobytes()
        for file in (folder / "output").glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("what", ["train", "lens", "stock", "streamed", "prefetch"])
def test_kills_at_any_moment_do_not_change_where_a_run_ends(runs, tmp_path, what):
    runs.start(tmp_path / "whole", 0, what)
    assert runs.wait() == 0
    expected = saved(tmp_path / "whole")
    assert set(expected) >= {"W_enc", "W_dec", "b_dec", "sparsity"}
    assert any(name.startswith("lens.") for name in expected) == (what == "lens")
    choose = random.Random(0)
    n_kills = n_while_writing = n_runs = 0
    while n_kills < N_KILLS:
        folder = tmp_path / f"killed-{n_runs}"
        process = runs.start(folder, STEP_SECONDS, what)
        time.sleep(choose.uniform(0, 70 * STEP_SECONDS))
        if runs.kill(process):
            n_kills += 1
            n_while_writing += any(folder.glob("checkpoints/*/.partial-*"))
        if (folder / "output").exists():
            assert saved(folder) == expected
            n_runs += 1
    folder = tmp_path / f"killed-{n_runs}"
    runs.start(folder, 0, what)
    assert runs.wait() == 0
    assert saved(folder) == expected
    print(
        f"{what}: {n_kills} kills ({n_while_writing} while saving), "
        f"{n_runs + 1} whole runs"
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("what", ["jacobian", "sgd", "adam"])
def test_kills_at_any_moment_do_not_change_a_lens(runs, tmp_path, what):
    def fitted(folder: Path) -> dict[Any, torch.Tensor]:
        path = folder / "fitted"
        if what == "jacobian":
            found = read_jacobians(path)
        else:
            found = torch.load(path / "params.pt", weights_only=True)
        shutil.rmtree(folder)
        return found

    runs.start(tmp_path / "whole", 0, what)
    assert runs.wait() == 0
    assert [path.name for path in (tmp_path / "whole").iterdir()] == ["fitted"]
    expected = fitted(tmp_path / "whole")
    choose, folder = random.Random(0), tmp_path / "killed"
    n_kills = n_resumed = 0
    while n_kills < N_KILLS or not n_resumed:
        n_resumed += any(folder.glob("*.partial/batches-*"))
        process = runs.start(folder, STEP_SECONDS, what)
        time.sleep(choose.uniform(0, 70 * STEP_SECONDS))
        n_kills += runs.kill(process)
        if (folder / "fitted").exists():
            torch.testing.assert_close(fitted(folder), expected, rtol=0, atol=0)
    runs.start(folder, 0, what)
    assert runs.wait() == 0
    assert not any(folder.glob("*.partial"))
    torch.testing.assert_close(fitted(folder), expected, rtol=0, atol=0)
