"""Effects of vectors added to the residual stream of one prompt, and predictions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_multilayer.evaluation.splicing import Splicer
from sae_lens_multilayer.hooks import block_end
from sae_lens_multilayer.models.model import Model
from sae_lens_multilayer.models.unembed import ModelUnembed
from sae_lens_multilayer.studies.interventions.edited_runs import kl_div
from sae_lens_multilayer.studies.interventions.runners import Additions, make_runner


@dataclass
class Effects:
    """Effects of each addition on what its position predicts, and on later layers."""

    kl: Float[Tensor, " edit"]
    """KL(clean ‖ edited), nats."""
    target: Float[Tensor, " edit"]
    """Change of the logit that is largest in the clean run."""
    norm: Float[Tensor, " edit"]
    """Of the change of all logits, less its mean."""
    top_ids: Int[Tensor, "edit top"]
    """Tokens with the largest changes, less the mean."""
    top_values: Float[Tensor, "edit top"]
    later: Float[Tensor, "edit layer d_in"]
    """Vectors at the position after the edit; NaN up to the edited layer."""


class PromptRuns:
    """Edited runs of one prompt; each is read at the position of its edit."""

    @torch.no_grad()
    def __init__(
        self,
        model: Model,
        splicer: Splicer,
        hook_names: Sequence[str],
        ids: Int[Tensor, "1 pos"],
        max_edits: int,
        positions: Int[Tensor, " edited"],
        unembed: ModelUnembed,
    ) -> None:
        """Run the prompt once, without edits.

        Args:
            positions: Those of all edits.
            unembed: `Model.unembed()`.
        """
        streams, logits = model.residual_streams(ids)
        ends = [block_end(name) for name in hook_names]
        depths = [layer + is_output for layer, is_output in filter(None, ends)]
        assert len(depths) == len(hook_names)  # checked by the study
        self.x: Float[Tensor, "layer pos d_in"]
        self.x = torch.stack([streams[depth][0].to(logits.device) for depth in depths])
        self.last: Float[Tensor, "pos d_model"] = streams[-1][0]
        """The residual stream after the last block."""
        self.logits: Float[Tensor, "pos d_vocab"] = logits[0]
        self.targets: Int[Tensor, " pos"] = self.logits.argmax(-1)
        """The most likely next token after each position."""
        self._max_edits = max_edits
        self._runner = make_runner(
            model, splicer, ids, depths, streams, logits, positions, unembed
        )

    @torch.no_grad()
    def effects(self, edits: Additions, n_top: int) -> Effects:
        """Run each edit; the runs share batches.

        Args:
            n_top: Number of logits to keep.
        """
        measure = partial(self._measure, n_top=n_top)
        return Effects(*self._in_parts(measure, edits))

    def _measure(self, part: Additions, n_top: int) -> tuple[Tensor, ...]:
        after, later = self._runner.run(part)
        before, after = self.logits[part.position].float(), after.float()
        kl, change = kl_div(before, after), after - before
        target = change.gather(1, self.targets[part.position].unsqueeze(1))[:, 0]
        change -= change.mean(1, keepdim=True)
        ids = change.abs().topk(min(n_top, change.shape[1])).indices
        return kl, target, change.norm(dim=1), ids, change.gather(1, ids), later

    def gradient_predictions(
        self, edits: Additions, n_steps: int
    ) -> Float[Tensor, "edit 2"]:
        """Change of each edit's target logit: dx times the gradient of the clean run,
        and integrated gradients along the edit.

        Args:
            n_steps: Equal steps, with the gradient at the middle of each.

        References:
            Sundararajan et al. (2017), arXiv:1703.01365.
        """
        steps = [(i + 0.5) / n_steps for i in range(n_steps)]
        points = torch.tensor([0.0, *steps]).to(edits.dx)
        dx = points.view(1, -1, 1) * edits.dx.unsqueeze(1)  # [edit, point, d_in]
        along = Additions(
            edits.layer.repeat_interleave(len(points)),
            edits.position.repeat_interleave(len(points)),
            dx.flatten(0, 1),
        )
        (gradients,) = self._in_parts(self._gradients, along)
        found = (gradients.view(dx.shape) * edits.dx.unsqueeze(1)).sum(-1)
        return torch.stack([found[:, 0], found[:, 1:].mean(1)], 1)

    @torch.enable_grad()
    def _gradients(self, part: Additions) -> tuple[Float[Tensor, "edit d_in"]]:
        """Of the target logit, by what is added."""
        dx = part.dx.detach().requires_grad_()
        targets = self.targets[part.position]
        logits = self._runner.token_logits(part._replace(dx=dx), targets)
        (gradient,) = torch.autograd.grad(logits.sum(), dx)
        return (gradient,)

    def _in_parts(
        self, function: Callable[[Additions], tuple[Tensor, ...]], edits: Additions
    ) -> list[Tensor]:
        """Results of a function for each edit, of about the same layer at a time."""
        order = edits.layer.argsort(stable=True)
        parts = [
            function(Additions(*(v[rows] for v in edits)))
            for rows in order.split(self._max_edits)
        ]
        back = order.argsort().to(self.x.device)
        return [torch.cat(column)[back] for column in zip(*parts, strict=True)]


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
