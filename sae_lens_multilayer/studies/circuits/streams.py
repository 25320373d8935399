"""The residual streams of a task, and the gradients of its metric.

Nothing here depends on an SAE. All nodes of a hooked layer are linear in its vectors
(see `nodes`), so the gradient by a node is that by the vector times the node's
direction, and the straight path of all nodes from their clean to their ablated values
is the straight path of the vectors. So the expensive part, integrated gradients, is
computed once for all SAEs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_multilayer.hooks import block_end
from sae_lens_multilayer.models.model import Model
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.studies.circuits.tasks import Task

Ablation = Literal["mean", "resample"]
"""Ablated values: the mean over all prompts of the task, clean and corrupted, at the
same position; or those of the paired corrupted prompt."""
Method = Literal["attribution_patching", "integrated_gradients"]
RunFrom = Callable[
    [str, Float[Tensor, "prompt pos d_in"]], Float[Tensor, "prompt d_vocab"]
]
"""Computes the logits at the last position from the vectors of the named hook."""


_ROWS = 1024
"""Positions of all prompts and steps that are run together with gradients."""


@dataclass
class Streams:
    """The vectors of each hook in the clean and the corrupted prompts."""

    clean: Float[Tensor, "layer prompt pos d_in"]
    corrupted: Float[Tensor, "layer prompt pos d_in"]

    def ablated(self, ablation: Ablation) -> Float[Tensor, "layer row pos d_in"]:
        """The vectors with every node ablated; one row for all prompts if "mean"."""
        check_choice("ablation", ablation, get_args(Ablation))
        if ablation == "resample":
            return self.corrupted
        return torch.cat([self.clean, self.corrupted], 1).mean(1, keepdim=True)

    @classmethod
    @torch.no_grad()
    def of(
        cls, lm: Model, task: Task, hook_names: Sequence[str], batch_size_prompts: int
    ) -> "Streams":
        """Run all prompts of a task."""
        found = [
            torch.cat(
                [
                    torch.stack([x.cpu() for x in lm.vectors(ids, hook_names)])
                    for ids in prompts.split(batch_size_prompts)
                ],
                1,
            )
            for prompts in (task.clean, task.corrupted)
        ]
        return cls(*found)


@dataclass
class Gradients(Result):
    """The gradient of a task's metric by the vectors of each hook."""

    hook_names: list[str]
    ablation: str
    method: str
    gradient: Float[Tensor, "layer prompt pos d_in"]

    def to_dataframe(self) -> pd.DataFrame:
        """Mean norm of the gradient at each layer and position, one row a layer."""
        norms = self.gradient.norm(dim=-1).mean(1)
        return pd.DataFrame(norms.numpy(), index=pd.Index(self.hook_names, name="hook"))


def gradients(
    lm: Model,
    task: Task,
    hook_names: Sequence[str],
    streams: Streams,
    *,
    ablation: Ablation = "mean",
    method: Method = "integrated_gradients",
    n_steps: int = 10,
    batch_size_prompts: int = 16,
) -> Gradients:
    """Gradients by the vectors of each hook, for the effects of its nodes.

    Attribution patching: at the clean vectors, from one run. Integrated gradients: the
    mean over `n_steps` midpoints of the straight path from the clean vectors of one
    hook, at all positions, to its ablated ones; other hooks follow from the run. Then
    the effects of all nodes of a hook add up to the change of the metric if all of them
    are ablated.

    References:
        Marks et al. (2024), arXiv:2403.19647, section 3.1, equations 2 and 3, with
        midpoints instead of left ends of the steps.
    """
    check_choice("method", method, get_args(Method))
    starts = range(0, len(task), batch_size_prompts)
    batches = [slice(start, start + batch_size_prompts) for start in starts]
    if method == "attribution_patching":
        parts = [_at_clean(lm, task, hook_names, batch) for batch in batches]
    else:
        paths = streams.clean, streams.ablated(ablation)
        parts = [
            _along_paths(lm, task, hook_names, paths, batch, n_steps)
            for batch in batches
        ]
    return Gradients(list(hook_names), ablation, method, torch.cat(parts, 1))


