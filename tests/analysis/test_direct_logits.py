"""References: the logits of the model itself, and the lens applied as a matrix."""

from typing import Any

import pytest
import torch
from conftest import D_MODEL, D_VOCAB, PAPER_DATA, tiny_model
from sae_lens.load_model import HookedProxyLM
from saes import random_lens, random_sae
from transformers import AutoModelForCausalLM

from sae_lens_multilayer.analysis import OutputTokens, output_tokens


def expected_logits(model: Any, directions: torch.Tensor) -> torch.Tensor:
    """How the logits of a zero residual stream change by a long direction."""
    streams = torch.stack([torch.zeros_like(directions), 1e4 * directions])
    logits = model(streams, start_at_layer=model.cfg.n_layers)
    change = logits[1] - logits[0]
    return change - change.mean(-1, keepdim=True)


def check_ends(found: OutputTokens, row: int, expected: torch.Tensor) -> None:
    top, bottom = expected.topk(4), expected.topk(4, largest=False)
    assert found.top_ids[row].equal(top.indices)
    assert found.bottom_ids[row].equal(bottom.indices)
    for values, reference in (
        (found.top_logits[row], top.values),
        (found.bottom_logits[row], bottom.values),
    ):
        torch.testing.assert_close(values, reference, atol=1e-4, rtol=1e-3)


@pytest.fixture(params=["LN", "RMS"])
def normed_model(request, tokenizer):
    model = tiny_model(tokenizer, normalization_type=request.param)
    with torch.no_grad():
        for parameter in model.ln_final.parameters():
            parameter.add_(torch.randn_like(parameter))
        model.b_U.add_(torch.randn_like(model.b_U))
    return model


def test_are_those_of_the_model(normed_model):
    sae = random_sae()
    found = output_tokens(sae, normed_model, n_top=4)
    assert found.rows == ["decoder"]
    with torch.no_grad():
        check_ends(found, 0, expected_logits(normed_model, sae.W_dec[None])[0])
    table = found.to_dataframe()
    assert table.query("latent == 5 and rank == 2").top_id.item() == int(
        found.top_ids[0, 5, 2]
    )


def test_a_lens_gives_each_layer_its_own(model):
    sae = random_sae()
    sae.lens = random_lens()
    found = output_tokens(sae, model, n_top=4)
    assert found.rows == ["decoder", "layer_0", "layer_1"]
    with torch.no_grad():
        check_ends(found, 0, expected_logits(model, sae.W_dec[None])[0])
        for layer in range(2):
            weight: Any = sae.lens.get_submodule(f"{layer}").weight
            matrix = torch.eye(D_MODEL) + weight
            raw = torch.linalg.solve(matrix, sae.W_dec.T).T
            check_ends(found, 1 + layer, expected_logits(model, raw[None])[0])


def test_a_hugging_face_model_has_them_too(tokenizer):
    hf: Any = AutoModelForCausalLM.from_pretrained(PAPER_DATA / "model")
    sae = random_sae(d_in=hf.config.hidden_size)
    found = output_tokens(sae, HookedProxyLM(hf, tokenizer), n_top=3)
    assert found.top_ids.shape == (1, 64, 3)
    assert int(found.top_ids.max()) < max(D_VOCAB, hf.config.vocab_size)
    assert (found.top_logits > 0).all()
    assert (found.bottom_logits < 0).all()
