"""Harvesting a cache of activations, and reading it.

Reference: the live store, bit for bit, in the order of the dataset; a harvest that was
not interrupted; the files as they were written.
"""

import sys
from collections import Counter
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import D_VOCAB, N_CTX, N_LAYERS, count_calls, tiny_model
from conftest import tiny_sae_config as sae_config
from datasets import Dataset
from safetensors import safe_open
from torch import Tensor

from benchmarks._common import peak_rss_mib
from sae_lens_multilayer import (
    ActivationCache,
    MultiLayerActivationsStore,
    MultiLayerCacheActivationsRunner,
    NonFiniteActivationError,
)
from sae_lens_multilayer.ranks import Ranks
from sae_lens_multilayer.store.cache import vector_settings
from sae_lens_multilayer.store.shards import Shard
from sae_lens_multilayer.store.source import CacheSource

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:sae_lens")

RESID_POST = [f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS)]


def rows_of(cache, hook_names=None) -> Tensor:
    return torch.cat([rows for rows, _ in cache.read(hook_names)])


def live_rows(model, cfg, dataset, n_tokens) -> Tensor:
    """The first rows that the live store serves in the order of the dataset."""
    cfg.activations_mixing_fraction, cfg.train_batch_size_tokens = 0.0, n_tokens
    store = MultiLayerActivationsStore.from_config(model, cfg, dataset)
    return next(store)


def cached_store(cache, cfg) -> MultiLayerActivationsStore:
    cache.check(vector_settings(cfg), cfg.resolve_hook_names(N_LAYERS))
    source = CacheSource.from_config(cache, cfg.resolve_hook_names(N_LAYERS), cfg)
    return MultiLayerActivationsStore.from_source(source, cfg)


def serve(store, n_batches) -> Tensor:
    return torch.cat([next(store) for _ in range(n_batches)])


def drain(store, n_batches) -> None:
    for _ in range(n_batches):
        next(store)


def counted(rows: Tensor) -> Counter[bytes]:
    return Counter(row.numpy().tobytes() for row in rows)


def files_of(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def tokens_of(dataset) -> Tensor:
    rows = dataset.with_format("numpy")["input_ids"]
    return torch.from_numpy(np.stack([np.asarray(row) for row in rows])).long()


class TestRows:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"layers": [1, 0]},
            {"hook_names": ["hook_embed", RESID_POST[1]]},
            {"seqpos_slice": (2, -1)},
            {"exclude_special_tokens": list(range(1, 200))},
            {"exclude_special_tokens": [3, 5], "seqpos_slice": (0, None, 3)},
            {
                "sae": sae_config(d_in=8),
                "hook_name": "blocks.{layer}.attn.hook_z",
                "hook_head_index": 1,
            },
            {"autocast_lm": True},
        ],
        ids=["all", "order", "embed", "slice", "special", "both", "head", "autocast"],
    )
    def test_are_bit_identical_to_those_of_the_live_store(
        self, model, cache_config, harvest, token_dataset, changes
    ):
        cfg = cache_config(training_tokens=330, **changes)
        cache = harvest(cfg)
        rows = rows_of(cache)
        assert len(rows) == cache.n_tokens >= 330
        assert len(cache.shards) > 1
        assert torch.equal(rows, live_rows(model, cfg, token_dataset, len(rows)))

    def test_of_documents_that_are_joined(
        self, model, cache_config, harvest, text_dataset
    ):
        cfg = cache_config(prepend_bos=True)
        cache = harvest(cfg, text_dataset.to_iterable_dataset())
        rows = rows_of(cache)
        assert torch.equal(rows, live_rows(model, cfg, text_dataset, len(rows)))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_are_only_rounded_in_another_dtype(
        self, cache_config, harvest, tmp_path, dtype
    ):
        exact = rows_of(harvest(cache_config()))
        path = str(tmp_path / "rounded")
        name = str(dtype).removeprefix("torch.")
        cache = harvest(cache_config(dtype=name, cached_activations_path=path))
        assert torch.equal(rows_of(cache), exact.to(dtype))
        assert not torch.equal(exact.to(dtype).float(), exact)

    def test_have_their_tokens(self, cache_config, harvest, token_dataset):
        cfg = cache_config(
            seqpos_slice=(1, -2), exclude_special_tokens=list(range(1, 99))
        )
        tokens = tokens_of(token_dataset)
        place = 0
        for rows, text in harvest(cfg).read():
            n_prompts = len(text.tokens)
            assert torch.equal(text.tokens.long(), tokens[place : place + n_prompts])
            place += n_prompts
            kept = text.tokens[:, 1:-2].flatten()
            assert torch.equal(text.token_ids, kept[kept >= 99])
            expected = torch.arange(N_CTX)[1:-2].repeat(n_prompts)[kept >= 99]
            assert torch.equal(text.position.long(), expected)
            assert len(rows) == len(text.prompt) == len(expected)
        assert place > 0

    def test_can_be_opened_without_this_package(self, cache_config, harvest):
        cache = harvest(cache_config())
        with safe_open(cache.shards[0].folder / "activations.safetensors", "pt") as f:
            found = [f.get_tensor(name) for name in RESID_POST]
        assert torch.equal(torch.stack(found, 1), rows_of(cache)[: len(found[0])])

    def test_that_overflow_are_an_error(self, model, cache_config, harvest, tmp_path):
        model.blocks[1].mlp.b_out.data[3] = 1e5
        with pytest.raises(NonFiniteActivationError, match=r"blocks\.1.*float16"):
            harvest(cache_config(dtype="float16"))
        assert not list((tmp_path / "cache").glob("shard-*"))


