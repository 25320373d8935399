"""Records. Reference: what was written, and the inputs that were changed."""

import pytest
import torch
from conftest import N_CTX, tiny_model

from sae_lens_multilayer.record import (
    Record,
    hash_of_tensors,
    tokenizer_hash,
    weights_hash,
)


def test_a_record_is_read_as_it_was_written(tmp_path):
    record = Record("thing", {"a": (1, (2, None)), "b": {"c": 0.1}}, {"hash": "x"})
    record.write(tmp_path)
    assert Record.read(tmp_path, "thing") == Record.read(tmp_path) == record
    assert record.settings["a"] == [1, [2, None]]
    assert "torch" in record.versions


def test_differences_name_both_values_of_what_both_have():
    found = Record("thing", {"a": 1, "b": (2,), "old": 3}, {"hash": "x"})
    wanted = Record("thing", {"a": 2, "b": [2], "new": 3}, {"hash": "y"})
    a = "`a`: 1 in the folder, 2 here"
    hashes = "`hash`: 'x' in the folder, 'y' here"
    assert found.differences(wanted) == [a, hashes]
    assert found.differences(wanted, ignore=["a"]) == [hashes]
    assert found.differences(found) == []


def test_other_versions_are_logged_and_no_difference(tmp_path, caplog):
    record = Record("thing", {})
    record.warn_of_versions(tmp_path)
    assert not caplog.text
    older = Record("thing", {}, versions={**record.versions, "torch": "0.1"})
    assert not older.differences(record)
    older.warn_of_versions(tmp_path)
    assert f"torch 0.1 (now {torch.__version__})" in caplog.text


@pytest.mark.parametrize("damaged", ["{", ""])
def test_a_damaged_record_is_one_clear_line(tmp_path, damaged):
    Record("thing", {"a": 1}).write(tmp_path)
    path = tmp_path / "record.json"
    path.write_text(damaged)
    with pytest.raises(ValueError, match=r"record\.json must be") as error:
        Record.read(tmp_path, "thing")
    assert "\n" not in str(error.value)


def test_no_record_and_another_kind_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'thing'; it has no record\.json"):
        Record.read(tmp_path, "thing")
    Record("other", {}).write(tmp_path)
    with pytest.raises(ValueError, match=r"must be of kind 'thing'.* 'other'"):
        Record.read(tmp_path, "thing")


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.tensor([1.0, 3.0])},
        {"a": torch.tensor([[1.0, 2.0]])},
        {"a": torch.tensor([1.0, 2.0], dtype=torch.float64)},
        {"b": torch.tensor([1.0, 2.0])},
        {},
    ],
    ids=["values", "shape", "dtype", "name", "none"],
)
def test_a_hash_of_tensors_is_of_all_of_them(other):
    tensors = {"a": torch.tensor([1.0, 2.0]), "c": torch.empty(0)}
    first = hash_of_tensors(tensors)
    assert hash_of_tensors(dict(reversed(tensors.items()))) == first
    assert hash_of_tensors({"c": tensors["c"], **other}) != first


class TestModels:
    def test_a_hash_is_of_its_weights_alone(self, model, tokenizer):
        first = weights_hash(model)
        assert weights_hash(tiny_model(tokenizer)) == first
        model.train().requires_grad_(False)
        model(torch.ones(1, 4, dtype=torch.long))
        assert weights_hash(model) == first

    @pytest.mark.parametrize("size", [16, 512 * 16])
    def test_a_models_changes_with_any_parameter(self, model, size):
        first = weights_hash(model)
        parameters = [p for p in model.parameters() if p.numel() == size]
        for parameter in parameters:
            saved = parameter.data.clone()
            parameter.data += 1e-6
            assert weights_hash(model) != first
            parameter.data = saved
        assert len(parameters) > 1
        assert weights_hash(model) == first

    def test_a_models_changes_with_its_dtype_and_shapes(self, model, tokenizer):
        first = weights_hash(model)
        assert weights_hash(model.to(torch.bfloat16)) != first
        assert weights_hash(tiny_model(tokenizer, n_ctx=N_CTX + 1)) != first

    def test_a_tokenizers_does_not_change_with_use(self, tokenizer):
        first = tokenizer_hash(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
        changed = tokenizer_hash(tokenizer)
        tokenizer(["w1", "w1 w2"], padding=True, truncation=True, max_length=3)
        assert tokenizer_hash(tokenizer) == changed
        assert first is not None
        assert tokenizer_hash(None) is None
