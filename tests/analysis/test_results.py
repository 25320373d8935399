"""Saved results: complete or absent, and of one kind."""

import pytest
import torch
from dense import accumulate, batch_of, random_sparse, sae_of

from sae_lens_multilayer.analysis import (
    ActiveLayers,
    DistributionSums,
    LayerDistributions,
)


@pytest.fixture
def saved(tmp_path):
    acts = random_sparse(0, 12, 4, 6)
    dists = accumulate(DistributionSums(sae_of(acts)), [batch_of(acts)])
    dists.save(tmp_path / "result")
    return tmp_path / "result"


def test_nothing_is_overwritten(saved):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    dists = LayerDistributions.load(saved)
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        dists.save(saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


def test_a_result_that_cannot_be_saved_leaves_nothing(saved):
    dists = LayerDistributions.load(saved)
    dists.hook_names = [torch.zeros(1)]  # type: ignore[list-item]
    with pytest.raises(TypeError, match="not JSON serializable"):
        dists.save(saved.parent / "other")
    assert [path.name for path in saved.parent.iterdir()] == ["result"]


def test_the_wrong_kind_is_an_error(saved):
    with pytest.raises(
        ValueError, match=r"kind 'ActiveLayers'; .*'LayerDistributions'"
    ):
        ActiveLayers.load(saved)


def test_a_missing_file_is_an_error(saved):
    with pytest.raises(FileNotFoundError, match=r"has no record\.json"):
        LayerDistributions.load(saved.parent)
    (saved / "tensors.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"tensors\.safetensors"):
        LayerDistributions.load(saved)


def test_a_damaged_file_is_an_error(saved):
    record = saved / "record.json"
    text = record.read_text()
    record.write_text(text.replace("hook_names", "names"))
    with pytest.raises(ValueError, match=r"another version.*hook_names"):
        LayerDistributions.load(saved)
    record.write_text(text)
    tensors = saved / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"tensors\.safetensors must be safetensors"):
        LayerDistributions.load(saved)
