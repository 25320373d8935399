"""Reference: brute force over the whole tensor."""

import pandas as pd
import torch
from dense import (
    accumulate,
    batch_of,
    cuts_of_twelve,
    random_sparse,
    sae_of,
    seeds,
    split,
)
from hypothesis import given
from hypothesis import strategies as st
from saes import random_sae

from sae_lens_multilayer.analysis import (
    ActiveLayerCounts,
    ActiveLayers,
    active_layers,
)


def test_worked_case():
    acts = torch.tensor([[[1.0, 0], [3, 0], [5, 0]], [[0, 0], [2, 0], [0, 0]]])
    found = accumulate(ActiveLayerCounts(sae_of(acts), 1.5), [batch_of(acts)])
    assert found.counts.tolist() == [[0, 0], [2, 0], [1, 0]]
    assert found.per_token.tolist() == [[1, 0], [1, 0], [0, 0]]
    assert found.n_active_tokens.tolist() == [2, 0]
    assert found.mean_per_token[0] == 1.5
    assert found.mean_per_token[1].isnan()
    assert found.overall().tolist() == [2, 0]
    assert found.overall(min_share=0.5).tolist() == [1, 0]


@given(seeds, cuts_of_twelve, st.sampled_from([0.0, 1.0, 2.5, 9.0]))
def test_any_split_gives_the_definition(seed, cuts, threshold):
    acts = random_sparse(seed, 12, 4, 6)
    counts = ActiveLayerCounts(sae_of(acts), threshold)
    found = accumulate(counts, split(acts, cuts))
    above = acts > threshold
    n_layers = above.sum(1)
    assert found.counts.equal(above.sum(0))
    for n in range(1, 5):
        assert found.per_token[n - 1].equal((n_layers == n).sum(0))
    assert found.overall().equal(above.any(0).sum(0))


def test_table_and_disk(model, tmp_path):
    tokens = torch.randint(1, 512, (3, 8))
    found = active_layers(random_sae(), model, tokens, threshold=0.1)
    found.save(tmp_path / "active")
    loaded = ActiveLayers.load(tmp_path / "active")
    assert loaded.threshold == 0.1
    pd.testing.assert_frame_equal(loaded.to_dataframe(), found.to_dataframe())
