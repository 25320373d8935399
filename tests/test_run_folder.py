"""The folder of a run. Reference: its docstrings, and the files SAELens writes."""

import os
from pathlib import Path

import pytest
from conftest import tiny_sae_config
from sae_lens import TrainingSAE

from sae_lens_multilayer import files
from sae_lens_multilayer.files import remove_leftovers
from sae_lens_multilayer.training.checkpoint import check_checkpoint, keep_newest


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
def test_the_newest_and_the_final_checkpoint_are_kept(checkpoints, n, kept):
    before = os.listdir(checkpoints)
    keep_newest(checkpoints, n)
    expected = before if kept is None else [*kept, "final_10240"]
    assert sorted(os.listdir(checkpoints)) == sorted(expected)


def test_a_kill_while_one_is_deleted_leaves_no_half_of_it(checkpoints, monkeypatch):
    def killed(folder, ignore_errors):
        (folder / "cfg.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(files.shutil, "rmtree", killed)
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


WANTED = {"architecture": "multilayer", "d_in": 16, "d_sae": 64, "k": 4}


@pytest.fixture
def checkpoint(tmp_path):
    sae = TrainingSAE.from_dict(tiny_sae_config(d_in=16, d_sae=64).to_dict())
    sae.save_model(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_a_fitting_checkpoint_passes(checkpoint):
    check_checkpoint(checkpoint, WANTED)
    check_checkpoint(str(checkpoint), WANTED)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({"architecture": "topk"}, "'architecture': 'multilayer'"),
        ({"d_in": 32}, "'d_in': 16"),
        ({"d_sae": 128}, "'d_sae': 64"),
        ({"k": 8}, "'k': 4"),
    ],
)
def test_the_checkpoint_of_another_sae_is_an_error(checkpoint, wanted, found):
    with pytest.raises(ValueError, match="must be of this run's SAE") as info:
        check_checkpoint(checkpoint, WANTED | wanted)
    wanted_text, found_text = str(info.value).split("it has")
    assert found in found_text
    assert str(WANTED | wanted) in wanted_text


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_a_damaged_checkpoint_is_an_error_that_names_the_file(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"must be a checkpoint.*; {name} is"):
        check_checkpoint(checkpoint, WANTED)


def test_a_missing_checkpoint_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be a checkpoint folder"):
        check_checkpoint(tmp_path / "nothing", WANTED)


def test_a_checkpoint_whose_config_is_not_json_is_an_error(checkpoint):
    (checkpoint / "cfg.json").write_text('{"architecture": "multil')
    with pytest.raises(ValueError, match=r"cfg.json.*must be JSON"):
        check_checkpoint(checkpoint, WANTED)
