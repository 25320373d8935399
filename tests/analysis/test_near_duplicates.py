"""Reference: brute force over all pairs."""

import itertools

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_lens_multilayer.analysis import (
    LayerDistributions,
    Redundancy,
    geometry,
    redundancy,
)


def distributions(counts):
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(len(counts))]
    return LayerDistributions(names, 10, counts, counts.double())


@given(st.integers(0, 2**32), st.floats(-0.9, 0.9), st.floats(0, 1))
def test_finds_all_pairs_and_their_overlaps(seed, min_cos_sim, max_overlap):
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    counts = torch.randint(-2, 4, (4, 12), generator=generator).clamp(min=0)
    counts[0, :2] = 1
    dists = distributions(counts)
    found = redundancy(
        W_dec, dists, min_cos_sim=min_cos_sim, max_overlap=max_overlap, n_null=50
    )
    unit = W_dec / W_dec.norm(dim=1, keepdim=True)
    expected = {
        (i, j): torch.minimum(dists.probs[:, i], dists.probs[:, j]).sum().item()
        for i, j in itertools.combinations(range(12), 2)
        if unit[i] @ unit[j] >= min_cos_sim and counts[:, [i, j]].sum(0).all()
    }
    pairs = [tuple(pair) for pair in found.pairs.tolist()]
    assert sorted(pairs) == sorted(expected)
    for pair, overlap in zip(pairs, found.overlap.tolist(), strict=True):
        assert overlap == pytest.approx(expected[pair], abs=1e-12)
    disjoint = [pair for pair in pairs if expected[pair] <= max_overlap]
    assert found.is_disjoint.sum() == len(disjoint)
    assert len(found.null_overlap) == 50


def test_no_overlap_is_beyond_one():
    counts = torch.randint(1, 9, (7, 100)).repeat(1, 2)
    dists = distributions(counts)
    assert dists.probs.sum(0).max() > 1  # by rounding
    found = redundancy(torch.randn(100, 9).repeat(2, 1), dists, min_cos_sim=0.999)
    assert found.overlap.max() == 1


def test_the_null_is_pairs_of_different_active_latents():
    # Three active latents: 0 and 1 share their layer, 3 has another.
    counts = torch.tensor([[5, 2, 0, 0], [0, 0, 0, 7]])
    found = redundancy(torch.eye(4), distributions(counts), n_null=30_000)
    assert found.n_active == 3
    assert set(found.null_overlap.tolist()) == {0.0, 1.0}
    # Of the three pairs of different latents, two are disjoint.
    assert found.null_disjoint_fraction == pytest.approx(2 / 3, abs=0.02)
    again = redundancy(torch.eye(4), distributions(counts), n_null=30_000)
    assert again.null_overlap.equal(found.null_overlap)
    assert len(found.pairs) == 0
    assert found.disjoint_fraction != found.disjoint_fraction  # NaN


def test_a_direction_learnt_once_for_each_layer_is_redundant(tmp_path, monkeypatch):
    monkeypatch.setattr(geometry, "_ELEMENTS", 100)
    directions = torch.randn(20, 32)
    W_dec = directions.repeat(2, 1) + 0.01 * torch.randn(40, 32)
    counts = torch.zeros(2, 40, dtype=torch.long)
    counts[0, :20] = counts[1, 20:] = 1
    found = redundancy(W_dec, distributions(counts), min_cos_sim=0.95)
    assert found.pairs.tolist() == [[i, i + 20] for i in range(20)]
    assert found.disjoint_fraction == 1
    assert found.null_disjoint_fraction == pytest.approx(20 / 39, abs=0.02)
    found.save(tmp_path / "redundancy")
    loaded = Redundancy.load(tmp_path / "redundancy")
    table = loaded.to_dataframe()
    pd.testing.assert_frame_equal(table, found.to_dataframe())
    assert table.cos_sim.is_monotonic_decreasing
    assert table.disjoint.all()


def test_wrong_input_is_an_error():
    counts = torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="same SAE; got 3 and 4 latents"):
        redundancy(torch.eye(3), distributions(counts))
    with pytest.raises(ValueError, match="at least two active latents; got 1"):
        redundancy(torch.eye(4), distributions(torch.tensor([[0, 1, 0, 0]])))
