"""The store against a plain `run_with_cache` and the definition of an epoch.

Reference: TransformerLens for the vectors (compared exactly), the tokens of the dataset
for who is served when, SAELens' own store for the meaning of shared fields.
"""

import logging
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import (
    D_MODEL,
    D_VOCAB,
    N_CTX,
    N_LAYERS,
    count_calls,
    tiny_model,
    tiny_sae_config,
)
from datasets import Dataset, DatasetDict, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import LoggingConfig
from sae_lens.training import activations_store as host_store
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor

from sae_lens_multilayer import (
    MultiLayerActivationsStore,
    MultiLayerConfig,
    NonFiniteActivationError,
    Text,
)
from sae_lens_multilayer.store.source import ModelSource

# SAELens warns of small and of untokenised datasets, and of its own tensor copies.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:sae_lens.training.activations_store"
)

RESID_POST = [f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS)]
PROMPTS = 4


def make_store(model, config, dataset=None) -> MultiLayerActivationsStore:
    return MultiLayerActivationsStore.from_config(model, config, dataset)


def tokens_of(dataset: Dataset) -> Tensor:
    rows = dataset.with_format("numpy")["input_ids"]
    return torch.from_numpy(np.stack([np.asarray(row) for row in rows])).long()


@torch.no_grad()
def plain_rows(model, tokens, hook_names, prompts=PROMPTS) -> Tensor:
    """[token, layer, d_in] in the order of the dataset, from whole forward passes."""
    parts = []
    for batch in tokens.split(prompts):
        _, cache = model.run_with_cache(batch, prepend_bos=False)
        acts = [cache[name].flatten(2) for name in hook_names]
        parts.append(torch.stack(acts, dim=2).flatten(0, 1))
    return torch.cat(parts)


def serve(store, n_batches: int) -> Tensor:
    return torch.cat([next(store) for _ in range(n_batches)])


def buffer_of(store: MultiLayerActivationsStore) -> Tensor:
    return store._buffer.data


def counted(rows: Tensor) -> Counter[bytes]:
    return Counter(row.float().numpy().tobytes() for row in rows)


