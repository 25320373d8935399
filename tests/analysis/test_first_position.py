"""Reference: the norms of the vectors themselves."""

import pytest
import torch
from conftest import D_VOCAB, N_CTX
from saes import HOOK_NAMES

from sae_lens_multilayer.analysis.first_position import (
    first_position_ratio,
    first_position_warning,
)


@pytest.fixture
def tokens():
    return torch.randint(1, D_VOCAB, (5, N_CTX))


def test_first_positions_are_compared_by_length(model, tokens):
    names = HOOK_NAMES
    _, cache = model.run_with_cache(tokens)
    norms = torch.stack([cache[name].norm(dim=-1).mean(0) for name in names])
    expected = (norms[:, 0] / norms[:, 1:].mean(1)).max().item()
    assert first_position_ratio(model, names, tokens) == pytest.approx(expected)


def test_a_warning_unless_the_position_is_excluded(model, tokens):
    assert first_position_warning(model, HOOK_NAMES, tokens) is None
    with torch.no_grad():
        model.W_pos[0] *= 1000
    ratio = first_position_ratio(model, HOOK_NAMES, tokens)
    warning = first_position_warning(model, HOOK_NAMES, tokens, [1])
    assert f"{ratio:.0f} times as long" in str(warning)
    for excluded in ([0], [-N_CTX]):
        assert first_position_warning(model, HOOK_NAMES, tokens, excluded) is None
    assert first_position_warning(model, HOOK_NAMES, tokens[:, :1]) is None
