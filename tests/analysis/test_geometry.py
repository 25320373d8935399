"""References: brute force over the whole matrix, and the paper's `mmcs`."""

from typing import Any

import pandas as pd
import pytest
import torch
from conftest import PAPER_DATA
from hypothesis import given
from hypothesis import strategies as st
from paper import paper_numbers
from sae_lens.load_model import HookedProxyLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sae_lens_multilayer.analysis import (
    DecoderSimilarity,
    TokenSimilarity,
    decoder_similarity,
    geometry,
    token_embeddings,
    token_similarity,
    token_unembeddings,
)


@pytest.fixture(params=[1, 50, 2**24])
def elements(request, monkeypatch):
    monkeypatch.setattr(geometry, "_ELEMENTS", request.param)


def cosines(a, b):
    return torch.cosine_similarity(a.unsqueeze(1), b.unsqueeze(0), dim=-1)


def test_no_similarity_is_beyond_one():
    W_dec = torch.randn(200, 7).repeat(2, 1)
    unit = W_dec / W_dec.norm(dim=1, keepdim=True)
    assert (unit @ unit.T).max() > 1  # by rounding
    assert decoder_similarity(W_dec).max_cos_sim.max() == 1
    assert decoder_similarity(-W_dec).max_cos_sim.max() == 1
    assert token_similarity(W_dec, W_dec, n_top=2).cos_sim.max() == 1


@given(st.integers(0, 2**32), st.integers(2, 20), st.integers(1, 5))
def test_others_are_the_most_similar_of_all(seed, n, d):
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(n, d, generator=generator, dtype=torch.float64)
    found = decoder_similarity(W_dec, n_top=3)
    for j in range(n):
        others = {
            i: float(W_dec[i] @ W_dec[j] / W_dec[i].norm() / W_dec[j].norm())
            for i in range(n)
            if i != j
        }
        assert found.max_cos_sim[j] == pytest.approx(max(others.values()), abs=1e-12)
        largest = sorted(others.values(), reverse=True)[:3]
        assert found.cos_sim[j].tolist() == pytest.approx(largest)
        assert [others[i] for i in found.latents[j].tolist()] == pytest.approx(largest)


def test_any_chunk_gives_the_same(elements):
    W_dec = 3 * torch.randn(37, 5)
    found = decoder_similarity(W_dec)
    expected = cosines(W_dec, W_dec).fill_diagonal_(-torch.inf).max(1)
    torch.testing.assert_close(found.max_cos_sim, expected.values)
    assert found.nearest.equal(expected.indices)
    assert found.mean == pytest.approx(expected.values.mean().item(), rel=1e-6)


@pytest.mark.usefixtures("elements")
def test_agrees_with_the_standard_number_for_the_papers_decoder():
    W_dec = load_file(PAPER_DATA / "plain.safetensors")["decoder.weight"].T
    found = decoder_similarity(W_dec)
    paper = load_file(paper_numbers("mmcs.safetensors"))["max_cos_sim_standard"]
    torch.testing.assert_close(found.max_cos_sim, paper, rtol=0, atol=1e-6)
    assert found.mean == pytest.approx(0.41827106, abs=1e-6)  # mmcs.standard.mean


def test_tokens_nearest_to_a_latent(elements):
    W_dec, W_E = torch.randn(6, 4), torch.randn(9, 4)
    W_E[3] = 0
    found = token_similarity(W_dec, W_E, n_top=9)
    expected = cosines(W_dec, W_E).sort(descending=True)
    torch.testing.assert_close(found.cos_sim, expected.values)
    assert found.token_ids.equal(expected.indices)
    table = token_similarity(W_dec, W_E, n_top=2).to_dataframe()
    assert table.latent.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert table["rank"].tolist() == [0, 1] * 6
    assert table.token_id.tolist() == expected.indices[:, :2].flatten().tolist()


def test_embeddings_of_every_kind_of_model(model, tokenizer):
    ids, names = torch.tensor([[7, 500]]), ["hook_embed", "ln_final.hook_normalized"]
    logits, cache = model.run_with_cache(ids)
    assert token_embeddings(model)[ids].equal(cache[names[0]])
    expected = cache[names[1]] @ token_unembeddings(model).T + model.b_U
    torch.testing.assert_close(logits, expected)
    hf: Any = AutoModelForCausalLM.from_pretrained(PAPER_DATA / "model")
    proxy = HookedProxyLM(hf, tokenizer)
    assert token_embeddings(proxy).equal(hf.get_input_embeddings().weight)
    assert token_unembeddings(proxy).equal(hf.get_output_embeddings().weight)


def test_disk(tmp_path):
    W_dec = torch.randn(6, 4)
    for result in (decoder_similarity(W_dec), token_similarity(W_dec, W_dec, 3)):
        path = tmp_path / type(result).__name__
        result.save(path)
        loaded = type(result).load(path)
        pd.testing.assert_frame_equal(loaded.to_dataframe(), result.to_dataframe())
        with pytest.raises(FileExistsError):
            result.save(path)
    with pytest.raises(ValueError, match=r"'TokenSimilarity'.*'DecoderSimilarity'"):
        TokenSimilarity.load(tmp_path / DecoderSimilarity.__name__)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_a_row_without_direction_is_an_error(value):
    W_dec = torch.randn(6, 4)
    W_dec[2] = value
    with pytest.raises(ValueError, match="1 of 6 decoder rows"):
        decoder_similarity(W_dec)