class TestVectors:
    @pytest.mark.parametrize(
        ("choice", "hook_names"),
        [
            ({}, RESID_POST),
            ({"layers": [1]}, [RESID_POST[1]]),
            ({"layers": [1, 0]}, RESID_POST[::-1]),
            (
                {"hook_name": "blocks.{layer}.hook_resid_pre"},
                ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"],
            ),
            ({"hook_names": ["hook_embed", *RESID_POST]}, ["hook_embed", *RESID_POST]),
            (
                {"hook_names": ["blocks.1.attn.hook_z", "ln_final.hook_normalized"]},
                ["blocks.1.attn.hook_z", "ln_final.hook_normalized"],
            ),
        ],
        ids=["all", "one", "reversed", "pre", "embed", "z"],
    )
    def test_row_of_a_token_is_that_of_a_plain_run(
        self, model, make_config, token_dataset, choice, hook_names
    ):
        config = make_config(activations_mixing_fraction=0.0, **choice)
        store = make_store(model, config, token_dataset)
        expected = plain_rows(model, tokens_of(token_dataset), hook_names)
        assert store.hook_names == hook_names
        served = serve(store, 4)
        assert served.shape == (256, len(hook_names), D_MODEL)
        assert torch.equal(served, expected[:256])

    def test_shuffling_keeps_the_layers_of_a_token_together(
        self, model, make_config, token_dataset
    ):
        store = make_store(model, make_config(training_tokens=1024), token_dataset)
        expected = plain_rows(model, tokens_of(token_dataset), RESID_POST)
        served = serve(store, 16)
        assert counted(served) == counted(expected)
        assert not torch.equal(served, expected)

    def test_one_head_of_a_hook_with_heads(self, model, make_config, token_dataset):
        config = make_config(
            sae=tiny_sae_config(d_in=8),
            hook_name="blocks.{layer}.attn.hook_z",
            hook_head_index=1,
            activations_mixing_fraction=0.0,
        )
        names = [f"blocks.{layer}.attn.hook_z" for layer in range(N_LAYERS)]
        whole = plain_rows(model, tokens_of(token_dataset), names)
        served = serve(make_store(model, config, token_dataset), 2)
        assert torch.equal(served, whole.unflatten(2, (2, 8))[:128, :, 1])

    @pytest.mark.parametrize(
        "positions", [(2,), (1, -1), (None, 8), (0, None, 3)], ids=str
    )
    def test_positions_outside_seqpos_slice_are_left_out(
        self, model, make_config, token_dataset, positions
    ):
        config = make_config(
            seqpos_slice=positions,
            activations_mixing_fraction=0.0,
            train_batch_size_tokens=20,
        )
        store = make_store(model, config, token_dataset)
        rows = plain_rows(model, tokens_of(token_dataset), RESID_POST)
        kept = rows.view(64, N_CTX, N_LAYERS, D_MODEL)[:, slice(*positions)]
        assert torch.equal(serve(store, 5), kept.flatten(0, 1)[:100])

    @pytest.mark.parametrize("excluded", [True, [0, 3, 5]])
    def test_special_tokens_are_dropped_on_request(
        self, model, make_config, token_dataset, excluded
    ):
        tokens = tokens_of(token_dataset) % 8  # many are special
        data = Dataset.from_dict({"input_ids": tokens.numpy()})
        ids = [0] if excluded is True else excluded
        config = make_config(
            exclude_special_tokens=excluded, activations_mixing_fraction=0.0
        )
        keep = ~torch.isin(tokens.flatten(), torch.tensor(ids))
        expected = plain_rows(model, tokens, RESID_POST)[keep]
        assert torch.equal(serve(make_store(model, config, data), 6), expected[:384])

    def test_special_tokens_are_kept_by_default(
        self, model, make_config, token_dataset
    ):
        data = Dataset.from_dict({"input_ids": np.zeros((64, N_CTX), dtype=int)})
        store = make_store(model, make_config(), data)
        assert next(store).shape == (64, N_LAYERS, D_MODEL)

    def test_bfloat16_buffer_holds_the_rounded_vectors(
        self, model, make_config, token_dataset
    ):
        config = make_config(dtype="bfloat16", activations_mixing_fraction=0.0)
        served = serve(make_store(model, config, token_dataset), 2)
        expected = plain_rows(model, tokens_of(token_dataset), RESID_POST)[:128]
        assert served.dtype == torch.bfloat16
        assert torch.equal(served, expected.bfloat16())

    def test_autocast_runs_the_model_in_bfloat16(
        self, model, make_config, token_dataset
    ):
        config = make_config(autocast_lm=True, activations_mixing_fraction=0.0)
        served = next(make_store(model, config, token_dataset))
        expected = plain_rows(model, tokens_of(token_dataset), RESID_POST)[:64]
        assert not torch.equal(served, expected)
        torch.testing.assert_close(served, expected, rtol=0.05, atol=0.05)

    def test_batch_is_a_copy_that_later_batches_do_not_change(
        self, model, make_config, token_dataset
    ):
        store = make_store(model, make_config(training_tokens=2048), token_dataset)
        first = next(store)
        kept = first.clone()
        serve(store, 10)
        assert torch.equal(first, kept)


