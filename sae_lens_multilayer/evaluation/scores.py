"""Cross-entropy and KL divergence of runs, as sums over chunks of positions."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lens_multilayer.evaluation.splicing import Run

_LOGITS_AT_A_TIME = 2**24
"""Logits of one run held at a time: 64 MiB of float32."""


@dataclass
class RunSums:
    """Sums over positions of one run, in nats."""

    is_compared: bool = False
    """Whether KL divergences from the clean run are taken."""
    ce: float = 0.0
    """Cross-entropy of the next token."""
    n_predicted: int = 0
    """Positions whose next token was scored."""
    kl: float = 0.0
    """KL(clean ‖ this run)."""
    kl_reverse: float = 0.0
    """KL(this run ‖ clean)."""
    n_compared: int = 0
    """Positions whose distribution was compared."""

    def add_ce(
        self,
        log_p: Float[Tensor, "run_prompt chunk d_vocab"],
        targets: Int[Tensor, "prompt next"],
        keep: Bool[Tensor, "prompt chunk"],
    ) -> None:
        """Add the cross-entropy of the next tokens; the last position has none."""
        n = targets.shape[1]
        log_p = log_p[:, :n].expand(len(targets), -1, -1)
        keep = keep[:, :n]
        chosen = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        self.ce -= chosen[keep].double().sum().item()
        self.n_predicted += int(keep.sum())

    def add_kl(
        self,
        p: Float[Tensor, "prompt chunk d_vocab"],
        log_p: Float[Tensor, "prompt chunk d_vocab"],
        log_q: Float[Tensor, "prompt chunk d_vocab"],
        keep: Bool[Tensor, "prompt chunk"],
    ) -> None:
        """Add both divergences; `log_q` is overwritten."""
        difference = log_p - log_q
        # In place for speed; `sum` adds up pairwise, which a product of matrices does
        # not, and would be off by 1e-4 over 50,000 tokens.
        kl_reverse = -log_q.exp_().mul_(difference).sum(-1)
        kl = difference.mul_(p).sum(-1)
        self.kl += kl[keep].double().sum().item()
        self.kl_reverse += kl_reverse[keep].double().sum().item()
        self.n_compared += int(keep.sum())

    def ce_loss(self) -> float:
        """Mean cross-entropy over predicted tokens, nats."""
        return self.ce / self.n_predicted

    def kl_div(self) -> float:
        """Mean KL divergence of the clean run from this one, nats per position."""
        return self.kl / self.n_compared

    def kl_div_reverse(self) -> float:
        """Mean KL divergence of this run from the clean one, nats per position."""
        return self.kl_reverse / self.n_compared


@torch.no_grad()
def add_scores(
    sums: Mapping[int, RunSums],
    clean_sums: RunSums | None,
    clean: Run,
    runs: Mapping[int, Run],
    tokens: Int[Tensor, "prompt pos"],
    scored: Bool[Tensor, "prompt pos"],
) -> None:
    """Add the scores of a batch of prompts, holding few logits at a time.

    Args:
        sums: Sums of each run of `runs`. A run may have one prompt for all of `tokens`.
        clean_sums: Sums of the clean run; None: it is not scored.
        scored: Positions that count.
    """
    first = clean(slice(0, 1))
    chunk = max(1, _LOGITS_AT_A_TIME // first.numel())
    tokens, scored = tokens.to(first.device), scored.to(first.device)
    for start in range(0, tokens.shape[1], chunk):
        positions = slice(start, start + chunk)
        targets = tokens[:, start + 1 : start + 1 + chunk]
        keep = scored[:, positions]
        log_p = clean(positions).float().log_softmax(-1)
        if clean_sums is not None:
            clean_sums.add_ce(log_p, targets, keep)
        p = log_p.exp()
        for i, run in runs.items():
            log_q = run(positions).float().log_softmax(-1)
            sums[i].add_ce(log_q, targets, keep)
            if sums[i].is_compared:
                sums[i].add_kl(p, log_p, log_q, keep)
