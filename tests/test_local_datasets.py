"""Reference: the tokens that SAELens' own `ActivationsStore` reads in the end."""

import gzip
import json
import warnings
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import torch
from conftest import D_VOCAB, N_CTX
from datasets import Dataset, DatasetDict, IterableDataset
from sae_lens.training.activations_store import ActivationsStore

from sae_lens_multilayer.text.dataset import resolve_dataset

STREAMING = pytest.mark.parametrize("streaming", [True, False])


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    """An empty working folder, and a cache of `datasets` that no other test sees."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "cwd"


@pytest.fixture
def read(model, make_config):
    """The contexts that SAELens reads from a dataset or a path in one epoch."""

    def read(dataset, context_size=N_CTX, streaming=True, **changes):
        config = make_config(
            context_size=context_size,
            dataset_path="unused",
            sequence_separator_token=None,
            streaming=streaming,
            **changes,
        )
        resolved = resolve_dataset(
            dataset, context_size, streaming, config.disable_concat_sequences
        )
        assert not isinstance(resolved, str)  # SAELens is not left to find it
        with warnings.catch_warnings():
            # SAELens: not tokenised; longer than the context; torch.tensor(tensor).
            warnings.simplefilter("ignore")
            store = ActivationsStore.from_config(model, config, resolved)
            return torch.stack(list(store._iterate_tokenized_sequences())).tolist()

    return read


def token_rows(n_rows=6, length=N_CTX):
    torch.manual_seed(1)
    return torch.randint(1, D_VOCAB, (n_rows, length)).tolist()


TOKENS = token_rows()
LINES = [" ".join(f"w{token}" for token in row[:10]) for row in TOKENS]
TEXT_TOKENS = [token for row in TOKENS for token in row[:10]]
CONTEXTS_OF_TEXT = [TEXT_TOKENS[i : i + N_CTX] for i in (0, 16, 32)]


def write_rows(path, column, rows):
    table = pd.DataFrame({column: rows})
    if path.suffix in (".jsonl", ".json"):
        lines = [json.dumps({column: row}) for row in rows]
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        path.write_text("\n".join(rows) + "\n")


TEXT_SUFFIXES = [".jsonl", ".json", ".parquet", ".csv", ".txt"]


@STREAMING
@pytest.mark.parametrize("suffix", TEXT_SUFFIXES)
def test_a_single_file_of_text_is_read(own_place, read, suffix, streaming):
    path = own_place / f"data{suffix}"
    write_rows(path, "text", LINES)
    assert read(str(path), streaming=streaming) == CONTEXTS_OF_TEXT
    assert read(path.name, streaming=streaming) == CONTEXTS_OF_TEXT


@STREAMING
@pytest.mark.parametrize("suffix", TEXT_SUFFIXES)
def test_a_folder_of_text_is_read(own_place, read, suffix, streaming):
    folder = own_place / "folder"
    folder.mkdir()
    write_rows(folder / f"part-0{suffix}", "text", LINES[:3])
    write_rows(folder / f"part-1{suffix}", "text", LINES[3:])
    assert read(str(folder), streaming=streaming) == CONTEXTS_OF_TEXT
    assert read("folder", streaming=streaming) == CONTEXTS_OF_TEXT


@STREAMING
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("column", ["tokens", "input_ids"])
def test_a_folder_of_tokens_is_read(own_place, read, suffix, column, streaming):
    folder = own_place / "folder"
    folder.mkdir()
    write_rows(folder / f"part{suffix}", column, TOKENS)
    assert read(str(folder), streaming=streaming) == TOKENS


@STREAMING
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_single_file_of_tokens_is_read(own_place, read, suffix, streaming):
    write_rows(own_place / f"data{suffix}", "input_ids", TOKENS)
    assert read(f"data{suffix}", streaming=streaming) == TOKENS


@pytest.mark.parametrize("name", ["data.JSONL", "data.v2.jsonl"])
def test_the_kind_of_a_file_is_its_last_ending_in_any_case(own_place, read, name):
    write_rows(own_place / "data.jsonl", "tokens", TOKENS)
    (own_place / "data.jsonl").rename(own_place / name)
    assert read(name) == TOKENS


def test_a_compressed_file_is_read(own_place, read):
    with gzip.open(own_place / "data.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"tokens": row}) + "\n" for row in TOKENS)
    assert read("data.jsonl.gz") == TOKENS


def test_other_columns_do_no_harm(read):
    rows = {"id": list(range(6)), "tokens": TOKENS, "text": LINES}
    assert read(Dataset.from_dict(rows)) == TOKENS
    assert read(Dataset.from_dict(rows).to_iterable_dataset()) == TOKENS


@STREAMING
@pytest.mark.parametrize("splits", [None, ["train", "test"], ["validation"]])
def test_a_folder_of_save_to_disk_is_read(own_place, read, splits, streaming):
    dataset = Dataset.from_dict({"input_ids": TOKENS})
    if splits is not None:
        other = Dataset.from_dict({"input_ids": token_rows(2)})
        dataset = DatasetDict(dict.fromkeys(splits, other) | {splits[0]: dataset})
    dataset.save_to_disk(own_place / "saved")
    assert read("saved", streaming=streaming) == TOKENS


@STREAMING
def test_a_folder_of_save_to_disk_with_text_is_read(own_place, read, streaming):
    Dataset.from_dict({"text": LINES}).save_to_disk(own_place / "saved")
    assert read("saved", streaming=streaming) == CONTEXTS_OF_TEXT


@STREAMING
def test_a_folder_whose_only_split_is_not_train_is_read(own_place, read, streaming):
    (own_place / "folder").mkdir()
    write_rows(own_place / "folder" / "test.jsonl", "tokens", TOKENS)
    assert read("folder", streaming=streaming) == TOKENS


def test_of_several_splits_train_is_read(own_place, read):
    (own_place / "folder").mkdir()
    write_rows(own_place / "folder" / "test.jsonl", "tokens", token_rows(2))
    write_rows(own_place / "folder" / "train.jsonl", "tokens", TOKENS)
    assert read("folder") == TOKENS


def test_several_splits_without_train_are_an_error():
    dataset = Dataset.from_dict({"tokens": TOKENS})
    with pytest.raises(ValueError, match=r"'train' split or a single one; it has.*'a'"):
        resolve_dataset(DatasetDict({"a": dataset, "b": dataset}), N_CTX)


@pytest.mark.parametrize("name", ["json", "text", "parquet"])
def test_a_folder_named_like_a_builder_is_read(own_place, read, name):
    (own_place / name).mkdir()
    write_rows(own_place / name / "data.jsonl", "tokens", TOKENS)
    assert read(name) == TOKENS


def test_a_path_from_the_home_folder_is_read(own_place, read, monkeypatch):
    monkeypatch.setenv("HOME", str(own_place))
    write_rows(own_place / "data.jsonl", "tokens", TOKENS)
    assert read("~/data.jsonl") == TOKENS


@pytest.mark.parametrize("name", ["json", "monology/pile-uncopyrighted", "wikitext"])
def test_a_name_on_the_hub_passes_through(name):
    assert resolve_dataset(name, N_CTX) == name


@pytest.mark.parametrize(
    "name",
    ["/no/such/path", "./no", "../no", "~/no", "data/part/no.jsonl", "no.jsonl"],
)
def test_a_path_with_nothing_there_is_an_error(name):
    with pytest.raises(FileNotFoundError, match=r"`dataset_path` .* does not exist"):
        resolve_dataset(name, N_CTX)


def test_a_file_of_an_unknown_kind_is_an_error(own_place):
    (own_place / "data.docx").write_text("text")
    with pytest.raises(ValueError, match=r"must end in one of.*\.jsonl.*data\.docx"):
        resolve_dataset("data.docx", N_CTX)


@STREAMING
@pytest.mark.parametrize("suffix", TEXT_SUFFIXES)
def test_an_empty_file_is_an_error(own_place, suffix, streaming):
    (own_place / f"data{suffix}").touch()
    with pytest.raises(
        ValueError, match=r"must have at least one row; data.* is empty"
    ):
        resolve_dataset(f"data{suffix}", N_CTX, streaming)


@STREAMING
@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet"])
def test_a_file_of_another_format_is_an_error_that_names_it(own_place, name, streaming):
    (own_place / name).write_text('{"text": "w1" "w2"}')
    with pytest.raises(ValueError, match=rf"^{name} must be readable as a dataset; "):
        resolve_dataset(name, N_CTX, streaming)


@STREAMING
def test_an_empty_folder_is_an_error(own_place, streaming):
    (own_place / "folder").mkdir()
    with pytest.raises(ValueError, match="must have at least one row; folder is empty"):
        resolve_dataset("folder", N_CTX, streaming)
    (own_place / "folder" / "data.jsonl").touch()
    with pytest.raises(ValueError, match="must have at least one row; folder is empty"):
        resolve_dataset("folder", N_CTX, streaming)


def no_rows():
    yield from ()


@pytest.mark.parametrize(
    "dataset",
    [
        Dataset.from_dict({"text": []}),
        Dataset.from_dict({"tokens": []}),
        DatasetDict({"train": Dataset.from_dict({"text": []})}),
        IterableDataset.from_generator(no_rows),
    ],
)
def test_a_dataset_without_rows_is_an_error(dataset):
    with pytest.raises(ValueError, match="must have at least one row; it is empty"):
        resolve_dataset(dataset, N_CTX)


def test_a_dataset_of_whole_contexts_is_returned_unchanged(token_dataset):
    assert resolve_dataset(token_dataset, N_CTX) is token_dataset


def test_a_dataset_of_text_is_returned_unchanged(text_dataset):
    assert resolve_dataset(text_dataset, N_CTX) is text_dataset


SHORT = [[1, 2], [3, 4, 5, 6, 7], [8], [], [9, 10, 11], [12, 13, 14, 15], [16, 17]]
"""With a context of 4, the short rows are joined, 7 is cut, and 12 to 15 fit."""
JOINED = [[3, 4, 5, 6], [1, 2, 8, 9], [12, 13, 14, 15], [10, 11, 16, 17]]
KINDS = pytest.mark.parametrize(
    "kind", ["memory", "stream", "torch", "numpy", "file", "saved"]
)


def short_rows(kind, own_place):
    dataset = Dataset.from_dict({"tokens": SHORT})
    if kind == "stream":
        return dataset.to_iterable_dataset()
    if kind in ("torch", "numpy"):
        return dataset.with_format(kind)
    if kind == "file":
        write_rows(own_place / "data.jsonl", "tokens", SHORT)
        return "data.jsonl"
    if kind == "saved":
        dataset.save_to_disk(own_place / "saved")
        return "saved"
    return dataset


@KINDS
def test_rows_shorter_than_the_context_are_joined(own_place, read, kind):
    assert read(short_rows(kind, own_place), context_size=4) == JOINED


@KINDS
def test_rows_shorter_than_the_context_are_skipped_on_request(own_place, read, kind):
    contexts = read(
        short_rows(kind, own_place), context_size=4, disable_concat_sequences=True
    )
    assert contexts == [[3, 4, 5, 6], [12, 13, 14, 15]]


def test_a_short_row_late_in_a_large_dataset_is_found(read):
    rows = [[1, 2, 3, 4]] * 25_000
    rows[24_000] = [1]
    contexts = list(resolve_dataset(Dataset.from_dict({"tokens": rows}), 4))
    assert len(contexts) == 24_999


def test_a_selection_of_rows_is_respected(read):
    # The table of a selection still holds the rows that were left out.
    selection = Dataset.from_dict({"tokens": SHORT}).select([1, 5])
    assert resolve_dataset(selection, 4) is selection
    assert read(selection, context_size=4) == [[3, 4, 5, 6], [12, 13, 14, 15]]


def test_rows_of_a_fixed_length_are_accepted(read):
    features = datasets.Features(
        {"tokens": datasets.Sequence(datasets.Value("int32"), length=N_CTX)}
    )
    assert read(Dataset.from_dict({"tokens": TOKENS}, features=features)) == TOKENS


def test_a_row_that_is_missing_counts_as_empty():
    dataset = Dataset.from_dict({"tokens": [[1, 2], None, [3, 4]]})
    assert list(resolve_dataset(dataset, 4)) == [{"tokens": [1, 2, 3, 4]}]


def test_joined_rows_can_be_read_again():
    joined = resolve_dataset(Dataset.from_dict({"tokens": SHORT}), 4)
    assert list(joined) == list(joined)


@pytest.mark.parametrize("disable", [False, True])
def test_less_than_one_context_of_tokens_is_an_error(disable):
    dataset = Dataset.from_dict({"tokens": [[1, 2], [3]]})
    with pytest.raises(ValueError, match="a context of 4 tokens"):
        resolve_dataset(dataset, 4, disable_concat_sequences=disable)


@pytest.mark.parametrize("row", [["EU", "rejects"], [0.5], "EU", 7])
def test_a_token_column_that_does_not_hold_token_ids_is_an_error(row):
    dataset = Dataset.from_dict({"text": ["a"], "tokens": [row]})
    with pytest.raises(
        ValueError, match="column 'tokens' must hold lists of token ids"
    ):
        resolve_dataset(dataset, N_CTX)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_file_name_is_not_a_pattern(own_place, streaming):
    for name, text in [("run1.jsonl", "another"), ("run[1].jsonl", "wanted")]:
        Path(name).write_text(json.dumps({"text": text}))
    found: Any = resolve_dataset("run[1].jsonl", N_CTX, streaming)
    assert [row["text"] for row in found] == ["wanted"]


def test_a_file_in_a_folder_with_brackets_is_read_and_the_folder_refused(own_place):
    folder = Path("data [v2]")
    folder.mkdir()
    (folder / "train.jsonl").write_text(json.dumps({"text": "words"}))
    found: Any = resolve_dataset(str(folder / "train.jsonl"), N_CTX)
    assert [row["text"] for row in found] == ["words"]
    with pytest.raises(ValueError, match=r"pattern; got data \[v2\]"):
        resolve_dataset(str(folder), N_CTX)
