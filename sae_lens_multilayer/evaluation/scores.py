"""Cross-entropy and KL divergence of runs, as sums over chunks of positions."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lens_multilayer.evaluation.splicing import Run
from sae_lens_multilayer.topk.tile import sum_dtype, wide_dtype

_LOGITS_AT_A_TIME = 2**24
"""Logits of one run held at a time: 64 MiB of float32."""
_LOGITS_IN_CACHE = 2**16
"""Logits scored at a time on a CPU: 256 KiB of float32, which stay in its cache."""


@dataclass
class Scores:
    """Scores of some positions of a run, in nats, in float64 from float32 terms."""

    ce: Float[Tensor, " row"]
    """Cross-entropy of the next token."""
    kl: Float[Tensor, " row"] | None = None
    """KL(clean ‖ this run); None: not compared."""
    kl_reverse: Float[Tensor, " row"] | None = None
    """KL(this run ‖ clean)."""


@dataclass
class Softmax:
    """The next-token distribution at some positions: `weights / total`."""

    shifted: Float[Tensor, "row d_vocab"]
    """Logits minus the largest one of the position, in float32 or wider."""
    weights: Float[Tensor, "row d_vocab"]
    """exp(shifted)."""
    total: Float[Tensor, "row 1"]
    """Sum of the weights: added pairwise in float32 (off by 1e-7 over 50,000 tokens),
    then float64 for the logarithm."""

    @classmethod
    def of(cls, logits: Float[Tensor, "row d_vocab"]) -> "Softmax":
        """The distribution with these logits."""
        wide = logits.to(wide_dtype(logits.dtype))
        shifted = wide - wide.amax(-1, keepdim=True)
        weights = shifted.exp()
        return cls(shifted, weights, _sum(weights).unsqueeze(1))

    def cross_entropy(self, targets: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        """Of these tokens, nats."""
        chosen = self.shifted.gather(1, targets.long().unsqueeze(1))
        return (self.total.log() - chosen).squeeze(1)

    def split(self, n_rows: int) -> "list[Softmax]":
        """The distributions of so many rows at a time, without copies."""
        fields = (self.shifted, self.weights, self.total)
        parts = zip(*(tensor.split(n_rows) for tensor in fields), strict=True)
        return [Softmax(*part) for part in parts]


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

    def add(self, scores: Scores, has_next: Bool[Tensor, " row"]) -> None:
        """Add the scores of some positions; those without a next token have no CE."""
        self.ce += scores.ce[has_next].sum().item()
        self.n_predicted += int(has_next.sum())
        if scores.kl is not None and scores.kl_reverse is not None:
            self.kl += scores.kl.sum().item()
            self.kl_reverse += scores.kl_reverse.sum().item()
            self.n_compared += len(scores.kl)

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
        sums: Sums of each run of `runs`.
        clean_sums: Sums of the clean run; None: it is not scored.
        scored: Positions that count; only their logits are computed.
    """
    has_next = torch.ones_like(scored)
    has_next[:, -1] = False
    for rows in _chunks(clean, scored.flatten().nonzero().flatten()):
        targets, keep = tokens.roll(-1).flatten()[rows], has_next.flatten()[rows]
        of_clean = Softmax.of(clean(rows))
        targets, keep = (
            targets.to(of_clean.total.device),
            keep.to(of_clean.total.device),
        )
        if clean_sums is not None:
            clean_sums.add(Scores(of_clean.cross_entropy(targets)), keep)
        for i, run in runs.items():
            compared = of_clean if sums[i].is_compared else None
            sums[i].add(score(run(rows), targets, compared), keep)


