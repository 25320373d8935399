"""Nodes of circuits: latents at layers and classes of positions, and errors.

A vector x of hook l, with T_l the SAE's lens (affine, A_l its matrix) and std that of
T_l(x), is split exactly:

    x = sum_j v_j A_l^-1 W_dec[j] + r,    v_j = a_j std

v_j is the activation of latent j in units of the vector's own length, and the remainder
r has everything else: the reconstruction error, and what the SAE's biases and the
vector's mean and std give. A node is a latent at a layer and a class of positions, or r
there (an error node). The split is linear in v and r, so ablating all nodes of a layer
gives the ablated vector, and nothing of the prompt remains.

Effects. The indirect effect of a node is the change of the metric if the node has its
ablated value at all positions of its class, and everything after it follows from the
run. Later layers are split as well, but as all their nodes have the values of that run,
their split is the identity: gradients pass through it as through the model itself. This
is what Marks et al. (2024, arXiv:2403.19647) do: their code gives the SAE's input the
gradient of the sum of reconstruction and error, and none through the error itself,
which would count the path around the SAE twice. So no effect depends on which other
layers are split.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lens_multilayer.evaluation.edits import out_of_lens
from sae_lens_multilayer.evaluation.encoder import is_multi_layer
from sae_lens_multilayer.studies.circuits.streams import Ablation, Gradients, Streams
from sae_lens_multilayer.studies.circuits.tasks import Task
from sae_lens_multilayer.topk.products import weighted_row_sum

ERROR = -1
"""In place of a latent: the node is an error."""
_SAME = 1e-4
"""Vectors that differ by less than this part of their norm are the same."""


@dataclass
class SparseLatents:
    """The k active latents of each vector."""

    values: Float[Tensor, "*batch k"]
    """v: activations times the standard deviation of the vector."""
    indices: Int[Tensor, "*batch k"]

    def __getitem__(self, chosen: slice) -> "SparseLatents":
        return SparseLatents(self.values[chosen], self.indices[chosen])

    def columns(
        self, column_of: Int[Tensor, " d_sae"], n_columns: int
    ) -> Float[Tensor, "*batch column"]:
        """Dense values of the latents that have a column below `n_columns`."""
        shape = (*self.values.shape[:-1], int(column_of.max()) + 1)
        dense = self.values.new_zeros(shape)
        dense.scatter_add_(-1, column_of[self.indices], self.values)
        return dense[..., :n_columns]

    def decoded(self, W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "*batch d"]:
        """`sum_j v_j W_dec[j]`."""
        k = self.values.shape[-1]
        values, indices = self.values.reshape(-1, k), self.indices.reshape(-1, k)
        flat = weighted_row_sum(values.contiguous(), indices.contiguous(), W_dec)
        return flat.view(*self.values.shape[:-1], -1)


@torch.no_grad()
def encode(sae: Any, x: Float[Tensor, "*batch d_in"], hook: str) -> SparseLatents:
    """The latents of vectors of one hook."""
    acts = sae.encode_topk(x.to(sae.device, sae.dtype), hook)
    return SparseLatents(acts.values * acts.std, acts.indices)


@dataclass
class LayerNodes:
    """The nodes of one hook.

    Columns are the latents that are active in some prompt, then one for the error, then
    one for all other latents, which are never in a circuit and have ablated value 0.
    """

    hook: str
    latents: Int[Tensor, " latent"]
    """In ascending order."""
    column_of: Int[Tensor, " d_sae"]
    """The column of each latent of the SAE."""
    directions: Float[Tensor, "latent d_in"]
    """`A^-1 W_dec[j]`: raw vectors of the latents."""
    ablated: SparseLatents | Float[Tensor, "1 pos latent"]
    """Ablated values, of each prompt or of all."""
    x_ablated: Float[Tensor, "row pos d_in"]
    """The vectors with every node ablated."""
    node_class: Int[Tensor, " node"]
    node_column: Int[Tensor, " node"]
    effect: Float[Tensor, " node"]
    """Indirect effect on the metric, mean over prompts, nats."""

    @property
    def node_latent(self) -> Int[Tensor, " node"]:
        """The latent of each node; `ERROR`."""
        error = self.latents.new_tensor([ERROR])
        return torch.cat([self.latents, error])[self.node_column]

    def ablated_values(self, prompts: slice) -> Float[Tensor, "row pos latent"]:
        """Ablated values of some prompts, or of all in one row."""
        if isinstance(self.ablated, SparseLatents):
            return self.ablated[prompts].columns(self.column_of, len(self.latents))
        return self.ablated

    def vectors(self, prompts: slice) -> Float[Tensor, "row pos d_in"]:
        """`x_ablated` of some prompts, or of all in one row."""
        return self.x_ablated if len(self.x_ablated) == 1 else self.x_ablated[prompts]

    def masks(
        self, keep: Bool[Tensor, "circuit node"], n_classes: int
    ) -> Bool[Tensor, "circuit class column"]:
        """Which columns of each class circuits keep."""
        shape = len(keep), n_classes, len(self.latents) + 2
        masks = torch.zeros(shape, dtype=torch.bool, device=self.latents.device)
        masks[:, self.node_class, self.node_column] = keep.to(masks.device)
        return masks


@torch.no_grad()
def find_nodes(
    sae: Any,
    task: Task,
    streams: Streams,
    gradients: Gradients,
    ablation: Ablation,
    batch_size_prompts: int = 16,
) -> list[LayerNodes]:
    """The nodes of each hook with their effects.

    A class has nodes at a layer if the vectors of the clean prompts differ from the
    ablated ones at one of its positions; each latent that is active there, clean or
    ablated, is a node, and so is the error.

    Args:
        sae: A multi-layer SAE, with or without a lens.
    """
    check_sae(sae, gradients.hook_names)
    x_ablated = streams.ablated(ablation)
    return [
        _Layer(sae, name, task, batch_size_prompts).nodes(
            streams.clean[i], streams.corrupted[i], x_ablated[i], gradients.gradient[i]
        )
        for i, name in enumerate(gradients.hook_names)
    ]


class _Layer:
    """Finds the nodes of one hook."""

    def __init__(self, sae: Any, hook: str, task: Task, batch_size: int) -> None:
        self._sae, self._hook, self._task = sae, hook, task
        starts = range(0, len(task), batch_size)
        self._batches = [slice(start, start + batch_size) for start in starts]

    def nodes(
        self,
        clean: Float[Tensor, "prompt pos d_in"],
        corrupted: Float[Tensor, "prompt pos d_in"],
        x_ablated: Float[Tensor, "row pos d_in"],
        gradient: Float[Tensor, "prompt pos d_in"],
    ) -> LayerNodes:
        sae = self._sae
        clean, corrupted, x_ablated, gradient = (
            x.to(sae.device, sae.dtype) for x in (clean, corrupted, x_ablated, gradient)
        )
        own, other = (self._encode(x) for x in (clean, corrupted))
        active = [one.indices[one.values > 0] for one in (own, other)]
        latents = torch.cat(active).unique()
        n = len(latents)
        column_of = torch.full((sae.cfg.d_sae,), n + 1, device=sae.device)
        column_of[latents] = torch.arange(n, device=sae.device)
        found = LayerNodes(
            hook=self._hook,
            latents=latents,
            column_of=column_of,
            directions=out_of_lens(sae, sae.W_dec[latents], self._hook),
            ablated=other,
            x_ablated=x_ablated,
            node_class=latents[:0],
            node_column=latents[:0],
            effect=clean.new_zeros(0),
        )
        if len(x_ablated) == 1:
            sums = [
                one[batch].columns(column_of, n).sum(0, keepdim=True)
                for one in (own, other)
                for batch in self._batches
            ]
            found.ablated = torch.stack(sums).sum(0) / (2 * len(clean))
        self._add_effects(found, own, clean, gradient)
        return found

    def _encode(self, x: Float[Tensor, "prompt pos d_in"]) -> SparseLatents:
        parts = [encode(self._sae, x[batch], self._hook) for batch in self._batches]
        values = torch.cat([part.values for part in parts])
        return SparseLatents(values, torch.cat([part.indices for part in parts]))

    def _add_effects(
        self,
        found: LayerNodes,
        own: SparseLatents,
        clean: Float[Tensor, "prompt pos d_in"],
        gradient: Float[Tensor, "prompt pos d_in"],
    ) -> None:
        n, class_of = len(found.latents), self._task.class_of.to(clean.device)
        n_classes = len(self._task.classes)
        effects = clean.new_zeros(n_classes, n + 1)
        exists = torch.zeros_like(effects, dtype=torch.bool)
        for batch in self._batches:
            x, grad = clean[batch], gradient[batch]
            values = own[batch].columns(found.column_of, n)
            ablated = found.ablated_values(batch)
            effect = node_effects(found, values, ablated, x, grad, batch)
            effects.index_add_(0, class_of, effect.sum(0))
            is_active = ((values != 0) | (ablated != 0)).any(0)
            moved = (x - found.vectors(batch)).norm(dim=-1) > _SAME * x.norm(dim=-1)
            here = torch.cat([is_active, is_active.new_ones(len(class_of), 1)], 1)
            here &= moved.any(0).unsqueeze(1)
            exists |= _any_by_class(here, class_of, n_classes)
        found.node_class, found.node_column = exists.nonzero(as_tuple=True)
        found.effect = effects[found.node_class, found.node_column] / len(clean)


def _any_by_class(
    here: Bool[Tensor, "pos column"], class_of: Int[Tensor, " pos"], n_classes: int
) -> Bool[Tensor, "class column"]:
    counts = class_of.new_zeros(n_classes, here.shape[1])
    return counts.index_add_(0, class_of, here.long()) > 0


def node_effects(
    nodes: LayerNodes,
    values: Float[Tensor, "prompt pos latent"],
    ablated: Float[Tensor, "row pos latent"],
    x: Float[Tensor, "prompt pos d_in"],
    gradient: Float[Tensor, "prompt pos d_in"],
    prompts: slice,
) -> Float[Tensor, "prompt pos column"]:
    """`(ablated - clean) . gradient` of each latent and of the error, to first order.

    Args:
        values: v of the latents in the clean prompts.
    """
    of_latents = (ablated - values) * (gradient @ nodes.directions.T)
    change = nodes.vectors(prompts) - x - (ablated - values) @ nodes.directions
    of_error = (change * gradient).sum(-1, keepdim=True)
    return torch.cat([of_latents, of_error], -1)


def check_sae(sae: Any, hook_names: Sequence[str]) -> None:
    """Raise ValueError unless the SAE is multi-layer and has these hooks."""
    if not is_multi_layer(sae):
        raise ValueError(
            "Circuits need a multi-layer SAE, with the same latents at all layers; got "
            f"{type(sae).__name__}."
        )
    own = sae.cfg.metadata.hook_names or []
    if missing := [name for name in hook_names if name not in own]:
        raise ValueError(
            f"The SAE must have the hooks of the circuit; it lacks {missing[:3]} and "
            f"has {list(own)[:3]} ... Give `layers` that all SAEs have."
        )
