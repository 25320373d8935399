"""Reference: each latent's values binned one by one."""

import math

import torch
from dense import accumulate, cuts_of_twelve, random_sparse, sae_of, seeds, split
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_multilayer.analysis import HistogramSums
from sae_lens_multilayer.analysis.histograms import N_BINS


@settings(max_examples=50)
@given(seeds, cuts_of_twelve, st.sampled_from([1e-6, 0.1, 1.0, 3e9]))
def test_is_brute_force_for_any_batches(seed, cuts, scale):
    growth = torch.logspace(0, 6, 12, dtype=torch.float64)[:, None, None]
    acts = random_sparse(seed, 12, 3, 5) * scale * growth
    found = accumulate(HistogramSums(sae_of(acts)), split(acts, cuts))
    assert found.n_tokens == 12
    for j in range(5):
        largest = acts[..., j].max().item()
        width = found.widths[j].item()
        if largest > 0:
            assert N_BINS / 2 <= largest / width < N_BINS
        assert math.log2(width).is_integer()
        for layer in range(3):
            expected = [0] * N_BINS
            for act in acts[:, layer, j].tolist():
                if act > 0:
                    expected[int(act / width)] += 1
            assert found.counts[layer, j].tolist() == expected
    table = found.to_dataframe()
    assert table["count"].sum() == (acts > 0).sum()
    assert (table["to"] - table["from"]).tolist() == found.widths[table.latent].tolist()
