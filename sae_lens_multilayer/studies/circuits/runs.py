"""Runs of a task with all nodes outside a circuit ablated, many circuits at once."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_lens_multilayer.evaluation.edits import out_of_lens
from sae_lens_multilayer.evaluation.splicing import Edit, make_splicer
from sae_lens_multilayer.models.model import Model
from sae_lens_multilayer.studies.circuits.nodes import (
    LayerNodes,
    SparseLatents,
    encode,
)
from sae_lens_multilayer.studies.circuits.tasks import Task


@torch.no_grad()
def run_circuits(
    lm: Model,
    sae: Any,
    task: Task,
    nodes: Sequence[LayerNodes],
    keep: Bool[Tensor, "circuit node"],
    *,
    batch_size_prompts: int = 16,
    max_prompts: int = 256,
) -> tuple[Float[Tensor, "circuit prompt"], Float[Tensor, " prompt"]]:
    """The metric of each circuit, and that of the model without edits.

    At each hook, in order, the vectors of the run are split into nodes; those of the
    circuit keep the values of the run, which follow from what earlier layers let
    through, and all others get their ablated values. A circuit of all nodes leaves
    every vector as it is, and one without nodes gives exactly the ablated vectors.

    Args:
        keep: The nodes of each circuit, those of all hooks in order.
        max_prompts: Most prompts in one call of a block.
    """
    names = [layer.hook for layer in nodes]
    splicer = make_splicer(lm, names, max_prompts, None)
    sizes = [len(layer.effect) for layer in nodes]
    by_layer = zip(nodes, keep.split(sizes, 1), strict=True)
    masks = [layer.masks(part, len(task.classes)) for layer, part in by_layer]
    scores = torch.zeros(len(keep), len(task), dtype=torch.float64)
    full = torch.zeros(len(task), dtype=torch.float64)
    for start in range(0, len(task), batch_size_prompts):
        batch = slice(start, min(start + batch_size_prompts, len(task)))
        layers = [_LayerEdit(sae, layer, task, batch) for layer in nodes]
        edits: list[Edit] = [
            {i: partial(edit, masks[i][c]) for i, edit in enumerate(layers)}
            for c in range(len(keep))
        ]
        last = slice(-1, None)
        for clean, runs in splicer.runs(task.clean[batch], edits):
            full[batch] = task.metric(clean(last)[:, 0], batch).double().cpu()
            for c, run in runs.items():
                scores[c, batch] = task.metric(run(last)[:, 0], batch).double().cpu()
    return scores, full


class _LayerEdit:
    """Ablates all nodes of one hook outside a circuit, for a batch of prompts."""

    def __init__(self, sae: Any, nodes: LayerNodes, task: Task, prompts: slice) -> None:
        self._sae, self._nodes = sae, nodes
        # Positions whose class has no node at this layer keep their vectors.
        class_of = task.class_of.to(nodes.node_class.device)
        self._positions = torch.isin(class_of, nodes.node_class).nonzero()[:, 0]
        self._class_of = class_of[self._positions]
        self._ablated = nodes.ablated_values(prompts)[:, self._positions]
        self._x_ablated = nodes.vectors(prompts)[:, self._positions]

    def __call__(
        self, mask: Bool[Tensor, "class column"], x: Float[Tensor, "prompt pos d_in"]
    ) -> Float[Tensor, "prompt pos d_in"]:
        if not len(self._positions):
            return x
        after, at = x.clone(), self._positions.to(x.device)
        rows = x[:, at].to(self._x_ablated)
        after[:, at] = self._edited(mask[self._class_of], rows).to(x)
        return after

    def _edited(
        self,
        mask: Bool[Tensor, "pos column"],
        x: Float[Tensor, "prompt pos d_in"],
    ) -> Float[Tensor, "prompt pos d_in"]:
        """Where the error is kept, x plus what ablating latents changes; elsewhere the
        ablated vector plus what keeping latents changes."""
        sae, nodes, n = self._sae, self._nodes, len(self._nodes.latents)
        found = encode(sae, x, nodes.hook)
        keeps_error = mask[:, n : n + 1]  # [pos, 1]
        at = torch.arange(len(mask), device=x.device).view(1, -1, 1)
        kept = mask[at, nodes.column_of[found.indices]]  # [prompt, pos, k]
        values = torch.where(keeps_error, -found.values * ~kept, found.values * kept)
        of_run = SparseLatents(values, found.indices).decoded(sae.W_dec)
        is_kept = mask[:, :n]
        ablated = torch.where(
            keeps_error, self._ablated * ~is_kept, -self._ablated * is_kept
        )
        change = out_of_lens(sae, of_run, nodes.hook) + ablated @ nodes.directions
        return torch.where(keeps_error, x, self._x_ablated) + change
