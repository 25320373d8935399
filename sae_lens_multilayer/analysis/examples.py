"""The tokens at which each latent is most active at each layer, with their contexts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from sae_lens_multilayer.files import complete_or_absent
from sae_lens_multilayer.record import Record
from sae_lens_multilayer.results import Result

EXAMPLES_FILE = "examples.parquet"
_ROWS_PER_GROUP = 2**15
"""Rows of a Parquet row group, which is skipped if it lacks a latent."""
OUTSIDE = -1
"""Token id in a context outside of the prompt."""


@dataclass
class Examples(Result):
    """The largest activations of each latent at each layer, with their contexts.

    Rows are sorted by latent, layer and rank. Equal activations are ranked in the order
    of the tokens.
    """

    hook_names: list[str]
    n_tokens: int
    """Number of tokens that were searched."""
    n_before: int
    """Tokens of a context before the example; its index in the context."""
    latents: Int[Tensor, " row"]
    layers: Int[Tensor, " row"]
    """Indices into the layer axis."""
    ranks: Int[Tensor, " row"]
    """0 for the largest activation of the latent at the layer."""
    acts: Float[Tensor, " row"]
    prompts: Int[Tensor, " row"]
    """Index of the prompt among all that were searched."""
    positions: Int[Tensor, " row"]
    """Position of the token in its prompt."""
    context_ids: Int[Tensor, "row width"]
    """Token ids around and at the example; -1 outside of the prompt."""
    context_acts: Float[Tensor, "row width"]
    """Activations of the same latent and layer there; 0 at excluded tokens."""

    def of(self, latent: int, layer: int | None = None) -> "Examples":
        """The examples of one latent, at one index into the layer axis or at all."""
        chosen = self.latents == latent
        if layer is not None:
            chosen &= self.layers == layer
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        rows: dict[str, Any] = {
            n: v[chosen] for n, v in values.items() if isinstance(v, Tensor)
        }
        return replace(self, **rows)

    @override
    def to_dataframe(self, tokenizer: Any = None) -> pd.DataFrame:
        """One row for each example, as in the file that `save` writes.

        Args:
            tokenizer: Adds the text of the tokens.
        """
        tables = list(self._tables(tokenizer))
        return pa.concat_tables(tables).to_pandas()

    @override
    def save(self, path: str | Path, tokenizer: Any = None) -> None:
        """Write the examples to a new folder, as Parquet.

        A reader finds one latent among millions of rows without reading the others.
        Contexts end at the ends of the prompt; `context_index` is the example's index.

        Args:
            path: A new folder.
            tokenizer: Adds the text of the tokens (`token`, `context_tokens`).

        Raises:
            FileExistsError: If `path` exists already.
        """
        settings = {
            "hook_names": self.hook_names,
            "n_tokens": self.n_tokens,
            "n_before": self.n_before,
            "width": self.context_ids.shape[1],
        }
        with complete_or_absent(path) as folder:
            tables = self._tables(tokenizer)
            first = next(tables)
            with pq.ParquetWriter(folder / EXAMPLES_FILE, first.schema) as writer:
                writer.write_table(first)
                for table in tables:
                    writer.write_table(table)
            Record(type(self).__name__, settings).write(folder)

    @override
    @classmethod
    def load(cls, path: str | Path, latents: Sequence[int] | None = None) -> "Examples":
        """Read examples that `save` wrote.

        Args:
            path: Their folder.
            latents: Read the examples of these latents only; None: of all.

        Raises:
            FileNotFoundError: If there are none.
            ValueError: If the folder holds another result, or is damaged.
        """
        settings = Record.read(path, cls.__name__).settings
        file = Path(path) / EXAMPLES_FILE
        filters = None if latents is None else [("latent", "in", list(latents))]
        try:
            table = pq.read_table(file, filters=filters)
            width = settings.pop("width")
            tensors: dict[str, Any] = _from_table(table, settings["n_before"], width)
            return cls(**settings, **tensors)
        # Arrow raises OSError for a page that cannot be decompressed.
        except (pa.ArrowInvalid, OSError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} must hold examples as their `save` wrote them; {error!r}."
            ) from error

    def _tables(self, tokenizer: Any) -> Iterator[pa.Table]:
        text = None if tokenizer is None else _Text(tokenizer)
        for start in range(0, max(1, len(self.latents)), _ROWS_PER_GROUP):
            yield self._table(slice(start, start + _ROWS_PER_GROUP), text)

    def _table(self, rows: slice, text: "_Text | None") -> pa.Table:
        ids, positions = self.context_ids[rows], self.positions[rows]
        inside = ids != OUTSIDE
        ends = torch.cat([torch.zeros(1).long(), inside.sum(1).cumsum(0)]).int()
        own = ids[:, self.n_before]
        columns = {
            "latent": self.latents[rows].int(),
            "layer": self.layers[rows].int(),
            "rank": self.ranks[rows].int(),
            "act": self.acts[rows],
            "prompt": self.prompts[rows],
            "position": positions.int(),
            "token_id": own.int(),
            "context_index": positions.clamp(max=self.n_before).int(),
        }
        arrays = {name: pa.array(tensor.numpy()) for name, tensor in columns.items()}
        lists = {
            "context_token_ids": pa.array(ids[inside].int().numpy()),
            "context_acts": pa.array(self.context_acts[rows][inside].numpy()),
        }
        if text is not None:
            arrays["token"] = text.of(own)
            lists["context_tokens"] = text.of(ids[inside])
        for name, values in lists.items():
            arrays[name] = pa.ListArray.from_arrays(pa.array(ends.numpy()), values)
        return pa.table(arrays)


class _Text:
    """Texts of token ids, each decoded once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def of(self, ids: Int[Tensor, " token"]) -> pa.Array:
        for token_id in ids.unique().tolist():
            if token_id not in self._known:
                self._known[token_id] = self._tokenizer.decode([token_id])
        return pa.array([self._known[i] for i in ids.tolist()], pa.string())


def _from_table(table: pa.Table, n_before: int, width: int) -> dict[str, Tensor]:
    def tensor(values: pa.Array) -> Tensor:
        return torch.from_numpy(values.to_numpy(zero_copy_only=False).copy())

    def column(name: str) -> pa.Array:
        return table[name].combine_chunks()

    lengths = tensor(column("context_token_ids").value_lengths()).long()
    row = torch.arange(len(lengths)).repeat_interleave(lengths)
    # A context begins in the padded row so that the example is at index `n_before`.
    start = n_before - tensor(column("context_index")).long()
    before = lengths.cumsum(0) - lengths
    index = torch.arange(len(row)) - before[row] + start[row]
    context_ids = torch.full((len(lengths), width), OUTSIDE, dtype=torch.int32)
    context_ids[row, index] = tensor(column("context_token_ids").flatten()).int()
    context_acts = torch.zeros(len(lengths), width)
    context_acts[row, index] = tensor(column("context_acts").flatten()).float()
    plain = ["latent", "layer", "rank", "prompt", "position"]
    return {
        **{f"{name}s": tensor(column(name)).long() for name in plain},
        "acts": tensor(column("act")).double(),
        "context_ids": context_ids,
        "context_acts": context_acts,
    }
