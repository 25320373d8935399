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
from sae_lens import SAE
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor
from typing_extensions import Unpack, override

from sae_lens_multilayer.analysis.active import sums_device
from sae_lens_multilayer.analysis.results import (
    Result,
    check_is_file,
    read_settings,
    write_settings,
)
from sae_lens_multilayer.analysis.stream import PassOptions, TokenBatch, analyze
from sae_lens_multilayer.checkpoints import complete_or_absent
from sae_lens_multilayer.views import hook_names_of

EXAMPLES_FILE = "examples.parquet"
_ROWS_PER_GROUP = 2**15
"""Rows that Parquet can skip together when it looks for a latent."""
_FEWEST_PENDING = 2**16
_OUTSIDE = -1
"""The token id of a place of a context that is outside of the prompt."""


@dataclass
class _Rows:
    """Examples, one a row; the place of each in its context is the same."""

    cell: Int[Tensor, " row"]
    """`layer * d_sae + latent`."""
    act: Float[Tensor, " row"]
    prompt: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    context_ids: Int[Tensor, "row width"]
    context_acts: Float[Tensor, "row width"]

    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def take(self, rows: Tensor) -> "_Rows":
        return _Rows(*(tensor[rows] for tensor in self.tensors()))


@dataclass
class Examples(Result):
    """The largest activations of each latent at each layer, and the text around them.

    Rows are ordered by latent, layer and rank. Of equal activations the one that came
    first in the prompts ranks first.
    """

    hook_names: list[str]
    n_tokens: int
    """Tokens that were looked at."""
    n_before: int
    """Places of a context before the example's own."""
    latents: Int[Tensor, " row"]
    layers: Int[Tensor, " row"]
    """Positions on the layer axis."""
    ranks: Int[Tensor, " row"]
    """0 for the largest activation of the latent at the layer."""
    acts: Float[Tensor, " row"]
    prompts: Int[Tensor, " row"]
    """Number of the prompt, from 0, among all that were looked at."""
    positions: Int[Tensor, " row"]
    """Position of the token in its prompt."""
    context_ids: Int[Tensor, "row width"]
    """Token ids around and at the example; -1 outside of the prompt."""
    context_acts: Float[Tensor, "row width"]
    """Activations of the same latent at the same layer there; 0 at tokens that were
    left out."""

    def of(self, latent: int, layer: int | None = None) -> "Examples":
        """The examples of one latent, at one position on the layer axis or all."""
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
            tokenizer: Adds the text of the tokens, where one is given.
        """
        tables = list(self._tables(tokenizer))
        return pa.concat_tables(tables).to_pandas()

    @override
    def save(self, path: str | Path, tokenizer: Any = None) -> None:
        """Write the examples to a new folder, as Parquet.

        Parquet holds the lists as typed columns, and a reader finds one latent among
        millions of rows without reading the others; pandas, datasets, DuckDB and Polars
        open it. Contexts are cut at the ends of the prompt; `context_index` is the
        example's own place in them.

        Args:
            path: A new folder.
            tokenizer: Adds the text of the tokens (`token`, `context_tokens`), so that
                a viewer needs none.

        Raises:
            FileExistsError: If something is at `path` already.
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
            write_settings(folder, type(self).__name__, settings)

    @override
    @classmethod
    def load(cls, path: str | Path, latents: Sequence[int] | None = None) -> "Examples":
        """Read examples that `save` wrote.

        Args:
            path: Their folder.
            latents: Read these alone; None: all.

        Raises:
            FileNotFoundError: If there are none.
            ValueError: If the folder holds another result, or is damaged.
        """
        settings = read_settings(path, cls.__name__)
        file = Path(path) / EXAMPLES_FILE
        check_is_file(file)
        filters = None if latents is None else [("latent", "in", list(latents))]
        try:
            table = pq.read_table(file, filters=filters)
            width = settings.pop("width")
            tensors: dict[str, Any] = _from_table(table, settings["n_before"], width)
            return cls(**settings, **tensors)
        except (pa.ArrowInvalid, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} must hold examples as their `save` wrote them; {error!r}."
            ) from error

    def _tables(self, tokenizer: Any) -> Iterator[pa.Table]:
        text = None if tokenizer is None else _Text(tokenizer)
        for start in range(0, max(1, len(self.latents)), _ROWS_PER_GROUP):
            yield self._table(slice(start, start + _ROWS_PER_GROUP), text)

    def _table(self, rows: slice, text: "_Text | None") -> pa.Table:
        ids, positions = self.context_ids[rows], self.positions[rows]
        inside = ids != _OUTSIDE
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
    """The text of token ids, each decoded once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def of(self, ids: Int[Tensor, " token"]) -> pa.Array:
        for token_id in ids.unique().tolist():
            if token_id not in self._known:
                self._known[token_id] = self._tokenizer.decode([token_id])
        return pa.array([self._known[i] for i in ids.tolist()], pa.string())


def _from_table(table: pa.Table, n_before: int, width: int) -> dict[str, Tensor]:
    def column(name: str) -> Tensor:
        values = table[name].combine_chunks()
        return torch.from_numpy(values.to_numpy(zero_copy_only=False).copy())

    def places(name: str) -> Tensor:
        values = table[name].combine_chunks().flatten()
        return torch.from_numpy(values.to_numpy(zero_copy_only=False).copy())

    lengths = table["context_token_ids"].combine_chunks().value_lengths().to_numpy()
    lengths = torch.from_numpy(lengths.copy()).long()
    row = torch.arange(len(lengths)).repeat_interleave(lengths)
    first = n_before - column("context_index").long()
    start = lengths.cumsum(0) - lengths
    place = torch.arange(len(row)) - start[row] + first[row]
    context_ids = torch.full((len(lengths), width), _OUTSIDE, dtype=torch.int32)
    context_ids[row, place] = places("context_token_ids").int()
    context_acts = torch.zeros(len(lengths), width)
    context_acts[row, place] = places("context_acts").float()
    plain = ["latent", "layer", "rank", "prompt", "position"]
    return {
        **{f"{name}s": column(name).long() for name in plain},
        "acts": column("act").double(),
        "context_ids": context_ids,
        "context_acts": context_acts,
    }


class ExampleCollector:
    """Keeps the largest activations of each latent at each layer, exactly.

    Holds at most `n_examples` rows for each latent and layer that was active, and as
    many that wait to be compared: in bytes about `(28 + 8 * width) * n_examples` for
    each such pair, twice.
    """

    def __init__(
        self,
        sae: SAE[Any],
        n_examples: int = 8,
        *,
        n_before: int = 10,
        n_after: int = 5,
        latents: Sequence[int] | None = None,
    ) -> None:
        """Start at no token.

        Args:
            sae: The SAE that will be analysed.
            n_examples: Examples to keep for each latent and layer.
            n_before: Tokens of the context before the example.
            n_after: Tokens of the context after it.
            latents: Keep examples of these alone; None: of all.

        Raises:
            ValueError: If a number is out of range, or a latent unknown.
        """
        if n_examples < 1 or n_before < 0 or n_after < 0:
            raise ValueError(
                "`n_examples` must be at least 1, `n_before` and `n_after` at least 0; "
                f"got {n_examples}, {n_before} and {n_after}."
            )
        self._hook_names = hook_names_of(sae)
        self._d_sae = sae.cfg.d_sae
        self._n_examples, self._n_before, self._n_after = n_examples, n_before, n_after
        n_cells = len(self._hook_names) * self._d_sae
        # An activation must be larger than this to become an example.
        floor = torch.zeros(len(self._hook_names), self._d_sae, dtype=torch.float64)
        if latents is not None:
            check_latents(latents, self._d_sae)
            wanted = torch.zeros(self._d_sae, dtype=torch.bool)
            wanted[list(latents)] = True
            floor[:, ~wanted] = torch.inf
        self._floor = floor.to(sums_device(sae)).view(n_cells)
        self._kept: _Rows | None = None
        self._pending: list[_Rows] = []
        self._n_pending = 0
        self.n_tokens = 0

    def update(self, batch: TokenBatch) -> None:
        """Add a batch of tokens; the prompts must come in order."""
        active = batch.active
        self.n_tokens += active.n_tokens
        # By cell, and by token in each.
        cell, order = active.cell.sort(stable=True)
        value = active.value[order]
        found = (value > self._floor[cell]).nonzero().squeeze(1)
        found = found[_largest(cell[found], value[found], self._n_examples)]
        if not len(found):
            return
        token = active.token[order].cpu()
        cell, value, found = cell.cpu(), value.cpu(), found.cpu()
        prompt, position = batch.prompt[token], batch.position[token]
        rows = _Rows(
            cell[found],
            value[found],
            prompt[found] + batch.first_prompt,
            position[found],
            self._context_ids(batch.prompts, prompt[found], position[found]),
            self._context_acts(cell, value, prompt, position, found),
        )
        self._pending.append(rows)
        self._n_pending += len(found)
        n_kept = 0 if self._kept is None else len(self._kept.cell)
        if self._n_pending > max(_FEWEST_PENDING, n_kept // 2):
            self._merge()

    def _context_ids(
        self, prompts: Tensor, prompt: Tensor, position: Tensor
    ) -> Int[Tensor, "row width"]:
        offsets = torch.arange(-self._n_before, self._n_after + 1)
        places = position.unsqueeze(1) + offsets
        inside = (places >= 0) & (places < prompts.shape[1])
        ids = prompts[prompt.unsqueeze(1), places.clamp(0, prompts.shape[1] - 1)]
        return torch.where(inside, ids, _OUTSIDE).int()

    def _context_acts(
        self,
        cell: Tensor,
        value: Tensor,
        prompt: Tensor,
        position: Tensor,
        found: Tensor,
    ) -> Float[Tensor, "row width"]:
        """Look up a cell's other activations among its neighbours in the order.

        Neighbours in the order are no nearer in the prompt, so those of a context are
        within its width.
        """
        acts = torch.zeros(len(found), self._n_before + 1 + self._n_after)
        rows = torch.arange(len(found))
        for shift in range(-self._n_before, self._n_after + 1):
            other = (found + shift).clamp(0, len(cell) - 1)
            offset = position[other] - position[found]
            same = (cell[other] == cell[found]) & (prompt[other] == prompt[found])
            same &= (offset >= -self._n_before) & (offset <= self._n_after)
            place = offset[same] + self._n_before
            acts[rows[same], place] = value[other[same]].float()
        return acts

    def _merge(self) -> None:
        lots = ([] if self._kept is None else [self._kept]) + self._pending
        self._pending, self._n_pending = [], 0
        if not lots:
            return
        columns = zip(*(lot.tensors() for lot in lots), strict=True)
        everything = _Rows(*(torch.cat(column) for column in columns))
        chosen = _largest(everything.cell, everything.act, self._n_examples)
        self._kept = everything.take(chosen)
        cells, counts = self._kept.cell.unique_consecutive(return_counts=True)
        full = counts == self._n_examples
        smallest = self._kept.act[counts.cumsum(0) - 1]
        device = self._floor.device
        self._floor[cells[full].to(device)] = smallest[full].to(device)

    def compute(self) -> Examples:
        """The examples of all tokens so far.

        Raises:
            ValueError: If no latent was active at any of them.
        """
        self._merge()
        if self._kept is None:
            raise ValueError(
                f"None of the latents was active at any of the {self.n_tokens} tokens, "
                "so there are no examples. Choose other latents, or give more tokens."
            )
        rows, d_sae = self._kept, self._d_sae
        n_layers = len(self._hook_names)
        rank = _rank(rows.cell)
        by_latent = rows.cell % d_sae * n_layers + rows.cell // d_sae
        order = by_latent.sort(stable=True).indices
        rows = rows.take(order)
        return Examples(
            self._hook_names,
            self.n_tokens,
            self._n_before,
            rows.cell % d_sae,
            rows.cell // d_sae,
            rank[order],
            rows.act,
            rows.prompt,
            rows.position,
            rows.context_ids,
            rows.context_acts,
        )


def max_activating_examples(
    sae: SAE[Any],
    model: Any,
    tokens: Int[Tensor, "prompt pos"] | ActivationsStore,
    *,
    n_examples: int = 8,
    n_before: int = 10,
    n_after: int = 5,
    latents: Sequence[int] | None = None,
    **options: Unpack[PassOptions],
) -> Examples:
    """The largest activations of each latent at each layer, with their contexts.

    Args:
        sae, model, tokens: As in `analyze`.
        n_examples, n_before, n_after, latents: See `ExampleCollector`.
        options: See `PassOptions`.
    """
    collector = ExampleCollector(
        sae, n_examples, n_before=n_before, n_after=n_after, latents=latents
    )
    return analyze(sae, model, tokens, collector, **options)[0]


def check_latents(latents: Sequence[int], d_sae: int) -> None:
    """Raise ValueError unless there are latents, all of them the SAE's, each once."""
    unknown = [latent for latent in latents if not 0 <= latent < d_sae]
    if unknown or not len(latents) or len(set(latents)) != len(latents):
        raise ValueError(
            f"`latents` must be in [0, d_sae = {d_sae}), each once and at least one; "
            f"got {list(latents)}."
        )


def _largest(
    cell: Int[Tensor, " row"], value: Float[Tensor, " row"], n: int
) -> Int[Tensor, " chosen"]:
    """The n largest values of each cell, by cell and size; the first of equal ones."""
    order = value.sort(descending=True, stable=True).indices
    order = order[cell[order].sort(stable=True).indices]
    return order[_rank(cell[order]) < n]


def _rank(cell: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
    """Position of each row among the consecutive rows of its cell."""
    counts = cell.unique_consecutive(return_counts=True)[1]
    start = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return torch.arange(len(cell), device=cell.device) - start
