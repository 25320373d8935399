"""Finds the tokens at which each latent is most active at each layer."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from sae_lens_multilayer.analysis.active import check_latents, sums_device
from sae_lens_multilayer.analysis.batch import TokenBatch
from sae_lens_multilayer.analysis.examples import OUTSIDE, Examples
from sae_lens_multilayer.analysis.stream import single_analysis
from sae_lens_multilayer.sae.views import hook_names_of

_FEWEST_ROWS = 2**12
"""Smallest capacity of the table of examples."""


class _Rows(NamedTuple):
    """Examples, one per row; each is at the same index of its context."""

    cell: Int[Tensor, " row"]
    """`layer * d_sae + latent`."""
    act: Float[Tensor, " row"]
    prompt: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    context_ids: Int[Tensor, "row width"]
    context_acts: Float[Tensor, "row width"]

    @classmethod
    def empty(cls, n: int, width: int) -> "_Rows":
        cell, prompt, position = (torch.empty(n, dtype=torch.int64) for _ in range(3))
        ids = torch.empty(n, width, dtype=torch.int32)
        act = torch.empty(n, dtype=torch.float64)
        return cls(cell, act, prompt, position, ids, torch.empty(n, width))

    def take(self, rows: Tensor | slice) -> "_Rows":
        return _Rows(*(tensor[rows] for tensor in self))

    def write(self, start: int, rows: "_Rows") -> None:
        for own, new in zip(self, rows, strict=True):
            own[start : start + len(new)] = new


class ExampleCollector:
    """Keeps the largest activations of each latent at each layer, exactly.

    Memory: `n_examples` rows of `32 + 8 * width` bytes for each latent and layer that
    was active, as many rows that are not compared yet, and a copy while they are.

    Args:
        n_examples: Examples to keep for each latent and layer.
        n_before, n_after: Tokens of the context before and after the example.
        latents: Keep examples of these latents only; None: of all.
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
        if n_examples < 1:
            raise ValueError(f"`n_examples` must be at least 1; got {n_examples}.")
        self._hook_names, self._d_sae = hook_names_of(sae), sae.cfg.d_sae
        self._n_examples, self._n_before, self._n_after = n_examples, n_before, n_after
        # An activation must be larger than this to become an example.
        floor = torch.zeros(len(self._hook_names), self._d_sae, dtype=torch.float64)
        if latents is not None:
            check_latents(latents, self._d_sae)
            floor.fill_(torch.inf)[:, list(latents)] = 0
        self._floor = floor.to(sums_device(sae)).flatten()
        # The tensors are allocated as a whole: many small ones would fragment memory.
        self._table = _Rows.empty(_FEWEST_ROWS, n_before + 1 + n_after)
        self._n_rows = self.n_tokens = 0

    def update(self, batch: TokenBatch) -> None:
        active = batch.active
        self.n_tokens += active.n_tokens
        # Sorted by cell, then by token.
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
        self._add(rows)

    def _context_ids(
        self, prompts: Tensor, prompt: Tensor, position: Tensor
    ) -> Int[Tensor, "row width"]:
        offsets = torch.arange(-self._n_before, self._n_after + 1)
        around = position.unsqueeze(1) + offsets
        inside = (around >= 0) & (around < prompts.shape[1])
        ids = prompts[prompt.unsqueeze(1), around.clamp(0, prompts.shape[1] - 1)]
        return torch.where(inside, ids, OUTSIDE).int()

    def _context_acts(
        self,
        cell: Tensor,
        value: Tensor,
        prompt: Tensor,
        position: Tensor,
        found: Tensor,
    ) -> Float[Tensor, "row width"]:
        """Find the activations of the same cell in the context of each example.

        Activations are sorted by cell and token, so those of a context are at most its
        width away in this order.
        """
        acts = torch.zeros(len(found), self._n_before + 1 + self._n_after)
        rows = torch.arange(len(found))
        for shift in range(-self._n_before, self._n_after + 1):
            other = (found + shift).clamp(0, len(cell) - 1)
            offset = position[other] - position[found]
            same = (cell[other] == cell[found]) & (prompt[other] == prompt[found])
            same &= (offset >= -self._n_before) & (offset <= self._n_after)
            column = offset[same] + self._n_before
            acts[rows[same], column] = value[other[same]].float()
        return acts

    def _add(self, rows: _Rows) -> None:
        """Append rows; if there is no space, keep the largest of each cell first."""
        n = len(rows.cell)
        if self._n_rows + n > len(self._table.cell):
            kept = self._prune()
            if self._n_rows + n > len(self._table.cell):
                # Twice the rows, so that pruning stays rare.
                width = kept.context_ids.shape[1]
                self._table = _Rows.empty(2 * (self._n_rows + n), width)
                self._table.write(0, kept)
        self._table.write(self._n_rows, rows)
        self._n_rows += n

    def _prune(self) -> _Rows:
        """Keep the largest of each cell, and raise the floor of cells with all.

        Returns:
            The examples so far, sorted by cell and size; of equal ones, the first.
        """
        rows = self._table.take(slice(self._n_rows))
        kept = rows.take(_largest(rows.cell, rows.act, self._n_examples))
        self._table.write(0, kept)
        self._n_rows = len(kept.cell)
        cells, counts = kept.cell.unique_consecutive(return_counts=True)
        full = counts == self._n_examples
        smallest = kept.act[counts.cumsum(0) - 1]
        device = self._floor.device
        self._floor[cells[full].to(device)] = smallest[full].to(device)
        return kept

    def compute(self) -> Examples:
        rows = self._prune()
        if not self._n_rows:
            raise ValueError(
                f"None of the latents is active at any of the {self.n_tokens} tokens. "
                "Choose other latents, or give more tokens."
            )
        rank = _rank(rows.cell)
        latent, layer = rows.cell % self._d_sae, rows.cell // self._d_sae
        order = (latent * len(self._hook_names) + layer).sort(stable=True).indices
        return Examples(
            self._hook_names,
            self.n_tokens,
            self._n_before,
            latent[order],
            layer[order],
            rank[order],
            *rows.take(order)[1:],
        )


max_activating_examples = single_analysis(ExampleCollector)
"""The largest activations of each latent at each layer, with their contexts."""


def _largest(
    cell: Int[Tensor, " row"], value: Float[Tensor, " row"], n: int
) -> Int[Tensor, " chosen"]:
    """Indices of the n largest values of each cell, sorted by cell and size."""
    order = value.sort(descending=True, stable=True).indices
    order = order[cell[order].sort(stable=True).indices]
    return order[_rank(cell[order]) < n]


def _rank(cell: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
    """Index of each row among the consecutive rows of its cell."""
    counts = cell.unique_consecutive(return_counts=True)[1]
    start = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return torch.arange(len(cell), device=cell.device) - start
