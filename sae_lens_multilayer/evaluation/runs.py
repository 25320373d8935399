"""The clean, spliced and ablated runs of an evaluation."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lens_multilayer.evaluation.encoder import LayerEncoder, ReconstructionSums
from sae_lens_multilayer.evaluation.metrics import SpliceMetrics
from sae_lens_multilayer.evaluation.scores import (
    RunSums,
    add_scores,
    add_shared_scores,
)
from sae_lens_multilayer.evaluation.splicing import Edit, ResidualSplicer, Splicer
from sae_lens_multilayer.models.model import Model
from sae_lens_multilayer.topk.tile import sum_dtype, wide_dtype


def mean_vectors(
    model: Model, hook_names: Sequence[str], batches: Sequence[Int[Tensor, "_ pos"]]
) -> list[Float[Tensor, " d_in"]]:
    """The mean vector of each hook over all positions of these batches."""
    dtype = sum_dtype(model.device)
    sums: list[Any] = [0.0] * len(hook_names)
    for batch in batches:
        for hook, x in enumerate(model.vectors(batch, hook_names)):
            sums[hook] = sums[hook] + x.flatten(0, 1).to(dtype).sum(0)
    n_tokens = sum(batch.numel() for batch in batches)
    return [total / n_tokens for total in sums]


class EvaluationRuns:
    """Runs a model clean, spliced and ablated, and adds up the scores of each run."""

    def __init__(
        self,
        model: Model,
        encoder: LayerEncoder,
        splicer: Splicer,
        together: Sequence[int],
        use_error_term: bool,
    ) -> None:
        """Start with no prompt; `together` has the indices of the hooks replaced."""
        self._model, self._hooks = model, encoder.hook_names
        n_hooks = len(self._hooks)
        self._splicer = splicer
        self._ablates_once = (
            isinstance(splicer, ResidualSplicer) and splicer.forgets_prompts
        )
        self._together = together
        self._use_error_term = use_error_term
        self.means: list[Tensor] | None = None
        """Replace the vectors of ablated hooks; None: zeros do."""
        self._reconstruction = ReconstructionSums(encoder)
        self._clean = RunSums()
        self._spliced = [RunSums(is_compared=True) for _ in range(n_hooks)]
        self._ablated = [RunSums() for _ in range(n_hooks)]
        self._joint = RunSums(is_compared=True)
        self._ablations: list[Edit] = [
            {hook: partial(self._ablate, hook)} for hook in range(n_hooks)
        ]

    def add(
        self,
        tokens: Int[Tensor, "prompt pos"],
        scored: Bool[Tensor, "prompt pos"],
        kept: Bool[Tensor, "prompt pos"],
    ) -> None:
        """Add the runs of a batch of prompts.

        Args:
            scored: Positions that count in cross-entropy and KL.
            kept: Positions that keep their vectors and do not count in the metrics of
                reconstruction.
        """
        n_hooks = len(self._spliced)
        self._reconstruction.start(lambda: self._model.vectors(tokens, self._hooks))
        edits: list[Edit] = [
            {hook: partial(self._splice, hook, kept, ~kept)} for hook in range(n_hooks)
        ]
        sums = [*self._spliced]
        if not self._ablates_once:
            edits += self._ablations
            sums += self._ablated
        if self._together:
            joint = {h: partial(self._splice, h, kept, None) for h in self._together}
            edits.append(joint)
            sums.append(self._joint)
        clean_sums = self._clean
        for clean, runs in self._splicer.runs(tokens, edits):
            by_run = {i: sums[i] for i in runs}
            add_scores(by_run, clean_sums, clean, runs, tokens, scored)
            clean_sums = None

    def add_ablations_without_prompts(
        self, tokens: Int[Tensor, "prompt pos"], scored: Bool[Tensor, "prompt pos"]
    ) -> None:
        """Add the ablated runs of all prompts from one run, where they are the same.

        Ablating the whole residual stream leaves nothing of a prompt, unless blocks
        read the tokens again.
        """
        if not self._ablates_once:
            return
        assert isinstance(self._splicer, ResidualSplicer)
        n_pos = tokens.shape[1]
        n_rows, run = self._splicer.runs_of_any_prompt(n_pos, self._ablations)
        add_shared_scores(self._ablated, run, n_rows, tokens, scored)

    def _splice(
        self,
        hook: int,
        kept: Bool[Tensor, "prompt pos"],
        counted: Bool[Tensor, "prompt pos"] | None,
        x: Float[Tensor, "prompt pos d_in"],
    ) -> Float[Tensor, "prompt pos d_in"]:
        x_hat = self._reconstruction.reconstruct(hook, x, counted)
        if self._use_error_term:
            # In float32 or wider: bfloat16 would not give x back.
            dtype = wide_dtype(x.dtype)
            x_hat = (x_hat.to(dtype) + (x.to(dtype) - x_hat.to(dtype))).to(x.dtype)
        return torch.where(kept.to(x.device).unsqueeze(-1), x, x_hat)

    def _ablate(
        self, hook: int, x: Float[Tensor, "prompt pos d_in"]
    ) -> Float[Tensor, "prompt pos d_in"]:
        if self.means is None:
            return torch.zeros_like(x)
        return self.means[hook].to(x.device, x.dtype).expand_as(x)

    def result(self) -> SpliceMetrics:
        """The metrics of all batches."""
        clean, joint = self._clean.ce_loss(), self._joint
        together = None
        if self._together:
            together = {
                "ce_loss_spliced": joint.ce_loss(),
                "delta_ce": joint.ce_loss() - clean,
                "kl_div": joint.kl_div(),
                "kl_div_reverse": joint.kl_div_reverse(),
            }
        return SpliceMetrics(
            **vars(self._reconstruction.compute()),
            ce_loss_clean=clean,
            ce_loss_spliced=_by_layer(sums.ce_loss() for sums in self._spliced),
            kl_div=_by_layer(sums.kl_div() for sums in self._spliced),
            kl_div_reverse=_by_layer(sums.kl_div_reverse() for sums in self._spliced),
            ce_loss_ablated=_by_layer(sums.ce_loss() for sums in self._ablated),
            together=together,
        )


def _by_layer(values: Iterable[float]) -> Float[Tensor, " layer"]:
    return torch.tensor(list(values), dtype=torch.float64)
