"""The folder of a run. Authority: what its docstrings promise."""

import os
from pathlib import Path

import pytest

from sae_lens_multilayer.training import run_folder
from sae_lens_multilayer.training.run_folder import keep_newest, remove_leftovers


@pytest.fixture
def checkpoints(tmp_path) -> Path:
    for name in ("512", "1024", "2048", "10240", "final_10240"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cfg.json").write_text("{}")
        (tmp_path / name / "sae_weights.safetensors").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("n", "kept"), [(1, ["10240"]), (2, ["10240", "2048"]), (9, None)]
)
def test_those_of_most_tokens_stay_and_a_final_one(checkpoints, n, kept):
    before = os.listdir(checkpoints)
    keep_newest(checkpoints, n)
    expected = before if kept is None else [*kept, "final_10240"]
    assert sorted(os.listdir(checkpoints)) == sorted(expected)


def test_a_kill_while_one_is_deleted_leaves_no_half_of_it(checkpoints, monkeypatch):
    def killed(folder, ignore_errors):
        (folder / "cfg.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run_folder.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            keep_newest(checkpoints, 3)
    found = [
        path for path in checkpoints.glob("[!.]*") if len(list(path.iterdir())) < 2
    ]
    assert found == []
    assert not (checkpoints / "512").exists()
    remove_leftovers(checkpoints)
    assert sorted(os.listdir(checkpoints)) == sorted(
        ["1024", "2048", "10240", "final_10240"]
    )
