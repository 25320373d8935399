"""Reading rows from any row on, and errors of a row."""

import pytest
from datasets import Dataset, IterableDataset

from sae_lens_multilayer.text.dataset import read_rows, rows_hash

N_ROWS = 12


def numbers(dataset, start=0) -> list[int]:
    return [int(row["number"]) for row in read_rows(dataset, start)]


@pytest.mark.parametrize("start", [0, 1, 7, N_ROWS])
def test_rows_from_an_index_on(start):
    data = Dataset.from_dict({"number": list(range(N_ROWS))})
    shuffled = data.to_iterable_dataset(num_shards=3).shuffle(seed=1, buffer_size=4)
    order = numbers(shuffled)
    assert sorted(order) == list(range(N_ROWS)) != order
    assert numbers(data, start) == list(range(N_ROWS))[start:]
    assert numbers(shuffled, start) == order[start:]


@pytest.mark.parametrize("n_beyond", [1, 2])
def test_fewer_rows_than_had_been_read_are_an_error(n_beyond):
    data = Dataset.from_dict({"number": list(range(N_ROWS))})
    for dataset in (data, data.to_iterable_dataset()):
        with pytest.raises(ValueError, match=f"the {N_ROWS + n_beyond} rows"):
            numbers(dataset, N_ROWS + n_beyond)


def test_the_hash_of_rows_changes_with_them():
    def hashes(values):
        data = Dataset.from_dict({"number": values})
        stream = data.to_iterable_dataset()
        assert rows_hash(data.with_format("torch")) == rows_hash(data)
        return {rows_hash(data), rows_hash(stream)}

    few = list(range(N_ROWS))
    assert hashes(few) == hashes(few)
    assert not hashes(few) & hashes([1, *few])
    assert rows_hash(Dataset.from_dict({"number": few})) != rows_hash(
        Dataset.from_dict({"number": [*few[:-1], 0]})
    )


def test_a_row_that_cannot_be_decoded_is_an_error_that_names_it():
    def read():
        yield {"number": 0}
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    found = read_rows(IterableDataset.from_generator(read), 0)
    next(found)
    with pytest.raises(RuntimeError, match=r"Row 1 of the dataset.*invalid start byte"):
        next(found)
