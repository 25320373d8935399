"""A source of vectors without text: all that a store needs of one.

Authority: the vectors that the source is defined to give.
"""

import pytest
import torch

from sae_lens_multilayer import MultiLayerActivationsStore
from sae_lens_multilayer.store.source import Source

N_LAYERS, D_IN, N_CHUNKS = 2, 16, 10


class Counting(Source):
    """Token `i` of an epoch has the value `i` in all entries, plus the layer / 2."""

    def __init__(self):
        self.hook_names = [f"blocks.{i}.hook_resid_post" for i in range(N_LAYERS)]
        self.d_in, self.dtype, self.max_tokens_per_chunk = D_IN, torch.float32, 20
        self.excluded_token_ids = []

    def next_chunk(self):
        index = self.n_chunks % N_CHUNKS
        self.n_chunks += 1
        self.epoch_ended = index == N_CHUNKS - 1
        return torch.tensor([[index]])

    def n_tokens(self, chunk):
        return 20

    def vectors(self, chunk, rows=None):
        rows = torch.arange(20) if rows is None else rows
        for layer in range(N_LAYERS):
            values = int(chunk) * 20 + rows + layer / 2
            yield values.unsqueeze(1).expand(-1, D_IN)

    def state(self):
        return {"n_chunks": torch.tensor(self.n_chunks)}

    def resume(self, state):
        self.n_chunks = int(state["n_chunks"])
        self.epoch_ended = self.n_chunks > 0 and self.n_chunks % N_CHUNKS == 0


def make_store(make_config):
    cfg = make_config(train_batch_size_tokens=25, training_tokens=10_000)
    return MultiLayerActivationsStore.from_source(Counting(), cfg)


def test_a_store_needs_no_text(make_config, tmp_path):
    store = make_store(make_config)
    for _ in range(3):  # epochs
        served = torch.cat([next(store) for _ in range(8)])
        assert served[:, 0, 0].sort().values.tolist() == list(range(200))
        assert torch.equal(served[:, 1], served[:, 0] + 0.5)
    next(store)
    store.save_to_checkpoint(tmp_path)
    resumed = make_store(make_config)
    resumed.load_from_checkpoint(tmp_path)
    assert all(torch.equal(next(resumed), next(store)) for _ in range(20))


def test_prompts_of_a_source_without_text(make_config):
    store = make_store(make_config)
    assert store.source.evaluation_prompts(4) is None
    with pytest.raises(ValueError, match="Counting"):
        store.get_batch_tokens(4)
