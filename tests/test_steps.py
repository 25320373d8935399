"""Continuations from cached keys and values. Reference: a whole pass for each token."""

from typing import Any

import pytest
import torch
from conftest import D_VOCAB, tiny_model
from saes import HOOK_NAMES, random_sae
from test_walk import ARCHITECTURES, block_names, bridge_of, random_model
from torch import Tensor

from sae_lens_multilayer.models.kinds import _TransformerLensModel, as_model
from sae_lens_multilayer.models.steps import steps_obstacle
from sae_lens_multilayer.serving import explorer as explorer_module
from sae_lens_multilayer.serving.explorer import (
    ContinueRequest,
    Explorer,
    continue_in_steps,
    continue_text,
)
from sae_lens_multilayer.text.prompts import Text

N_NEW = 9


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, D_VOCAB, (1, 6))


def assert_steps_are_whole_passes(raw: Any, hooks: list[str], ids: Tensor) -> None:
    """Without replacements, and with those of all vectors but the first."""
    model = as_model(raw)
    assert steps_obstacle(model) is None

    def new(x: Tensor) -> Tensor:
        return x.flip(-1) + 0.5 * x.std(-1, keepdim=True)

    def in_text(x: Tensor) -> Tensor:
        return torch.cat([x[:, :1], new(x[:, 1:])], dim=1)

    found = []
    for chosen in ([], hooks):
        logits, longer = continue_in_steps(
            model,
            ids,
            dict.fromkeys(chosen, in_text),
            dict.fromkeys(chosen, new),
            N_NEW,
        )
        whole = continue_text(model, ids, dict.fromkeys(chosen, in_text), N_NEW)
        torch.testing.assert_close(logits, whole[0], rtol=1e-4, atol=1e-4)
        assert longer.tolist() == whole[1].tolist()
        found.append(logits)
    assert (found[0] - found[1]).abs().max() > 1e-2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steps_of_every_architecture(architecture, ids):
    raw = random_model(architecture)
    assert_steps_are_whole_passes(raw, block_names(raw.model)[1:3], ids)


@pytest.mark.parametrize("architecture", ["Llama", "GPT2", "GPTNeoX"])
def test_steps_of_a_bridge(architecture, ids, tokenizer, tmp_path):
    raw = bridge_of(architecture, tokenizer, tmp_path)
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in (1, 2)]
    assert_steps_are_whole_passes(raw, hooks, ids)


@pytest.mark.parametrize("changes", [{}, {"positional_embedding_type": "rotary"}])
@pytest.mark.parametrize("side", ["left", "right"])
def test_steps_of_a_hooked_transformer(changes, side, ids, tokenizer):
    tokenizer.padding_side = side
    raw = tiny_model(tokenizer, n_ctx=32, rotary_dim=8, **changes)
    assert_steps_are_whole_passes(raw, HOOK_NAMES[:1], ids)


def test_a_model_without_a_known_cache_says_so(model):
    assert "no known cache" in str(steps_obstacle(_TransformerLensModel(model)))


def test_a_model_that_forgets_the_text_is_found(monkeypatch):
    raw = random_model("Llama")
    forward = raw.model.forward

    def forget(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    monkeypatch.setattr(raw.model, "forward", forget)
    assert "logits differ" in str(steps_obstacle(as_model(raw)))


@pytest.fixture
def explorer(tokenizer) -> Explorer:
    text = Text(context_size=32, prepend_bos=False)
    prompts = torch.randint(1, D_VOCAB, (2, 32))
    return Explorer(random_sae(), tiny_model(tokenizer, n_ctx=32), text, str, prompts)


@pytest.mark.parametrize("text", ["w7", "w7 w300 w12 w8 w45"])
@pytest.mark.parametrize("edit", ["add", "set", "reconstruct"])
def test_served_continuations_are_the_same_either_way(explorer, text, edit):
    request = ContinueRequest(
        kind="continue", text=text, edit=edit, layers=[0, 1], latent=5, value=9.0
    )
    cached = explorer.continuations(request, lambda done, total: None)
    explorer._can_step = False
    whole = explorer.continuations(request, lambda done, total: None)
    # The cross-entropy of a text of one token is None.
    for name, value in whole.items():
        is_number = isinstance(value, float)
        expected = pytest.approx(value, rel=1e-4, abs=1e-6) if is_number else value
        assert cached[name] == expected, name


@pytest.mark.parametrize("why", ["padding", "no cache"])
def test_whole_passes_remain_where_steps_would_differ(explorer, monkeypatch, why):
    if why == "padding":
        mask = lambda self, ids: torch.ones_like(ids)  # noqa: E731
        monkeypatch.setattr(type(explorer._model), "mask", mask)
    else:
        explorer._can_step = False
    monkeypatch.setattr(explorer_module, "continue_in_steps", None)
    request = ContinueRequest(
        kind="continue", text="w7 w8", edit="add", layers=[0], n_new=2
    )
    assert len(explorer.continuations(request, lambda *_: None)["clean"]) == 2
