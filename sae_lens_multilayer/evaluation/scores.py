"""Cross-entropy and KL divergence of edited runs, as sums taken piece by piece."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lens_multilayer.evaluation.splicing import Run

_LOGITS_AT_A_TIME = 2**24
"""Logits of one run held at a time: 64 MiB of float32."""


@dataclass
class CrossEntropySums:
    """Sums over positions of one kind of run, in nats."""

    ce: float = 0.0
    """Cross-entropy of the next token."""
    n_predicted: int = 0
    """Positions whose next token was scored."""

    def ce_loss(self) -> float:
        """Mean cross-entropy over predicted tokens, nats."""
        return self.ce / self.n_predicted


@dataclass
class RunSums(CrossEntropySums):
    """The same, of runs whose distributions are compared with the clean run's."""

    kl: float = 0.0
    """KL(clean ‖ this run)."""
    kl_reverse: float = 0.0
    """KL(this run ‖ clean)."""
    n_positions: int = 0
    """Positions whose distribution was compared."""

    def kl_div(self) -> float:
        """Mean KL divergence of the clean run from this one, nats per position."""
        return self.kl / self.n_positions

    def kl_div_reverse(self) -> float:
        """Mean KL divergence the other way round, nats per position."""
        return self.kl_reverse / self.n_positions


@torch.no_grad()
def add_scores(
    sums: Mapping[int, CrossEntropySums],
    clean_sums: CrossEntropySums | None,
    clean: Run,
    runs: Mapping[int, Run],
    tokens: Int[Tensor, "prompt pos"],
    scored: Bool[Tensor, "prompt pos"],
) -> None:
    """Add the scores of a batch of prompts, holding few logits at a time.

    Runs of one prompt that are not compared with the clean one may stand for all.

    Args:
        sums: Sums of each run of `runs`, added to; KL of those that are `RunSums`.
        clean_sums: Sums of the clean run, added to; None if it is counted elsewhere.
        scored: Positions that count.
    """
    first = clean.logits(slice(0, 1))
    chunk = max(1, _LOGITS_AT_A_TIME // first.numel())
    tokens, scored = tokens.to(first.device), scored.to(first.device)
    for start in range(0, tokens.shape[1], chunk):
        piece = _Piece(tokens, scored, slice(start, start + chunk))
        log_p = clean.logits(piece.positions).float().log_softmax(-1)
        if clean_sums is not None:
            piece.add_ce(clean_sums, log_p)
        p = log_p.exp()
        for i, run in runs.items():
            log_q = run.logits(piece.positions).float().log_softmax(-1)
            own = sums[i]
            piece.add_ce(own, log_q)
            if isinstance(own, RunSums):
                piece.add_kl(own, p, log_p, log_q)


@dataclass
class _Piece:
    """Some positions of a batch of prompts."""

    tokens: Int[Tensor, "prompt pos"]
    scored: Bool[Tensor, "prompt pos"]
    positions: slice

    def add_ce(
        self,
        sums: CrossEntropySums,
        log_p: Float[Tensor, "run_prompt chunk d_vocab"],
    ) -> None:
        start, stop = self.positions.start, self.positions.stop
        targets = self.tokens[:, start + 1 : stop + 1].unsqueeze(-1)
        n = targets.shape[1]
        log_p = log_p[:, :n].expand(len(targets), -1, -1)
        keep = self.scored[:, self.positions][:, :n]
        sums.ce -= log_p.gather(-1, targets).squeeze(-1)[keep].double().sum().item()
        sums.n_predicted += int(keep.sum())

    def add_kl(
        self,
        sums: RunSums,
        p: Float[Tensor, "prompt chunk d_vocab"],
        log_p: Float[Tensor, "prompt chunk d_vocab"],
        log_q: Float[Tensor, "prompt chunk d_vocab"],
    ) -> None:
        """Add both divergences; `log_q` is overwritten."""
        keep = self.scored[:, self.positions]
        difference = log_p - log_q
        # In place for speed; `sum` adds up pairwise, which a product of matrices does
        # not, and would be off by 1e-4 over 50,000 tokens.
        kl_reverse = -log_q.exp_().mul_(difference).sum(-1)
        kl = difference.mul_(p).sum(-1)
        sums.kl += kl[keep].double().sum().item()
        sums.kl_reverse += kl_reverse[keep].double().sum().item()
        sums.n_positions += int(keep.sum())
