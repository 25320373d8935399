"""From a dataset's path to its rows."""

import glob
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from sae_lens.config import HfDataset

from sae_lens_multilayer.record import hash_of_json

_BUILDER_OF_SUFFIX = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
    ".text": "text",
    ".arrow": "arrow",
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_TOKEN_COLUMNS = ("tokens", "input_ids")
_HASHED_ROWS = 64


def resolve_dataset(
    dataset: HfDataset | str,
    context_size: int,
    streaming: bool = True,
    disable_concat_sequences: bool = False,
    use_chat_formatting: bool = False,
) -> HfDataset | str:
    """Load a local dataset, and make token rows as long as the context.

    SAELens itself fails on a single file, a `save_to_disk` folder, a local folder of
    tokens and a folder named like one of the builders of `datasets` ("json").

    Args:
        dataset: A dataset, a local path, or a name on the Hugging Face hub, which is
            returned unchanged for SAELens to load.
        disable_concat_sequences: Skip token rows shorter than the context instead of
            joining them.
        use_chat_formatting: Read conversations; token columns are unchanged.

    """
    with _readable(dataset):
        if isinstance(dataset, str):
            found = _load_local(dataset, streaming)
            if found is None:
                return dataset
            dataset = found
        if isinstance(dataset, DatasetDict | IterableDatasetDict):
            dataset = _train_split(dataset)
        first: Any = next(iter(dataset), None)
    if first is None:
        raise ValueError("The dataset must have at least one row; it is empty.")
    column = next((name for name in _TOKEN_COLUMNS if name in first), None)
    if column is None or use_chat_formatting:
        return dataset
    _check_token_ids(column, first[column])
    if _rows_reach(dataset, column, context_size):
        return dataset
    return _of_whole_contexts(
        dataset, column, context_size, join=not disable_concat_sequences
    )


@contextmanager
def _readable(dataset: object) -> Generator[None]:
    """Name the dataset if a file of it has another format than its name says."""
    try:
        yield
    except (pa.ArrowInvalid, DatasetGenerationError) as error:
        name = dataset if isinstance(dataset, str) else "The dataset"
        reason = error.__cause__ or error
        raise ValueError(f"{name} must be readable as a dataset; {reason}.") from error


def _load_local(name: str, streaming: bool) -> Any:
    path = Path(name).expanduser()
    if not path.exists():
        if _is_path(name):
            raise FileNotFoundError(f"`dataset_path` {path} does not exist.")
        return None
    files = [path] if path.is_file() else (f for f in path.rglob("*") if f.is_file())
    if not any(file.stat().st_size for file in files):
        raise ValueError(f"The dataset must have at least one row; {path} is empty.")
    if path.is_file():
        # `data_files` is a pattern, in which [ starts a set of characters.
        file = glob.escape(str(path.absolute()))
        return load_dataset(_builder_of(path), data_files=file, streaming=streaming)
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return load_from_disk(str(path))
    if glob.has_magic(str(path.absolute())):
        raise ValueError(
            "`dataset_path` of a folder must not contain *, ? or [, which `datasets` "
            f"reads as a pattern; got {path}. Rename it, or name one file."
        )
    # An absolute path is never the name of a builder.
    return load_dataset(str(path.absolute()), streaming=streaming)


def _is_path(name: str) -> bool:
    """Whether a name can only be a path: on the hub it is `name` or `owner/name`."""
    return "://" not in name and (
        name.count("/") > 1
        or name.startswith(("/", "./", "../", "~"))
        or ("/" not in name and Path(name).suffix in _BUILDER_OF_SUFFIX)
    )


def _builder_of(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes if s.lower() not in _COMPRESSED]
    suffix = suffixes[-1] if suffixes else ""
    if suffix not in _BUILDER_OF_SUFFIX:
        known = sorted(_BUILDER_OF_SUFFIX)
        raise ValueError(f"`dataset_path` must end in one of {known}; got {path}.")
    return _BUILDER_OF_SUFFIX[suffix]


def _train_split(splits: DatasetDict | IterableDatasetDict) -> HfDataset:
    if "train" in splits:
        return splits["train"]
    if len(splits) == 1:
        return next(iter(splits.values()))
    raise ValueError(
        f"The dataset must have a 'train' split or a single one; it has {list(splits)}."
    )


def _check_token_ids(column: str, row: Any) -> None:
    values = _as_list(row)
    if values is None or any(not isinstance(value, int) for value in values):
        raise ValueError(
            f"The column {column!r} must hold lists of token ids; got {row!r:.100}."
        )


def _as_list(row: Any) -> list[Any] | None:
    """A value of a row in any format of `datasets`; None if it is not a list."""
    row = row.tolist() if hasattr(row, "tolist") else row
    return row if isinstance(row, list) else None


def _rows_reach(dataset: Any, column: str, context_size: int) -> bool:
    """Whether every row is long enough; False for a stream, which is not read ahead."""
    if not isinstance(dataset, Dataset):
        return False
    tables: Any = dataset.with_format("arrow", columns=[column]).iter(10_000)
    for table in tables:
        lengths = pc.call_function("list_value_length", [table[column]])
        if lengths.fill_null(0).to_numpy().min() < context_size:
            return False
    return True


def _of_whole_contexts(
    dataset: Any, column: str, context_size: int, join: bool
) -> IterableDataset:
    kwargs = {"dataset": dataset, "column": column}
    kwargs |= {"context_size": context_size, "join": join}
    contexts = IterableDataset.from_generator(_contexts, gen_kwargs=kwargs)
    if next(iter(contexts), None) is None:
        raise ValueError(f"The dataset must have a context of {context_size} tokens.")
    return contexts


def _contexts(
    dataset: Any, column: str, context_size: int, join: bool
) -> Iterator[dict[str, list[int]]]:
    """Rows of one context: long ones are cut, as in SAELens, short ones joined."""
    waiting: list[int] = []
    for row in dataset:
        tokens = _as_list(row[column]) or []
        if len(tokens) >= context_size:
            yield {column: tokens[:context_size]}
        elif join:
            waiting += tokens
            if len(waiting) >= context_size:
                yield {column: waiting[:context_size]}
                waiting = waiting[context_size:]


def rows_hash(dataset: HfDataset) -> str:
    """Hash of 64 evenly spaced rows; of the first row of a stream."""
    data: Any = dataset
    if isinstance(data, Dataset):
        last, n = len(data) - 1, _HASHED_ROWS - 1
        data = data.select([last * i // n for i in range(n + 1)])
    else:
        data = data.take(1)
    return hash_of_json([str(row) for row in data.with_format(None)])


def read_rows(dataset: HfDataset, start: int) -> Iterator[dict[str, Any]]:
    """The rows of a dataset from row `start` on; RuntimeError names an unreadable row.

    A stream is read from its beginning, which is the only exact way for every stream,
    such as a shuffled one.

    Raises:
        ValueError: If the dataset has fewer than `start` rows.
    """
    data: Any = dataset
    has_fewer = isinstance(data, Dataset) and len(data) < start
    row = start
    try:
        rows: Any = iter(data.skip(start - 1) if start and not has_fewer else data)
        # A stream has no length; its row before `start` must be there.
        has_fewer = has_fewer or (start > 0 and next(rows, None) is None)
        for values in () if has_fewer else rows:
            yield values
            row += 1
    except Exception as error:
        raise RuntimeError(
            f"Row {row} of the dataset must be readable; {error!r}."
        ) from error
    if has_fewer:
        raise ValueError(
            f"The dataset must have the {start} rows that the run had read; it has "
            "fewer. Resume with the same dataset, or start a new run."
        )
