"""Reference: SAELens' own `concat_and_batch_sequences`, uninterrupted."""

import logging

import pytest
import tokenizers
import torch
from conftest import N_CTX
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from transformers import PreTrainedTokenizerFast

from sae_lens_multilayer import MultiLayerActivationsStore
from sae_lens_multilayer.text.stream import remaining_after

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:sae_lens")

# Few different tokens, so that those put between documents often occur in them too.
TOKEN = st.integers(0, 3)


@settings(max_examples=300)
@given(
    documents=st.lists(st.lists(TOKEN, max_size=12), max_size=12),
    # SAELens never ends where the token before a context fills it.
    context=st.integers(2, 6),
    begin=st.one_of(st.none(), TOKEN),
    separator=st.one_of(st.none(), TOKEN),
)
def test_contexts_go_on_from_what_remains(documents, context, begin, separator):
    documents = [torch.tensor(d, dtype=torch.long) for d in documents]

    def contexts(of):
        return concat_and_batch_sequences(
            of,
            context_size=context,
            begin_batch_token_id=begin,
            sequence_separator_token_id=separator,
        )

    n_read, remaining = 0, []

    def reading():
        nonlocal n_read
        for document in documents:
            n_read += 1
            remaining.append(document)
            yield document

    whole = [c.tolist() for c in contexts(iter(documents))]
    for n_contexts, found in enumerate(contexts(reading()), start=1):
        remaining[:] = remaining_after(found, remaining)
        assert len(remaining) <= 1
        rest = contexts(iter([*remaining, *documents[n_read:]]))
        assert [c.tolist() for c in rest] == whole[n_contexts:]


def test_rows_without_text_are_skipped_and_logged(
    model, make_config, text_dataset, caplog
):
    texts = text_dataset["text"][:40]
    rows = [
        row for i, text in enumerate(texts) for row in [text, None][: 1 + (i % 4 == 0)]
    ]
    data = Dataset.from_dict({"text": rows})
    config = make_config()
    store, clean = (
        MultiLayerActivationsStore.from_config(model, config, d)
        for d in (data, text_dataset.select(range(40)))
    )
    with caplog.at_level(logging.WARNING, "sae_lens_multilayer"):
        for _ in range(10):
            assert torch.equal(store.get_batch_tokens(1), clean.get_batch_tokens(1))
    assert caplog.messages[0].startswith("Row 1 of the dataset is skipped (1 so far)")
    assert caplog.messages[0].endswith("is None.")
    assert len(caplog.messages) <= 5
    assert store.get_batch_tokens(1).shape == (1, N_CTX)


def test_a_tokenizer_without_words_reads_no_text(
    model, make_config, text_dataset, token_dataset
):
    """As `transformers` makes it for a folder of a model without a tokenizer."""
    empty = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=empty, eos_token="<e>")
    with pytest.raises(ValueError, match=r"special ones only, \['<e>'\].*Save it"):
        MultiLayerActivationsStore.from_config(model, make_config(), text_dataset)
    MultiLayerActivationsStore.from_config(model, make_config(), token_dataset)


@pytest.fixture
def chat_store(model, make_config, monkeypatch):
    template = "{% for m in messages %}{{ m['content'] }} w2 {% endfor %}"
    monkeypatch.setattr(model.tokenizer, "chat_template", template)

    def store(column, rows):
        cfg = make_config(use_chat_formatting=True, is_dataset_tokenized=False)
        data = Dataset.from_dict({column: rows})
        return MultiLayerActivationsStore.from_config(model, cfg, data)

    return store


def test_an_empty_conversation_is_skipped(chat_store):
    rows = [[{"role": "user", "content": "w3 w4 w5 w6"}]] * 20
    with_empty = chat_store("messages", [*rows[:3], [], *rows[3:]])
    without = chat_store("messages", rows).get_batch_tokens(4)
    assert torch.equal(with_empty.get_batch_tokens(4), without)


def test_turns_in_another_form_are_an_error_that_names_the_column(chat_store):
    rows = [[{"from": "human", "value": "w3 w4 w5 w6"}]] * 20
    with pytest.raises(ValueError, match=r"'conversations' must have .*row 0"):
        chat_store("conversations", rows).get_batch_tokens(1)
