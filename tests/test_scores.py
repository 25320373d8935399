"""Reference: the definitions in float64, by `log_softmax`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_lens_multilayer.evaluation.scores import (
    RunSums,
    Softmax,
    add_scores,
    add_shared_scores,
    score,
    score_reference,
)


def assert_scores_match(logits, clean, tolerance):
    targets = torch.randint(logits.shape[1], (len(logits),))
    found = score(logits, targets, Softmax.of(clean))
    expected = score_reference(logits, targets, clean)
    for name, values in vars(found).items():
        torch.testing.assert_close(
            values, getattr(expected, name), atol=tolerance, rtol=tolerance, msg=name
        )


@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 300))
def test_scores_are_those_of_the_definition(seed, n_rows, d_vocab):
    generator = torch.Generator().manual_seed(seed)
    kind = {"generator": generator, "dtype": torch.float64}
    scale, shift = 10 * torch.rand(2, **kind)
    clean = scale * torch.randn(n_rows, d_vocab, **kind)
    logits = clean + torch.randn(n_rows, d_vocab, **kind) + 100 * shift
    assert_scores_match(logits, clean, 1e-11)
    assert_scores_match(logits.float(), clean.float(), 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("change", [0.0, 1e-2, 1.0, 30.0])
def test_scores_over_a_large_vocabulary(dtype, change):
    # Sums over so many float32 numbers lose what they may.
    clean = 6 * torch.randn(3, 50_000)
    logits = clean + change * torch.randn_like(clean)
    assert_scores_match(logits.to(dtype), clean.to(dtype), 2e-6)


@given(st.integers(0, 2**32))
def test_sums_are_over_the_scored_positions(seed):
    torch.manual_seed(seed)
    tokens, scored = torch.randint(11, (4, 6)), torch.rand(4, 6) < 0.6
    scored[0, 0] = True
    clean, logits = torch.randn(2, 4, 6, 11, dtype=torch.float64)
    sums, clean_sums = RunSums(is_compared=True), RunSums()
    runs = [lambda rows, x=x: x.flatten(0, 1)[rows] for x in (clean, logits)]
    add_scores({3: sums}, clean_sums, runs[0], {3: runs[1]}, tokens, scored)
    log_p, log_q = clean.log_softmax(-1), logits.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    reverse = (log_q.exp() * (log_q - log_p)).sum(-1)
    assert sums.kl_div() == pytest.approx(kl[scored].mean().item(), rel=1e-12)
    found = sums.kl_div_reverse()
    assert found == pytest.approx(reverse[scored].mean().item(), rel=1e-12)
    for log_probs, found in [(log_p, clean_sums), (log_q, sums)]:
        expected = cross_entropy(log_probs, tokens, scored)
        assert found.ce_loss() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n_rows", [1, 6])
@pytest.mark.parametrize("n_at_a_time", [1, 4, 100])
def test_runs_that_all_prompts_share(n_rows, n_at_a_time, monkeypatch):
    monkeypatch.setattr(
        "sae_lens_multilayer.evaluation.scores._LOGITS_AT_A_TIME", 44 * n_at_a_time
    )
    tokens, scored = torch.randint(11, (4, 6)), torch.rand(4, 6) < 0.7
    scored[0, 0] = True
    logits = torch.randn(3, n_rows, 11, dtype=torch.float64)
    sums = [RunSums() for _ in logits]
    rows_of_all = logits.flatten(0, 1)
    add_shared_scores(sums, lambda rows: rows_of_all[rows], n_rows, tokens, scored)
    for found, of_run in zip(sums, logits, strict=True):
        log_probs = of_run.log_softmax(-1).expand(4, 6, 11)
        expected = cross_entropy(log_probs, tokens, scored)
        assert found.ce_loss() == pytest.approx(expected, rel=1e-12)


def cross_entropy(log_probs, tokens, scored):
    """Mean over scored positions that have a next token, by a loop."""
    values = [
        -log_probs[prompt, position, tokens[prompt, position + 1]].item()
        for prompt, position in scored.nonzero().tolist()
        if position + 1 < tokens.shape[1]
    ]
    return sum(values) / len(values)
