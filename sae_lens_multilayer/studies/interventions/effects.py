"""Effects of vectors added to the residual stream of one prompt, and predictions."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_multilayer.evaluation.splicing import Edit, Splicer
from sae_lens_multilayer.hooks import block_end
from sae_lens_multilayer.models.model import Model
from sae_lens_multilayer.studies.interventions.edited_runs import kl_div


@dataclass
class Additions:
    """Vectors that are added, each in its own run, at one layer and position."""

    layer: Int[Tensor, " edit"]
    """Index on the layer axis."""
    position: Int[Tensor, " edit"]
    dx: Float[Tensor, "edit d_in"]
    """In raw space."""

    def __len__(self) -> int:
        return len(self.layer)

    @classmethod
    def joined(cls, parts: "Sequence[Additions]") -> "Additions":
        """All additions of some parts, in order."""
        return cls(
            torch.cat([part.layer for part in parts]),
            torch.cat([part.position for part in parts]),
            torch.cat([part.dx for part in parts]),
        )

    def split(self, size: int) -> "list[Additions]":
        """Parts of at most this many."""
        parts = zip(
            self.layer.split(size),
            self.position.split(size),
            self.dx.split(size),
            strict=True,
        )
        return [Additions(*part) for part in parts]


@dataclass
class Effects:
    """Effects of each addition on what its position predicts, and on later layers."""

    kl: Float[Tensor, " edit"]
    """KL(clean ‖ edited), nats."""
    target: Float[Tensor, " edit"]
    """Change of the logit that is largest in the clean run."""
    logits: Float[Tensor, "edit d_vocab"]
    """Change of all logits, less its mean."""
    later: Float[Tensor, "edit layer d_in"]
    """Vectors at the position after the edit; NaN up to the edited layer."""


class PromptRuns:
    """Edited runs of one prompt."""

    @torch.no_grad()
    def __init__(
        self,
        model: Model,
        splicer: Splicer,
        hook_names: Sequence[str],
        ids: Int[Tensor, "1 pos"],
        max_edits: int,
    ) -> None:
        """Run the prompt once, without edits."""
        self._splicer, self._ids, self._max_edits = splicer, ids, max_edits
        streams, logits = model.residual_streams(ids)
        ends = [block_end(name) for name in hook_names]
        depths = [layer + is_output for layer, is_output in filter(None, ends)]
        assert len(depths) == len(hook_names)  # checked by the study
        self.x: Float[Tensor, "layer pos d_in"]
        self.x = torch.stack([streams[depth][0].to(logits.device) for depth in depths])
        self.last: Float[Tensor, "pos d_model"] = streams[-1][0]
        """The residual stream after the last block."""
        self.targets: Int[Tensor, " pos"] = logits[0].argmax(-1)
        """The most likely next token after each position."""

    @torch.no_grad()
    def effects(self, edits: Additions) -> Effects:
        """Run each edit; the runs share batches."""
        rows: list[Any] = []
        for part in edits.split(self._max_edits):
            later = torch.full((len(part), *self.x[:, 0].shape), torch.nan)
            later = later.to(self.x)
            runs = self._run(
                part, [self._edit(part, i, later) for i in range(len(part))]
            )
            rows += [(*row, later[i]) for i, row in enumerate(runs)]
        return Effects(*(torch.stack(parts) for parts in zip(*rows, strict=True)))

    def _run(
        self, part: Additions, edits: list[Edit]
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        clean_logits: dict[int, Tensor] = {}
        for clean, runs in self._splicer.runs(self._ids, edits):
            for i, run in runs.items():
                position = int(part.position[i])
                at = slice(position, position + 1)
                if position not in clean_logits:
                    clean_logits[position] = clean(at)[0, 0].float()
                before, after = clean_logits[position], run(at)[0, 0].float()
                change = after - before
                target = change[self.targets[position]]
                found[i] = kl_div(before, after), target, change - change.mean()
        return [found[i] for i in range(len(part))]

    def _edit(self, part: Additions, i: int, later: Tensor) -> Edit:
        """Add the vector, and keep what later hooks have at its position."""
        position, first = int(part.position[i]), int(part.layer[i])

        def read(hook: int, x: Tensor) -> Tensor:
            later[i, hook] = x[0, position]
            return x

        reads = {h: partial(read, h) for h in range(first + 1, len(self.x))}
        return {first: partial(_added, position, part.dx[i]), **reads}

    @torch.enable_grad()
    def gradient_predictions(self, edits: Additions) -> Float[Tensor, " edit"]:
        """Change of each edit's target logit as dx times the gradient of the clean run.

        All edits must be at one position, so that one run has all gradients.
        """
        position = int(edits.position[0])
        assert bool((edits.position == position).all())
        streams: dict[int, Tensor] = {}

        def keep(hook: int, x: Tensor) -> Tensor:
            is_leaf = hook == min(layers)
            streams[hook] = x.detach().requires_grad_() if is_leaf else x
            return streams[hook]

        layers = sorted(set(edits.layer.tolist()))
        edit: Edit = {hook: partial(keep, hook) for hook in layers}
        found = next(iter(self._splicer.runs(self._ids, [edit])))[1][0]
        at = slice(position, position + 1)
        target = found(at)[0, 0, self.targets[position]]
        gradients = torch.autograd.grad(target, [streams[hook] for hook in layers])
        by_layer = dict(zip(layers, gradients, strict=True))
        rows = [by_layer[int(layer)][0, position] for layer in edits.layer]
        return (torch.stack(rows) * edits.dx.to(rows[0])).sum(1).detach()

    def integrated_predictions(
        self, edits: Additions, n_steps: int
    ) -> Float[Tensor, " edit"]:
        """Change of the target logit by integrated gradients along each edit.

        Args:
            n_steps: Equal steps, with the gradient at the middle of each.

        References:
            Sundararajan et al. (2017), arXiv:1703.01365.
        """
        points = [(i + 0.5) / n_steps for i in range(n_steps)]
        size = max(1, self._max_edits // n_steps)
        parts = [self._gradients(part, points) for part in edits.split(size)]
        return torch.cat(parts)

    @torch.enable_grad()
    def _gradients(self, part: Additions, points: Sequence[float]) -> Tensor:
        order = [(i, point) for i in range(len(part)) for point in points]
        leaves: dict[int, Tensor] = {}

        def add(run: int, x: Tensor) -> Tensor:
            i, point = order[run]
            dx = point * part.dx[i]
            leaves[run] = _added(int(part.position[i]), dx, x.detach()).requires_grad_()
            return leaves[run]

        edits: list[Edit] = [
            {int(part.layer[i]): partial(add, run)} for run, (i, _) in enumerate(order)
        ]
        changes = part.dx.new_zeros(len(part))
        for _, runs in self._splicer.runs(self._ids, edits):
            total = torch.zeros((), device=self.x.device)
            for run, logits in runs.items():
                at = int(part.position[order[run][0]])
                total = total + logits(slice(at, at + 1))[0, 0, self.targets[at]]
            gradients = torch.autograd.grad(total, [leaves[run] for run in runs])
            for run, gradient in zip(runs, gradients, strict=True):
                i = order[run][0]
                changes[i] += gradient[0, int(part.position[i])] @ part.dx[i]
        return changes / len(points)


def _added(
    position: int, dx: Float[Tensor, " d_in"], x: Float[Tensor, "prompt pos d_in"]
) -> Float[Tensor, "prompt pos d_in"]:
    after = x.clone()
    after[:, position] += dx.to(x)
    return after


@torch.no_grad()
def direct_predictions(
    unembed: Any,
    last: Float[Tensor, "edit d_model"],
    dx: Float[Tensor, "edit d_model"],
    targets: Int[Tensor, " edit"],
) -> Float[Tensor, " edit"]:
    """Change of target logits if dx reaches the final norm as it is.

    The scale of the final norm stays that of the clean run, and a soft cap is left out.

    Args:
        unembed: `Model.unembed()`.
        last: The residual stream after the last block, of the clean run.
    """
    change = frozen_norm(unembed.final_norm, last, dx)
    return (change * unembed.unembedding.weight[targets]).sum(-1)


def frozen_norm(
    norm: Any, x: Float[Tensor, "row d_in"], dx: Float[Tensor, "row d_in"]
) -> Float[Tensor, "row d_in"]:
    """`norm(x + dx) - norm(x)` with the scale of x for both.

    For any norm `w (x - m) / s(x) + b`, with s the standard deviation or the root mean
    square, whichever `norm` divides by; and for no norm.
    """
    bias = norm(torch.zeros_like(x))
    if torch.allclose(norm(2 * x) - bias, 2 * (norm(x) - bias), rtol=1e-3):
        return norm(dx) - bias  # it does not scale
    is_centred = torch.allclose(norm(x + x.abs().mean()), norm(x), rtol=1e-3, atol=1e-4)
    scale, length = (
        (v - is_centred * v.mean(-1, keepdim=True)).norm(dim=-1, keepdim=True)
        for v in (x, dx)
    )
    # As long as x, so that the epsilon of the norm has the same part in both.
    same_length = dx * (scale / length.clamp(min=torch.finfo(dx.dtype).tiny))
    return (norm(same_length) - bias) * (length / scale)
