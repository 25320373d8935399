"""Finds the tokens at which each latent is most active at each layer, and samples."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor
from typing_extensions import override

from sae_lens_multilayer.analysis.active import (
    ActiveLatents,
    check_latents,
    sums_device,
)
from sae_lens_multilayer.analysis.batch import TokenBatch
from sae_lens_multilayer.analysis.examples import OUTSIDE, Examples
from sae_lens_multilayer.analysis.sampling import uniform_hash
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
    layer_acts: Float[Tensor, "row layer"]

    @classmethod
    def empty(cls, n: int, width: int, n_layers: int) -> "_Rows":
        cell, prompt, position = (torch.empty(n, dtype=torch.int64) for _ in range(3))
        ids = torch.empty(n, width, dtype=torch.int32)
        act = torch.empty(n, dtype=torch.float64)
        acts = torch.empty(n, width), torch.empty(n, n_layers)
        return cls(cell, act, prompt, position, ids, *acts)

    def take(self, rows: Tensor | slice) -> "_Rows":
        return _Rows(*(tensor[rows] for tensor in self))

    def write(self, start: int, rows: "_Rows") -> None:
        for own, new in zip(self, rows, strict=True):
            own[start : start + len(new)] = new


class ExampleCollector:
    """Keeps the largest activations of each latent at each layer, exactly.

    Memory: `n_examples` rows of `32 + 8 * width + 4 * n_layers` bytes for each latent
    and layer that was active, as many rows that are not compared yet, and a copy while
    they are.

    Args:
        n_examples: Examples to keep for each latent and layer.
        n_before: Tokens of the context before the example.
        n_after: Tokens of the context after it.
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
        # A score must be larger than this for an activation to become an example.
        cells = torch.arange(len(self._hook_names) * self._d_sae)
        n_groups = int(self._groups(cells).max()) + 1
        floor = torch.zeros(n_groups // self._d_sae, self._d_sae, dtype=torch.float64)
        if latents is not None:
            check_latents(latents, self._d_sae)
            floor.fill_(torch.inf)[:, list(latents)] = 0
        self._floor = floor.to(sums_device(sae)).flatten()
        # The tensors are allocated as a whole: many small ones would fragment memory.
        self._sizes = n_before + 1 + n_after, len(self._hook_names)
        self._table = _Rows.empty(_FEWEST_ROWS, *self._sizes)
        self._n_rows = self.n_tokens = 0

    def _groups(self, cell: Int[Tensor, " act"]) -> Int[Tensor, " act"]:
        """The group in which each activation competes."""
        return cell

    def _scores(
        self,
        cell: Int[Tensor, " act"],
        value: Float[Tensor, " act"],
        prompt: Int[Tensor, " act"],
        position: Int[Tensor, " act"],
    ) -> Float[Tensor, " act"]:
        """Scores above 0; the largest of each group are kept."""
        del cell, prompt, position
        return value

    def update(self, batch: TokenBatch) -> None:
        active = batch.active
        self.n_tokens += active.n_tokens
        # Sorted by cell, then by token.
        cell, order = active.cell.sort(stable=True)
        value, token = active.value[order], active.token[order].cpu()
        prompt, position = batch.prompt[token], batch.position[token]
        score = self._scores(cell, value, prompt + batch.first_prompt, position)
        group = self._groups(cell)
        found = (score > self._floor[group]).nonzero().squeeze(1)
        found = found[_largest(group[found], score[found], self._n_examples)]
        if not len(found):
            return
        layer_acts = _layer_acts(active, order[found]).cpu()
        cell, value, found = cell.cpu(), value.cpu(), found.cpu()
        rows = _Rows(
            cell[found],
            value[found],
            prompt[found] + batch.first_prompt,
            position[found],
            self._context_ids(batch.prompts, prompt[found], position[found]),
            self._context_acts(cell, value, prompt, position, found),
            layer_acts,
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
                self._table = _Rows.empty(2 * (self._n_rows + n), *self._sizes)
                self._table.write(0, kept)
        self._table.write(self._n_rows, rows)
        self._n_rows += n

    def _prune(self) -> _Rows:
        """Keep the largest of each group, and raise the floor of groups with all.

        Returns:
            The examples so far, sorted by group and score; of equal ones, the first.
        """
        rows = self._table.take(slice(self._n_rows))
        score = self._scores(*rows[:4])
        chosen = _largest(self._groups(rows.cell), score, self._n_examples)
        kept, score = rows.take(chosen), score[chosen]
        self._table.write(0, kept)
        self._n_rows = len(kept.cell)
        groups, counts = self._groups(kept.cell).unique_consecutive(return_counts=True)
        full = counts == self._n_examples
        smallest = score[counts.cumsum(0) - 1]
        device = self._floor.device
        self._floor[groups[full].to(device)] = smallest[full].to(device)
        return kept

    def compute(self) -> Examples:
        rows = self._prune()
        if not self._n_rows:
            raise ValueError(
                f"None of the latents is active at any of the {self.n_tokens} tokens. "
                "Choose other latents, or give more tokens."
            )
        rows = rows.take(_largest(rows.cell, rows.act, self._n_rows))
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


class SampleCollector(ExampleCollector):
    """Keeps a random sample of the activations of each latent, over all layers.

    Each activation of a latent has the same probability. The sample depends on the
    tokens alone, not on batches.

    Args:
        n_examples: Activations to keep for each latent; all, if there are fewer.
        n_before, n_after, latents: See `ExampleCollector`.
    """

    @override
    def _groups(self, cell: Tensor) -> Tensor:
        return cell % self._d_sae

    @override
    def _scores(
        self, cell: Tensor, value: Tensor, prompt: Tensor, position: Tensor
    ) -> Tensor:
        keys = (key.to(cell.device) for key in (prompt, position, cell))
        return uniform_hash(*keys).to(value.dtype)


max_activating_examples = single_analysis(ExampleCollector)
"""The largest activations of each latent at each layer, with their contexts."""

sampled_examples = single_analysis(SampleCollector)
"""A random sample of the activations of each latent, with their contexts."""


def _layer_acts(
    active: ActiveLatents, chosen: Int[Tensor, " row"]
) -> Float[Tensor, "row layer"]:
    """All layers' activations of the latent and token of each chosen activation."""
    pair = active.by_token.pair
    pairs, row = pair[chosen].unique(return_inverse=True)
    slot = pair.new_full((len(active.by_token.token),), -1)
    slot[pairs] = torch.arange(len(pairs), device=pair.device)
    slot = slot[pair]
    acts = torch.zeros(len(pairs), active.n_layers, device=pair.device)
    of_chosen = slot >= 0
    cells = slot[of_chosen], active.layer[of_chosen]
    acts[cells] = active.value[of_chosen].float()
    return acts[row]


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