class TestEpochs:
    @pytest.mark.parametrize("n_batches_in_buffer", [1, 12, 500])
    @pytest.mark.parametrize("store_batch_size_prompts", [1, 7, 64, 100])
    def test_every_token_once_in_each_epoch(
        self,
        model,
        make_config,
        token_dataset,
        n_batches_in_buffer,
        store_batch_size_prompts,
    ):
        config = make_config(
            training_tokens=4096,
            n_batches_in_buffer=n_batches_in_buffer,
            store_batch_size_prompts=store_batch_size_prompts,
        )
        store = make_store(model, config, token_dataset)
        expected = plain_rows(
            model, tokens_of(token_dataset), RESID_POST, store_batch_size_prompts
        )
        epochs = [serve(store, 16) for _ in range(3)]
        for epoch in epochs:
            assert counted(epoch) == counted(expected)
        assert not any(torch.equal(a, b) for a, b in pairwise(epochs))

    @settings(max_examples=40, deadline=None)
    @given(data=st.data())
    def test_every_token_once_in_each_epoch_whatever_the_sizes(self, data):
        context = data.draw(st.integers(1, 8), "context")
        n_rows = data.draw(st.integers(1, 30), "rows")
        mixing = data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.9]), "mixing")
        tokens = torch.arange(1, n_rows * context + 1).view(n_rows, context)
        n_excluded = data.draw(st.integers(0, tokens.numel() - 1), "excluded")
        excluded = (torch.randperm(tokens.numel())[:n_excluded] + 1).tolist()
        n_kept = tokens.numel() - n_excluded
        batch = data.draw(st.integers(1, n_kept), "batch")
        config = MultiLayerConfig(
            sae=tiny_sae_config(),
            hook_names=["hook_embed"],
            context_size=context,
            train_batch_size_tokens=batch,
            training_tokens=data.draw(st.integers(1, 500), "training_tokens"),
            store_batch_size_prompts=data.draw(st.integers(1, 12), "prompts"),
            n_batches_in_buffer=data.draw(st.integers(1, 60), "buffer"),
            activations_mixing_fraction=mixing,
            exclude_special_tokens=excluded or False,
            checkpoint_path=None,
            logger=LoggingConfig(log_to_wandb=False),
            verbose=False,
        )
        model = embedding_model()
        store = make_store(
            model, config, Dataset.from_dict({"input_ids": tokens.numpy()})
        )
        n_epochs = 3
        n_batches = -(-n_epochs * n_kept // batch)
        # The embedding of token i holds i in every entry.
        served = serve(store, n_batches)[:, 0, 0].long().tolist()
        kept = sorted(set(tokens.flatten().tolist()) - set(excluded))
        for epoch in range(n_epochs):
            part = served[epoch * n_kept : (epoch + 1) * n_kept]
            assert part == kept if mixing == 0 else sorted(part) == kept

    def test_order_is_kept_across_epochs_without_mixing(
        self, model, make_config, token_dataset
    ):
        data = token_dataset.select(range(7))  # 112 tokens: batches straddle epochs
        config = make_config(
            activations_mixing_fraction=0.0, store_batch_size_prompts=3
        )
        served = serve(make_store(model, config, data), 7)
        expected = plain_rows(model, tokens_of(data), RESID_POST, 3)
        assert torch.equal(served, expected.repeat(4, 1, 1))

    def test_the_seed_decides_the_order(self, model, make_config, token_dataset):
        def batches(seed):
            config = make_config(seed=seed)
            return serve(make_store(model, config, token_dataset), 8)

        assert torch.equal(batches(1), batches(1))
        assert not torch.equal(batches(1), batches(2))

    def test_global_random_state_is_unchanged(self, model, make_config, token_dataset):
        before = torch.get_rng_state()
        serve(make_store(model, make_config(), token_dataset), 8)
        assert torch.equal(torch.get_rng_state(), before)

    def test_tokens_of_several_refills_are_mixed(self, make_config):
        data = Dataset.from_dict({"input_ids": np.arange(1024).reshape(64, N_CTX)})
        config = make_config(
            hook_names=["hook_embed"],
            n_batches_in_buffer=16,
            training_tokens=1024,
            train_batch_size_tokens=16,
        )
        store = make_store(embedding_model(), config, data)
        served = serve(store, 64)[:, 0, 0].long()
        # A buffer of a quarter of the data, of which half is kept: some of the first
        # eighth comes late, and nothing comes before it can be in the buffer.
        assert served[:16].max() < 256
        assert (served < 128).nonzero().max() > 256
        assert served[:256].sort().values.ne(torch.arange(256)).any()


class TestState:
    @pytest.mark.parametrize("kind", ["text", "tokens", "stream"])
    @pytest.mark.parametrize("mixing", [0.0, 0.5, 0.9])
    def test_alternating_stores_serve_the_same_as_one(
        self, make_config, model, text_dataset, token_dataset, tmp_path, kind, mixing
    ):
        """Each batch comes from a new store, loaded from the previous one's state."""
        data = {
            "text": text_dataset.select(range(30)),
            "tokens": token_dataset.select(range(21)),
            "stream": token_dataset.select(range(21)).to_iterable_dataset(),
        }[kind]
        config = make_config(
            activations_mixing_fraction=mixing,
            training_tokens=1500,
            train_batch_size_tokens=50,
            store_batch_size_prompts=3,
            n_batches_in_buffer=11,
            exclude_special_tokens=[3, 4, 5],
        )
        expected = serve(make_store(model, config, data), 30)
        folder, served = tmp_path / "state", []
        folder.mkdir()
        for turn in range(30):
            store = make_store(model, config, data)
            if turn:
                store.load_from_checkpoint(folder)
            served.append(next(store))
            store.save_to_checkpoint(folder)
        assert torch.equal(torch.cat(served), expected)

    def test_the_rest_of_an_epoch_may_be_smaller_than_a_batch(
        self, make_config, model, token_dataset, tmp_path
    ):
        config = make_config(training_tokens=1024, n_batches_in_buffer=1)
        store = make_store(model, config, token_dataset)
        next(store)
        store.save_to_checkpoint(tmp_path)
        # The rest of the epoch is short, the epoch is not.
        again = make_store(model, config, token_dataset)
        again.load_from_checkpoint(tmp_path)
        assert counted(serve(again, 15)) == counted(serve(store, 15))

    def test_a_saved_state_does_not_change_with_the_store(
        self, make_config, model, token_dataset
    ):
        config = make_config(training_tokens=2048)
        store = make_store(model, config, token_dataset)
        next(store)
        state = store.state
        before = {name: t.clone() for name, t in state.to_tensors().items()}
        serve(store, 20)
        after = state.to_tensors()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_a_store_loaded_from_a_state_has_this_state(
        self, make_config, model, token_dataset, tmp_path
    ):
        config = make_config(training_tokens=2048)
        store = make_store(model, config, token_dataset)
        serve(store, 9)
        store.save_to_checkpoint(tmp_path)
        again = make_store(model, config, token_dataset)
        again.load_from_checkpoint(tmp_path)
        expected, found = store.state_dict(), again.state_dict()
        assert expected["source.n_chunks"] > 0
        assert expected["source.n_rows"] > 0
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)

    def test_prompts_are_forgotten_when_their_tokens_are_served(
        self, make_config, model, token_dataset
    ):
        config = make_config(training_tokens=4096, activations_mixing_fraction=0.0)
        store = make_store(model, config, token_dataset)
        most = store.buffer_capacity_tokens // store.source.max_tokens_per_chunk + 1
        for _ in range(40):
            next(store)
            assert len(store.state.chunks) <= most
        assert store.source.n_chunks > 2 * most