@torch.no_grad()
def add_shared_scores(
    sums: Sequence[RunSums],
    run: Run,
    n_rows: int,
    tokens: Int[Tensor, "prompt pos"],
    scored: Bool[Tensor, "prompt pos"],
) -> None:
    """Add the cross-entropy of runs that are the same for all prompts.

    Args:
        sums: Sums of each run.
        run: All runs, one after the other, each of `n_rows` positions.
        n_rows: Positions of a run: as many as a prompt has, or 1 if they are alike.
    """
    prompt, position = scored[:, :-1].nonzero(as_tuple=True)
    targets, own_row = tokens[prompt, position + 1].long(), position % n_rows
    for rows in _chunks(run, torch.arange(len(sums) * n_rows), _LOGITS_AT_A_TIME // 4):
        softmax = Softmax.of(run(rows))
        log_total = softmax.total.log().squeeze(1)
        for i in range(int(rows[0]) // n_rows, int(rows[-1]) // n_rows + 1):
            at = own_row + i * n_rows - rows[0]
            is_here = (at >= 0) & (at < len(rows))
            row = at[is_here].to(log_total.device)
            target = targets[is_here].to(log_total.device)
            ce = log_total[row] - softmax.shifted[row, target]
            sums[i].ce += ce.sum().item()
            sums[i].n_predicted += len(ce)


def score(
    logits: Float[Tensor, "row d_vocab"],
    targets: Int[Tensor, " row"],
    clean: Softmax | None = None,
) -> Scores:
    """The scores of some positions; `score_reference` is the definition.

    On a CPU, few rows at a time, which stay in its cache through all steps.

    Args:
        targets: The next tokens.
        clean: The clean run's distributions; None: no KL.
    """
    n = len(logits)
    if logits.device.type == "cpu":
        n = max(1, _LOGITS_IN_CACHE // logits.shape[1])
    rows = zip(logits.split(n), targets.split(n), strict=True)
    if clean is None:
        return Scores(torch.cat([Softmax.of(x).cross_entropy(t) for x, t in rows]))
    pairs = zip(rows, clean.split(n), strict=True)
    parts = [_compare(Softmax.of(x), t, p) for (x, t), p in pairs]
    return Scores(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _compare(
    q: Softmax, targets: Int[Tensor, " row"], p: Softmax
) -> tuple[Float[Tensor, " row"], ...]:
    """Cross-entropy, KL(p ‖ q) and KL(q ‖ p); `q` is overwritten."""
    ce = q.cross_entropy(targets)
    log_ratio = (q.total.log() - p.total.log()).squeeze(1)
    difference = q.shifted.sub_(p.shifted)  # log q - log p + log_ratio
    kl_reverse = _sum(q.weights.mul_(difference)) / q.total.squeeze(1) - log_ratio
    kl = log_ratio - _sum(difference.mul_(p.weights)) / p.total.squeeze(1)
    return ce, kl, kl_reverse


def score_reference(
    logits: Float[Tensor, "row d_vocab"],
    targets: Int[Tensor, " row"],
    clean_logits: Float[Tensor, "row d_vocab"],
) -> Scores:
    """`score` from its definition, in float64."""
    log_q = logits.double().log_softmax(-1)
    log_p = clean_logits.double().log_softmax(-1)
    return Scores(
        torch.nn.functional.nll_loss(log_q, targets, reduction="none"),
        (log_p.exp() * (log_p - log_q)).sum(-1),
        (log_q.exp() * (log_q - log_p)).sum(-1),
    )


def _chunks(
    run: Run, rows: Int[Tensor, " row"], n_logits: int = _LOGITS_AT_A_TIME
) -> Iterator[Int[Tensor, " row"]]:
    """Split rows so that few logits are held at a time."""
    if len(rows) > 0:
        d_vocab = run(rows[:1]).shape[-1]
        yield from rows.split(max(1, n_logits // d_vocab))


def _sum(x: Float[Tensor, "row d_vocab"]) -> Float[Tensor, " row"]:
    # Not a product of matrices, which does not add up pairwise and would be off by 1e-4
    # over 50,000 tokens. Float64 inside the sum would take 1.7 times as long.
    return x.sum(-1).to(sum_dtype(x.device))
