"""Single positions after a prompt's keys and values. Reference: whole prompts."""

import copy
import logging
from typing import Any

import pytest
import torch
from conftest import D_VOCAB
from test_walk import N_LAYERS, N_POS, bridge_of, random_model
from torch import Tensor

from sae_lens_multilayer.evaluation.splicing import make_splicer
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.models.model import Model
from sae_lens_multilayer.models.prefix import prefix_differs
from sae_lens_multilayer.studies.interventions.runners import (
    Additions,
    PositionRunner,
    PromptRunner,
    make_runner,
)

# Rotary and learnt positions, ALiBi, parallel attention; and bridges.
KINDS = ["Llama", "GPT2", "Phi", "Bloom", "Falcon", "GPTNeoX"]
BRIDGES = ["bridge of Llama", "bridge of GPTNeoX", "bridge of GPT2"]


@pytest.fixture
def make_model(tokenizer, tmp_path):
    def make(kind: str) -> Model:
        if kind.startswith("bridge of "):
            model: Any = bridge_of(kind.split()[-1], tokenizer, tmp_path)
        else:
            model = random_model(kind, tokenizer)
        return as_model(model.double())

    return make


def runners(
    model: Model, ids: Tensor, n_padded: int = 0
) -> tuple[PositionRunner, PromptRunner]:
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS)]
    hooks = names if hasattr(model.module, "original_model") else model_hooks(model)
    splicer = make_splicer(model, hooks, 64, None)
    with torch.no_grad():
        streams, logits = model.residual_streams(ids)
        positions = torch.arange(n_padded, ids.shape[1])
        depths = [*range(1, N_LAYERS + 1)]
        given = depths, streams, logits, positions, model.unembed()
        fast = make_runner(model, splicer, ids, *given)
    assert isinstance(fast, PositionRunner)
    return fast, PromptRunner(splicer, ids, N_LAYERS)


def model_hooks(model: Model) -> list[str]:
    return list(model.module.hook_dict)[:N_LAYERS]


def some_additions() -> Additions:
    n = 9
    layer, position = torch.arange(n) % N_LAYERS, torch.arange(n) * 5 % N_POS
    return Additions(layer, position, 0.5 * torch.randn(n, 32, dtype=torch.float64))


def logits_later_and_gradients(runner: Any, edits: Additions) -> tuple[Tensor, ...]:
    dx = edits.dx.clone().requires_grad_()
    with_leaf, token = edits._replace(dx=dx), torch.arange(len(dx)) + 1
    logits, later = runner.run(with_leaf)
    of_token = runner.token_logits(with_leaf, token)
    (gradient,) = torch.autograd.grad(of_token.sum(), dx)
    assert torch.allclose(of_token, logits[torch.arange(len(dx)), token])
    return logits.detach(), later, gradient


@pytest.mark.parametrize("kind", KINDS + BRIDGES)
def test_edits_of_single_positions_equal_those_of_whole_prompts(kind, make_model):
    model = make_model(kind)
    ids, edits = torch.randint(1, D_VOCAB, (1, N_POS)), some_additions()
    fast, whole = runners(model, ids)
    expected = logits_later_and_gradients(whole, edits)
    found = logits_later_and_gradients(fast, edits)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6, equal_nan=True)
    clean = model.logits(ids)[0, edits.position]
    assert (found[0] - clean).abs().amax(1).min() > 1e-3


def test_padding_before_a_prompt_is_left_out(tokenizer):
    left = copy.deepcopy(tokenizer)
    left.padding_side, left.pad_token = "left", tokenizer.bos_token
    model = as_model(random_model("Llama", left).double())
    ids, edits = torch.randint(1, D_VOCAB, (1, N_POS)), some_additions()
    padding = torch.full((1, 3), left.pad_token_id)
    expected = logits_later_and_gradients(runners(model, ids)[0], edits)
    moved = edits._replace(position=edits.position + 3)
    fast, _ = runners(model, torch.cat([padding, ids], 1), n_padded=3)
    found = logits_later_and_gradients(fast, moved)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("kind", ["Mistral", "Gemma2"])
def test_a_window_shorter_than_the_prompt_takes_whole_prompts(kind, make_model, caplog):
    model = make_model(kind)
    ids = torch.randint(1, D_VOCAB, (1, N_POS))
    hooks = model_hooks(model)
    splicer = make_splicer(model, hooks, 64, None)
    depths, positions = [*range(1, N_LAYERS + 1)], torch.tensor([N_POS - 1])
    with torch.no_grad(), caplog.at_level(logging.INFO):
        streams, logits = model.residual_streams(ids)
        given = depths, streams, logits, positions, model.unembed()
        found = make_runner(model, splicer, ids, *given)
    assert isinstance(found, PromptRunner)
    assert f"attention sees 4 positions; the prompt has {N_POS}" in caplog.text
    # Not left to the comparison, which in bfloat16 does not see a missing key.
    with pytest.raises(ValueError, match="attention sees 4 positions"):
        model.prefix(ids[:, :4])
    short = ids[:, :3]
    with torch.no_grad():
        streams, logits = model.residual_streams(short)
        prefix = model.prefix(short)
        assert prefix_differs(prefix, torch.tensor([1, 2]), streams, logits) is None
        # The soft cap of Gemma 2 is the model's.
        most, token = logits[0].max(-1)
        alone = model.unembed().token_logits(streams[-1][0], token)
    torch.testing.assert_close(alone, most)
