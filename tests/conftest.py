"""Shared fixtures: a seeded two-layer model that needs no download, and its text."""

import os
from pathlib import Path

import huggingface_hub
import hypothesis
import numpy as np
import pytest
import torch
from datasets import Dataset
from sae_lens import LoggingConfig
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import AutoTokenizer

from sae_lens_multilayer import (
    ActivationCache,
    MultiLayerCacheActivationsRunner,
    MultiLayerConfig,
    MultiLayerTrainingSAEConfig,
)
from sae_lens_multilayer.models import loading
from sae_lens_multilayer.models.kinds import as_model

PAPER_DATA = Path(__file__).parent / "data" / "paper"
# Machines are shared, so examples have no deadline.
hypothesis.settings.register_profile(
    "shared",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("shared")

# pytest-xdist's processes share the cores.
if n_processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // n_processes))

N_LAYERS, D_MODEL, N_CTX, D_VOCAB = 2, 16, 16, 512


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(PAPER_DATA / "model")


@pytest.fixture
def model(tokenizer) -> HookedTransformer:
    return tiny_model(tokenizer)


def tiny_model(
    tokenizer, model_class=HookedTransformer, **changes
) -> HookedTransformer:
    settings = {
        "n_layers": N_LAYERS,
        "d_model": D_MODEL,
        "n_ctx": N_CTX,
        "d_head": 8,
        "n_heads": 2,
        "d_mlp": 32,
        "d_vocab": D_VOCAB,
        "act_fn": "gelu",
        "normalization_type": "LN",
        "seed": 0,
        "default_prepend_bos": False,
    }
    config = HookedTransformerConfig(**{**settings, **changes})
    return model_class(config, tokenizer=tokenizer).eval()


@pytest.fixture
def token_dataset() -> Dataset:
    """64 contexts of distinct random tokens; none is special."""
    rng = np.random.default_rng(0)
    return Dataset.from_dict({"input_ids": rng.integers(1, D_VOCAB, (64, N_CTX))})


@pytest.fixture
def text_dataset() -> Dataset:
    """200 short documents of words in the tokenizer's vocabulary."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(5, 40, 200)
    words = [rng.integers(1, D_VOCAB, n) for n in lengths]
    return Dataset.from_dict({"text": [" ".join(f"w{i}" for i in w) for w in words]})


@pytest.fixture
def make_config(tmp_path):
    """Build a small `MultiLayerConfig` that saves under the test's own folder."""

    def make(sae=None, **changes) -> MultiLayerConfig:
        settings = {
            "sae": sae or tiny_sae_config(),
            "model_name": "tiny",
            "context_size": N_CTX,
            "training_tokens": 512,
            "train_batch_size_tokens": 64,
            "store_batch_size_prompts": 4,
            "n_batches_in_buffer": 16,
            "logger": LoggingConfig(log_to_wandb=False),
            "output_path": str(tmp_path / "output"),
            "checkpoint_path": str(tmp_path / "checkpoints"),
            "prepend_bos": False,
            "verbose": False,
        }
        return MultiLayerConfig(**{**settings, **changes})

    return make


@pytest.fixture
def cache_config(make_config, tmp_path):
    """A config whose cache is under the test's own folder."""

    def config(**changes) -> MultiLayerConfig:
        settings = {
            "training_tokens": 1000,
            "cached_activations_path": str(tmp_path / "cache"),
        }
        return make_config(**{**settings, **changes})

    return config


@pytest.fixture
def cache_runner(model, token_dataset):
    """Build a runner that harvests shards of 128 tokens and blocks of 20."""

    def runner(cfg, dataset=None, model=model) -> MultiLayerCacheActivationsRunner:
        data = token_dataset if dataset is None else dataset
        sizes = {"shard_bytes": 150 * 2 * D_MODEL * 4, "block_bytes": 20 * D_MODEL * 4}
        return MultiLayerCacheActivationsRunner(cfg, data, model, **sizes)

    return runner


@pytest.fixture
def harvest(cache_runner):
    def harvest(cfg, dataset=None, **overrides) -> ActivationCache:
        return cache_runner(cfg, dataset, **overrides).run()

    return harvest


@pytest.fixture
def offline_hub(tmp_path, monkeypatch) -> Path:
    """An empty cache of the Hugging Face hub, which cannot be reached."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def offline(model, token_dataset, tmp_path, monkeypatch):
    """The tiny model under any name, its SAE, a run and its text in files."""
    monkeypatch.setattr(loading, "load_by_name", lambda *_: model)
    monkeypatch.setattr(loading, "shape_by_name", lambda *_: as_model(model).shape)
    token_dataset.to_parquet(tmp_path / "text.parquet")
    from saes import random_sae  # imports this file

    random_sae().save_model(tmp_path / "sae")
    (tmp_path / "run.yaml").write_text(
        f"{{model_name: tiny, dataset_path: text.parquet, context_size: {N_CTX},"
        f" sae: {{d_in: {D_MODEL}, d_sae: 64, k: 4}}, training_tokens: 64,"
        " train_batch_size_tokens: 64, store_batch_size_prompts: 2,"
        " n_batches_in_buffer: 4, logger: {log_to_wandb: false}}"
    )
    monkeypatch.chdir(tmp_path)
    return ["--dataset_path", "text.parquet", "--n_tokens", "64"]


def tiny_sae_config(**changes) -> MultiLayerTrainingSAEConfig:
    settings = {"d_in": D_MODEL, "d_sae": 64, "k": 4, "k_aux": 8}
    return MultiLayerTrainingSAEConfig(**{**settings, **changes})


def count_calls(monkeypatch, owner, name: str) -> list[tuple]:
    calls: list[tuple] = []
    original = getattr(owner, name)

    def counting(*args, **kwargs):
        calls.append((args, kwargs))
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counting)
    return calls