def embedding_model():
    model = tiny_model(None, n_layers=1, d_vocab=1024)
    model.W_E.data.copy_(torch.arange(1024.0).unsqueeze(1).expand_as(model.W_E))
    return model


class TestCosts:
    def test_buffer_is_allocated_once(self, model, make_config, token_dataset):
        store = make_store(model, make_config(training_tokens=10_000), token_dataset)
        next(store)
        address = buffer_of(store).data_ptr()
        for _ in range(100):
            next(store)
            assert buffer_of(store).data_ptr() == address

    @pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
    def test_the_log_states_the_memory_of_the_buffer(
        self, model, make_config, token_dataset, caplog, dtype, size
    ):
        config = make_config(dtype=dtype)
        with caplog.at_level(logging.INFO, "sae_lens_multilayer"):
            next(make_store(model, config, token_dataset))
        n_bytes = 16 * N_CTX * N_LAYERS * D_MODEL * size
        (record,) = [m for m in caplog.messages if "buffer" in m]
        assert f"{n_bytes} bytes" in record
        assert f"{16 * N_CTX} tokens x {N_LAYERS} layers x {D_MODEL}" in record

    @pytest.mark.parametrize(
        ("n_batches_in_buffer", "training_tokens", "prompts"),
        [(4, 1024, 16), (256, 128, 2), (256, 1000, 16), (20, 640, 10)],
    )
    def test_nothing_is_harvested_that_the_run_will_not_use(
        self,
        model,
        make_config,
        token_dataset,
        monkeypatch,
        n_batches_in_buffer,
        training_tokens,
        prompts,
    ):
        config = make_config(
            n_batches_in_buffer=n_batches_in_buffer, training_tokens=training_tokens
        )
        store = make_store(model, config, token_dataset)
        passes = count_calls(monkeypatch, model, "run_with_cache")
        serve(store, -(-training_tokens // 64))
        assert len(passes) == prompts

    @pytest.mark.parametrize(
        ("hook_names", "blocks_run"),
        [
            (["hook_embed"], [0, 0, 0]),
            (["blocks.0.hook_resid_post"], [1, 0, 0]),
            (["blocks.1.hook_resid_pre", "hook_embed"], [1, 1, 0]),
            (["blocks.1.hook_resid_post", "blocks.0.hook_resid_pre"], [1, 1, 0]),
            (["blocks.2.hook_resid_post"], [1, 1, 1]),
            (["ln_final.hook_normalized"], [1, 1, 1]),
        ],
    )
    def test_forward_pass_stops_after_the_last_block_needed(
        self, tokenizer, make_config, token_dataset, hook_names, blocks_run
    ):
        model = tiny_model(tokenizer, n_layers=3)
        store = make_store(model, make_config(hook_names=hook_names), token_dataset)
        calls = Counter()
        for i, block in enumerate(model.blocks):
            block.register_forward_hook(lambda *_, i=i: calls.update([i]))
        assert isinstance(store.source, ModelSource)
        store.source.activations(tokens_of(token_dataset)[:2])
        assert [calls[i] for i in range(3)] == blocks_run

    def test_buffer_sizes_have_saelens_meaning(
        self, model, make_config, token_dataset, monkeypatch
    ):
        config = make_config(n_batches_in_buffer=40, seqpos_slice=(4, None))
        store = make_store(model, config, token_dataset)
        next(store)
        of_host: dict[str, int] = {}
        monkeypatch.setattr(host_store, "mixing_buffer", of_host.update)
        ActivationsStore.get_data_loader(store)
        assert len(buffer_of(store)) == of_host["buffer_size"] == 40 * 12
        assert len(next(store)) == of_host["batch_size"]
        assert store.activations_mixing_fraction == of_host["mix_fraction"]

    def test_buffer_grows_to_what_the_batches_need(
        self, model, make_config, token_dataset
    ):
        config = make_config(n_batches_in_buffer=1, train_batch_size_tokens=96)
        store = make_store(model, config, token_dataset)
        assert next(store).shape[0] == 96
        assert len(buffer_of(store)) == PROMPTS * N_CTX + 2 * 96


class TestDatasets:
    def expect(self, model, config, tokens, dataset=None):
        store = make_store(model, config, dataset)
        n_batches = len(tokens) * N_CTX // 64
        served = serve(store, n_batches)
        expected = plain_rows(model, tokens, RESID_POST)[: 64 * n_batches]
        assert torch.equal(served, expected)

    def test_text_is_tokenised_and_joined(
        self, model, tokenizer, make_config, text_dataset
    ):
        config = make_config(
            activations_mixing_fraction=0.0, sequence_separator_token=None
        )
        stream = tokenizer(
            " ".join(text_dataset["text"]), add_special_tokens=False
        ).input_ids
        n_rows = len(stream) // N_CTX
        tokens = torch.tensor(stream[: n_rows * N_CTX]).view(n_rows, N_CTX)
        self.expect(model, config, tokens, text_dataset)

    @pytest.mark.parametrize(
        "changes",
        [
            {"prepend_bos": True},
            {"sequence_separator_token": "eos"},
            {"disable_concat_sequences": True},
        ],
        ids=str,
    )
    def test_tokens_are_those_of_the_hosts_store(
        self, model, make_config, text_dataset, changes
    ):
        config = make_config(activations_mixing_fraction=0.0, **changes)
        host = ActivationsStore.from_config(
            model, make_config(hook_name=RESID_POST[0], **changes), text_dataset
        )
        tokens = torch.cat([host.get_batch_tokens(1) for _ in range(64)])
        self.expect(model, config, tokens, text_dataset)

    @pytest.mark.parametrize("streaming", [True, False])
    @pytest.mark.parametrize(
        "kind", ["file.jsonl", "file.parquet", "file.txt", "folder", "json", "disk"]
    )
    def test_text_files_give_what_the_dataset_gives(
        self, model, make_config, text_dataset, tmp_path, kind, streaming
    ):
        path = write_dataset(text_dataset, tmp_path / kind)
        settings_ = {"activations_mixing_fraction": 0.0, "streaming": streaming}
        expected = serve(make_store(model, make_config(**settings_), text_dataset), 8)
        config = make_config(dataset_path=str(path), **settings_)
        assert torch.equal(serve(make_store(model, config), 8), expected)

    @pytest.mark.parametrize("streaming", [True, False])
    @pytest.mark.parametrize("kind", ["file.jsonl", "file.parquet", "folder", "disk"])
    def test_token_files_give_what_the_dataset_gives(
        self, model, make_config, token_dataset, tmp_path, kind, streaming
    ):
        path = write_dataset(token_dataset, tmp_path / kind)
        config = make_config(
            dataset_path=str(path), activations_mixing_fraction=0.0, streaming=streaming
        )
        self.expect(model, config, tokens_of(token_dataset))

    def test_streamed_and_split_datasets(self, model, make_config, token_dataset):
        config = make_config(activations_mixing_fraction=0.0)
        tokens = tokens_of(token_dataset)
        stream = token_dataset.to_iterable_dataset(num_shards=3)
        self.expect(model, config, tokens, stream)
        generated = IterableDataset.from_generator(
            lambda: ({"tokens": row.tolist()} for row in tokens)
        )
        self.expect(model, config, tokens, generated)
        self.expect(model, config, tokens, DatasetDict({"train": token_dataset}))

    def test_long_rows_are_cut_and_short_ones_joined(self, model, make_config):
        rng = np.random.default_rng(0)
        long = rng.integers(1, D_VOCAB, (40, N_CTX + 5))
        config = make_config(activations_mixing_fraction=0.0)
        tokens = torch.from_numpy(long[:, :N_CTX])
        with pytest.warns(RuntimeWarning, match="Some data will be discarded"):
            self.expect(model, config, tokens, Dataset.from_dict({"input_ids": long}))
        short = rng.integers(1, D_VOCAB, (100, 12))
        joined = torch.from_numpy(short.reshape(75, N_CTX))
        self.expect(model, config, joined, Dataset.from_dict({"input_ids": short}))


def write_dataset(dataset: Dataset, path):
    """Write a dataset in the format of the suffix of `path`; a folder for `json`."""
    if path.name == "disk":
        dataset.save_to_disk(path)
    elif path.name in ("folder", "json"):
        path.mkdir()
        dataset.to_json(path / "part.jsonl")
    elif path.suffix == ".jsonl":
        dataset.to_json(path)
    elif path.suffix == ".parquet":
        dataset.to_parquet(path)
    else:
        path.write_text("\n".join(dataset["text"]))
    return path


class TestErrors:
    def test_dataset_smaller_than_one_batch(self, model, make_config, token_dataset):
        store = make_store(
            model, make_config(train_batch_size_tokens=64), token_dataset.select([0, 1])
        )
        with pytest.raises(ValueError, match=r"at least one training batch of 64.*32"):
            next(store)

    def test_text_shorter_than_one_context(self, model, make_config):
        store = make_store(model, make_config(), Dataset.from_dict({"text": ["w1 w2"]}))
        with pytest.raises(ValueError, match="at least one training batch"):
            next(store)

    def test_data_that_is_all_excluded(self, model, make_config):
        data = Dataset.from_dict({"input_ids": np.ones((64, N_CTX), dtype=int)})
        store = make_store(model, make_config(exclude_special_tokens=[1]), data)
        with pytest.raises(ValueError, match=r"the text became \['w1', 'w1'"):
            next(store)

    def test_a_tokenizer_that_makes_every_word_special(self, model, make_config):
        # Unknown words become the end-of-text token.
        text = Dataset.from_dict({"text": ["a zebra and a lion " * 20] * 20})
        cfg = make_config(exclude_special_tokens=True)
        message = (
            r"excludes all of the first \d+ tokens, as the text became "
            r"\['<\|endoftext\|>', '<\|endoftext\|>'"
        )
        with pytest.raises(ValueError, match=message):
            next(make_store(model, cfg, text))
        with pytest.raises(ValueError, match=message):
            Text.from_config(cfg).prompts(model, 64, text)

    @pytest.mark.parametrize("column", ["input_ids", "text"])
    def test_empty_dataset(self, model, make_config, column):
        with pytest.raises(ValueError, match="it is empty"):
            make_store(model, make_config(), Dataset.from_dict({column: []}))

    def test_no_dataset(self, model, make_config):
        with pytest.raises(ValueError, match="Give `dataset_path`"):
            make_store(model, make_config())

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    def test_bad_activation_names_hook_and_batch(
        self, model, make_config, token_dataset, bad
    ):
        store = make_store(model, make_config(), token_dataset)
        token = int(token_dataset[9]["input_ids"][3])  # third batch of four prompts
        earlier = tokens_of(token_dataset)[:8]
        assert not (earlier == token).any()
        add_bad(model, RESID_POST[1], token, bad)
        with pytest.raises(
            NonFiniteActivationError,
            match=r"1 of 64 vectors at 'blocks.1.hook_resid_post' in model batch 3",
        ):
            next(store)

    def test_bad_activation_that_is_not_used_is_no_error(
        self, model, make_config, token_dataset
    ):
        config = make_config(exclude_special_tokens=[7])
        data = Dataset.from_dict(
            {"input_ids": torch.where(tokens_of(token_dataset) < 50, 7, 8).numpy()}
        )
        store = make_store(model, config, data)
        add_bad(model, RESID_POST[1], 7, float("nan"))
        assert next(store).isfinite().all()

    def test_context_longer_than_the_models(self, model, make_config, token_dataset):
        with pytest.raises(ValueError, match=r"at most 16 tokens.*got 17"):
            make_store(model, make_config(context_size=17), token_dataset)

    def test_missing_hook_lists_near_ones(self, model, make_config, token_dataset):
        config = make_config(hook_name="blocks.{layer}.hook_resid_pots")
        with pytest.raises(ValueError, match=r"hook_resid_pots.*hook_resid_post"):
            make_store(model, config, token_dataset)

    def test_layer_outside_the_model(self, model, make_config, token_dataset):
        with pytest.raises(ValueError, match=r"\[0, 2\).*got \[0, 2\]"):
            make_store(model, make_config(layers=[0, 2]), token_dataset)

    def test_hooks_of_different_widths(self, model, make_config, token_dataset):
        config = make_config(hook_names=["blocks.0.mlp.hook_post", RESID_POST[1]])
        with pytest.raises(ValueError, match=r"must be 32, .*hook_post'; got 16"):
            make_store(model, config, token_dataset)

    def test_head_of_a_hook_without_heads(self, model, make_config, token_dataset):
        with pytest.raises(ValueError, match=r"`hook_head_index` must be None"):
            make_store(model, make_config(hook_head_index=1), token_dataset)

    def test_width_other_than_d_in(self, model, make_config, token_dataset):
        config = make_config(sae=tiny_sae_config(d_in=8))
        with pytest.raises(ValueError, match=r"`d_in` must be 16.*got 8"):
            make_store(model, config, token_dataset)


def add_bad(model, hook_name: str, token: int, value: float) -> None:
    """Make the vectors of one token bad at one hook and nowhere else."""
    seen: dict[str, Tensor] = {}
    model.embed.register_forward_pre_hook(lambda _, args: seen.update(tokens=args[0]))

    def spoil(module, args, output):
        bad = (seen["tokens"] == token).unsqueeze(-1)
        return torch.where(bad, value, output)

    model.hook_dict[hook_name].register_forward_hook(spoil, prepend=True)
