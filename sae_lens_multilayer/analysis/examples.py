"""Activations of each latent with the text around them: the largest, or a sample."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
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
    """Activations of each latent with the text around them: the largest, or a sample.

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
    """0 for the largest of these activations of the latent at the layer."""
    acts: Float[Tensor, " row"]
    prompts: Int[Tensor, " row"]
    """Index of the prompt among all that were searched."""
    positions: Int[Tensor, " row"]
    """Position of the token in its prompt."""
    context_ids: Int[Tensor, "row width"]
    """Token ids around and at the example; -1 outside of the prompt."""
    context_acts: Float[Tensor, "row width"]
    """Activations of the same latent and layer there; 0 at excluded tokens."""
    layer_acts: Float[Tensor, "row layer"]
    """Activations of the latent at the token itself, at every layer."""

    def of(self, latent: int, layer: int | None = None) -> "Examples":
        """The examples of one latent, at one index into the layer axis or at all."""
        chosen = self.latents == latent
        if layer is not None:
            chosen &= self.layers == layer
        return self._rows(chosen)

    def to_dataframe(self, tokenizer: Any = None) -> pd.DataFrame:
        """One row for each example, as in the file that `save` writes."""
        return self._to_arrow(_text_of(tokenizer)).to_pandas()

    @override
    def save(self, path: str | Path, tokenizer: Any = None) -> None:
        """Write the examples to a new folder, as Parquet.

        A reader finds one latent among millions of rows without reading the others.
        Contexts end at the ends of the prompt; `context_index` is the example's index.

        Args:
            path: The new folder; FileExistsError if it exists.
            tokenizer: Adds the text of the tokens (`token`, `context_tokens`).
        """
        names = ("hook_names", "n_tokens", "n_before")
        settings = {name: getattr(self, name) for name in names}
        settings["width"] = self.context_ids.shape[1]
        text_of = _text_of(tokenizer)
        schema = self._rows(slice(0))._to_arrow(text_of).schema
        with complete_or_absent(path) as folder:
            # Arrow takes no path that is not UTF-8.
            with (
                (folder / EXAMPLES_FILE).open("wb") as file,
                pq.ParquetWriter(file, schema) as writer,
            ):
                for start in range(0, len(self.latents), _ROWS_PER_GROUP):
                    rows = self._rows(slice(start, start + _ROWS_PER_GROUP))
                    writer.write_table(rows._to_arrow(text_of))
            Record(type(self).__name__, settings).write(folder)

    @override
    @classmethod
    def load(cls, path: str | Path, latents: Sequence[int] | None = None) -> "Examples":
        """Read examples that `save` wrote, of all latents or of some."""
        settings = Record.read(path, cls.__name__).settings
        file = Path(path) / EXAMPLES_FILE
        filters = None if latents is None else [("latent", "in", list(latents))]
        try:
            with file.open("rb") as source:
                table = pq.read_table(source, filters=filters)
            width = settings.pop("width")
            tensors: dict[str, Any] = _from_arrow(table, settings["n_before"], width)
            return cls(**settings, **tensors)
        # Arrow raises OSError for a page that cannot be decompressed.
        except (pa.ArrowInvalid, OSError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} must hold examples as their `save` wrote them; {error!r}."
            ) from error

    def _rows(self, chosen: Tensor | slice) -> "Examples":
        tensors = {n: v for n, v in vars(self).items() if isinstance(v, Tensor)}
        rows: dict[str, Any] = {n: v[chosen] for n, v in tensors.items()}
        return replace(self, **rows)

    def _to_arrow(self, text_of: Callable[[int], str] | None) -> pa.Table:
        inside = self.context_ids != OUTSIDE
        ends = torch.cat([torch.zeros(1).long(), inside.sum(1).cumsum(0)]).int()
        own, context_ids = self.context_ids[:, self.n_before], self.context_ids[inside]
        columns = {
            "latent": self.latents.int(),
            "layer": self.layers.int(),
            "rank": self.ranks.int(),
            "act": self.acts,
            "prompt": self.prompts,
            "position": self.positions.int(),
            "token_id": own.int(),
            "context_index": self.positions.clamp(max=self.n_before).int(),
        }
        arrays = {name: pa.array(tensor.numpy()) for name, tensor in columns.items()}
        lists = {
            "context_token_ids": pa.array(context_ids.int().numpy()),
            "context_acts": pa.array(self.context_acts[inside].numpy()),
        }
        if text_of is not None:
            arrays["token"] = pa.array(map(text_of, own.tolist()), pa.string())
            texts = pa.array(map(text_of, context_ids.tolist()), pa.string())
            lists["context_tokens"] = texts
        for name, values in lists.items():
            arrays[name] = pa.ListArray.from_arrays(pa.array(ends.numpy()), values)
        layer_acts = pa.array(self.layer_acts.flatten().numpy())
        n_layers = self.layer_acts.shape[1]
        arrays["layer_acts"] = pa.FixedSizeListArray.from_arrays(layer_acts, n_layers)
        return pa.table(arrays)


def _text_of(tokenizer: Any) -> Callable[[int], str] | None:
    """The text of a token id, decoded once; None without a tokenizer."""
    if tokenizer is None:
        return None
    return cache(lambda token_id: tokenizer.decode([token_id]))


def _from_arrow(table: pa.Table, n_before: int, width: int) -> dict[str, Tensor]:
    def tensor(values: pa.Array) -> Tensor:
        return torch.from_numpy(values.to_numpy(zero_copy_only=False).copy())

    def column(name: str) -> pa.Array:
        return table[name].combine_chunks()

    # A context begins in the padded row so that the example is at index `n_before`.
    start = n_before - tensor(column("context_index")).unsqueeze(1)
    length = tensor(column("context_token_ids").value_lengths()).unsqueeze(1)
    index = torch.arange(width)
    inside = (index >= start) & (index < start + length)
    context_ids = torch.full(inside.shape, OUTSIDE, dtype=torch.int32)
    context_ids[inside] = tensor(column("context_token_ids").flatten()).int()
    context_acts = torch.zeros(inside.shape)
    context_acts[inside] = tensor(column("context_acts").flatten()).float()
    layer_acts = column("layer_acts")
    plain = ["latent", "layer", "rank", "prompt", "position"]
    return {
        **{f"{name}s": tensor(column(name)).long() for name in plain},
        "acts": tensor(column("act")).double(),
        "context_ids": context_ids,
        "context_acts": context_acts,
        "layer_acts": tensor(layer_acts.flatten()).view(-1, layer_acts.type.list_size),
    }