@torch.enable_grad()
def _at_clean(
    lm: Model, task: Task, hook_names: Sequence[str], batch: slice
) -> Float[Tensor, "layer prompt pos d_in"]:
    found: dict[str, Tensor] = {}

    def read(name: str, x: Tensor) -> Tensor:
        # Nothing before the first hook needs a gradient.
        found[name] = x if found else x.detach().requires_grad_()
        return found[name]

    hooks = {name: partial(read, name) for name in hook_names}
    logits = lm.logits_with_hooks(task.clean[batch], hooks)[:, -1]
    total = task.metric(logits, batch).sum()
    grads = torch.autograd.grad(total, [found[name] for name in hook_names])
    return torch.stack([grad.cpu() for grad in grads])


@torch.enable_grad()
def _along_paths(
    lm: Model,
    task: Task,
    hook_names: Sequence[str],
    paths: tuple[Tensor, Tensor],
    batch: slice,
    n_steps: int,
) -> Float[Tensor, "layer prompt pos d_in"]:
    ids = task.clean[batch]
    steps = [(step + 0.5) / n_steps for step in range(n_steps)]
    size = max(1, _ROWS // ids.numel())
    groups = [steps[start : start + size] for start in range(0, n_steps, size)]
    runs = {
        n: runs_from_hooks(lm, ids.repeat(n, 1), hook_names)
        for n in {len(group) for group in groups}
    }
    means: list[Tensor] = []
    for hook, name in enumerate(tqdm(hook_names, desc="Gradients", leave=False)):
        clean = paths[0][hook, batch]
        ablated = paths[1][hook].expand(len(task), -1, -1)[batch]
        total = torch.zeros_like(clean)
        for group in groups:
            x = torch.cat([torch.lerp(clean, ablated, step) for step in group])
            x = x.to(lm.device).requires_grad_()
            parts = runs[len(group)](name, x).split(len(clean))
            metric = sum(task.metric(logits, batch).sum() for logits in parts)
            grad = torch.autograd.grad(torch.as_tensor(metric), x)[0]
            total += grad.view(len(group), *clean.shape).sum(0).cpu()
        means.append(total / n_steps)
    return torch.stack(means)


def runs_from_hooks(
    lm: Model, ids: Int[Tensor, "prompt pos"], hook_names: Sequence[str]
) -> RunFrom:
    """How to run prompts from the vectors of any of these hooks on.

    From the middle if the model can, else in whole passes with a hook.
    """
    if lm.why_whole_passes(hook_names) is not None:

        def whole_pass(name: str, x: Tensor) -> Tensor:
            return lm.logits_with_hooks(ids, {name: lambda _: x})[:, -1]

        return whole_pass
    walk = lm.walk(ids)

    def from_middle(name: str, x: Tensor) -> Tensor:
        for block in range(depth_of(name), lm.shape.n_layers):
            x = walk.run_block(x, block)
        return walk.logits(x[:, -1:])[:, 0]

    return from_middle


def depth_of(hook_name: str) -> int:
    """Number of blocks before a hook of the residual stream."""
    end = block_end(hook_name)
    assert end is not None  # checked by `check_hooks`
    return end[0] + end[1]


def check_hooks(hook_names: Sequence[str]) -> None:
    """Raise ValueError if a hook is not the input or output of a block."""
    inside = [name for name in hook_names if block_end(name) is None]
    if inside:
        raise ValueError(
            "Circuits need hooks at the residual stream before or after blocks; got "
            f"{inside[:3]}."
        )


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Raise ValueError for a setting that is not one of the known values."""
    if value not in known:
        raise ValueError(f"`{name}` must be in {list(known)}; got {value!r}.")