class TestStore:
    def test_without_mixing_serves_the_same_as_the_live_store(
        self, model, cache_config, harvest, token_dataset
    ):
        """Over several epochs."""
        cfg = cache_config(training_tokens=1024, activations_mixing_fraction=0.0)
        cache = harvest(cfg)
        live = MultiLayerActivationsStore.from_config(model, cfg, token_dataset)
        cfg.training_tokens = live.total_training_tokens = 3000
        assert torch.equal(serve(cached_store(cache, cfg), 40), serve(live, 40))

    @pytest.mark.parametrize(
        ("batch", "buffer", "mixing"), list(product([1, 60, 500], [1, 40], [0.1, 0.9]))
    )
    def test_serves_each_token_once_in_each_epoch(
        self, cache_config, harvest, batch, buffer, mixing
    ):
        cache = harvest(cache_config())
        expected = counted(rows_of(cache))
        store = cached_store(
            cache,
            cache_config(
                train_batch_size_tokens=batch,
                n_batches_in_buffer=buffer,
                activations_mixing_fraction=mixing,
                training_tokens=10**6,
            ),
        )
        n = cache.n_tokens
        served = serve(store, -(-3 * n // batch))[: 3 * n]
        epochs = served.split(n)
        assert all(counted(epoch) == expected for epoch in epochs)
        assert not torch.equal(epochs[0], epochs[1])
        assert not torch.equal(epochs[0], rows_of(cache))

    @pytest.mark.parametrize("mixing", [0.0, 0.5])
    @pytest.mark.parametrize("count", [3, 5])
    def test_ranks_share_the_tokens_of_each_epoch(
        self, cache_config, harvest, count, mixing
    ):
        cache = harvest(cache_config())
        assert cache.n_blocks % count  # some ranks have one more
        cfg = cache_config(
            train_batch_size_tokens=1,
            activations_mixing_fraction=mixing,
            training_tokens=10**6,
        )
        served = []
        for index in range(count):
            ranks = Ranks(index, count)
            source = CacheSource.from_config(cache, RESID_POST, cfg, ranks)
            blocks = [int(source.next_chunk())]
            while not source.epoch_ended:
                blocks.append(int(source.next_chunk()))
            again = CacheSource.from_config(cache, RESID_POST, cfg, ranks)
            store = MultiLayerActivationsStore.from_source(again, cfg)
            served.append(serve(store, sum(map(cache.n_tokens_of, blocks))))
        assert counted(torch.cat(served)) == counted(rows_of(cache))

    def test_more_ranks_than_blocks_are_an_error(self, cache_config, harvest):
        cache = harvest(cache_config())
        ranks = Ranks(0, cache.n_blocks + 1)
        with pytest.raises(ValueError, match="a block of tokens for each of"):
            CacheSource.from_config(cache, RESID_POST, cache_config(), ranks)

    def test_the_seed_decides_the_order(self, cache_config, harvest):
        cache = harvest(cache_config())

        def batches(seed) -> Tensor:
            return serve(cached_store(cache, cache_config(seed=seed)), 10)

        assert torch.equal(batches(1), batches(1))
        assert not torch.equal(batches(1), batches(2))

    def test_global_random_state_is_unchanged(self, cache_config, harvest):
        store = cached_store(harvest(cache_config()), cache_config())
        before = torch.get_rng_state()
        serve(store, 30)
        assert torch.equal(torch.get_rng_state(), before)

    def test_neighbours_in_the_text_are_far_apart(
        self, model, cache_config, cache_runner
    ):
        """Beside the live store with a buffer of the same size."""
        tokens = np.random.default_rng(0).integers(1, D_VOCAB, (512, N_CTX))
        data = Dataset.from_dict({"input_ids": tokens})
        cfg = cache_config(
            training_tokens=tokens.size, n_batches_in_buffer=64, prepend_bos=False
        )
        cache = cache_runner(cfg, data).run()
        assert (cache.n_tokens, cache.n_blocks) == (8192, 64 * 7)
        place = {row.numpy().tobytes(): i for i, row in enumerate(rows_of(cache))}

        def apart(store) -> tuple[float, float]:
            """Mean number of 512ths of the text in a batch of 64; correlation of the
            places in the text and in the training."""
            order = [place[row.numpy().tobytes()] for row in serve(store, 128)]
            batches = torch.tensor(order).view(128, 64)
            prompts = [len((batch // N_CTX).unique()) for batch in batches]
            corr = np.corrcoef(order, np.arange(len(order)))[0, 1]
            return float(np.mean(prompts)), float(corr)

        cached, corr = apart(cached_store(cache, cfg))
        live, live_corr = apart(
            MultiLayerActivationsStore.from_config(model, cfg, data)
        )
        print(f"prompts in a batch: cache {cached:.1f}, live {live:.1f}")
        # Drawn at random from all text, 64 tokens are of 60.1 of the 512 prompts.
        assert cached > 45
        assert abs(corr) < 0.1
        assert live_corr > 0.9
        assert cached > live - 2

    @pytest.mark.parametrize("layers", [[0], [1], [1, 0]], ids=str)
    def test_serves_some_of_the_layers(
        self, cache_config, harvest, monkeypatch, layers
    ):
        cache = harvest(cache_config())
        whole = serve(cached_store(cache, cache_config()), 5)
        read = count_calls(monkeypatch, Shard, "vectors")
        served = serve(cached_store(cache, cache_config(layers=layers)), 5)
        assert torch.equal(served, whole[:, layers])
        # Nothing of the others is read.
        names = [RESID_POST[layer] for layer in layers]
        assert read
        assert all(args[2] == names for args, _ in read)

    @pytest.mark.parametrize("mixing", [0.0, 0.5, 0.9])
    def test_alternating_stores_serve_the_same_as_one(
        self, cache_config, harvest, tmp_path, mixing
    ):
        """Each batch comes from a new store, loaded from the previous one's state."""
        cache = harvest(cache_config(training_tokens=500))
        cfg = cache_config(
            activations_mixing_fraction=mixing,
            training_tokens=2000,
            train_batch_size_tokens=50,
            n_batches_in_buffer=11,
        )
        expected = serve(cached_store(cache, cfg), 40)
        folder, served = tmp_path / "state", []
        folder.mkdir()
        for turn in range(40):
            store = cached_store(cache, cfg)
            if turn:
                store.load_from_checkpoint(folder)
            served.append(next(store))
            store.save_to_checkpoint(folder)
        assert torch.equal(torch.cat(served), expected)

    def test_resumes_with_the_same_cache_only(
        self, model, cache_config, harvest, token_dataset, tmp_path
    ):
        cfg = cache_config()
        store = cached_store(harvest(cfg), cfg)
        next(store)
        store.save_to_checkpoint(tmp_path)
        moved = tmp_path / "moved"
        (tmp_path / "cache").rename(moved)
        cached_store(ActivationCache(moved), cfg).load_from_checkpoint(tmp_path)
        other = harvest(cfg, token_dataset.select(range(30)))
        live = MultiLayerActivationsStore.from_config(model, cfg, token_dataset)
        for wrong in (cached_store(other, cfg), live):
            with pytest.raises(ValueError, match="the same cache"):
                wrong.load_from_checkpoint(tmp_path)

    def test_a_cache_smaller_than_a_batch_is_an_error(self, cache_config, harvest):
        cache = harvest(cache_config(training_tokens=100))
        store = cached_store(cache, cache_config(train_batch_size_tokens=200))
        with pytest.raises(ValueError, match=r"batch of 200 tokens.* it has 128"):
            next(store)

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_memory_does_not_grow_with_the_cache(
        self, tokenizer, cache_config, tmp_path
    ):
        wide = tiny_model(tokenizer, d_model=256, d_mlp=8)
        rng = np.random.default_rng(0)
        data = Dataset.from_dict({"input_ids": rng.integers(1, 512, (1024, N_CTX))})
        peaks = {}
        for n_tokens in (2**11, 2**11, 2**14):  # the first warms up
            cfg = cache_config(
                sae=sae_config(d_in=256),
                training_tokens=n_tokens,
                cached_activations_path=str(tmp_path / f"{len(peaks)}-{n_tokens}"),
            )
            runner = MultiLayerCacheActivationsRunner(cfg, data, wide, 2**21, 2**14)
            harvesting = peak_rss_mib(runner.run)
            store = cached_store(ActivationCache(runner.path), cfg)
            reading = peak_rss_mib(partial(drain, store, n_tokens // 64))
            peaks[n_tokens] = harvesting, reading
        # The caches take 4 and 32 MiB.
        for small, large in zip(peaks[2**11], peaks[2**14], strict=True):
            assert large < small + 10
