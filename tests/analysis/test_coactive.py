"""Reference: sets of vectors, compared pair by pair."""

import pytest
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
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_multilayer.analysis import CoactiveSums, coactive

D_SAE = 6


def vectors_of(acts, latent, kept=None):
    flat = acts.flatten(0, 1)[:, latent] > 0
    return {i for i in flat.nonzero().flatten().tolist() if kept is None or i in kept}


@settings(max_examples=50)
@given(seeds, cuts_of_twelve, st.sampled_from([1, 7, 2**22]))
def test_is_brute_force_for_any_batches(seed, cuts, elements):
    acts = random_sparse(seed, 12, 3, D_SAE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coactive, "_ELEMENTS", elements)
        found = accumulate(CoactiveSums(sae_of(acts), n_top=3), split(acts, cuts))
    assert (found.n_vectors, found.n_all_vectors) == (36, 36)
    sets = [vectors_of(acts, j) for j in range(D_SAE)]
    assert found.counts.tolist() == [len(s) for s in sets]
    for j in range(D_SAE):
        jaccard = {
            i: len(sets[i] & sets[j]) / max(1, len(sets[i] | sets[j]))
            for i in range(D_SAE)
            if i != j
        }
        largest = sorted(jaccard.values(), reverse=True)[:3]
        assert found.jaccard[j].tolist() == pytest.approx(largest)
        others = found.latents[j].tolist()
        assert [jaccard[i] for i in others] == pytest.approx(largest)
        assert found.both[j].tolist() == [len(sets[i] & sets[j]) for i in others]


@given(seeds, cuts_of_twelve)
def test_a_sample_does_not_depend_on_batches(seed, cuts):
    acts = random_sparse(seed, 12, 40, D_SAE)
    most = 200
    ends = sorted({*cuts, 12} - {0})
    parts = [  # one token in each prompt
        batch_of(acts[start:end], torch.ones(end - start, 1).long(), start)
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    whole = batch_of(acts, torch.ones(12, 1).long())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coactive, "_MOST_ACTS", most)
        sums = CoactiveSums(sae_of(acts))
        found = accumulate(sums, parts)
        at_once = accumulate(CoactiveSums(sae_of(acts)), [whole])
    assert found.to_dataframe().equals(at_once.to_dataframe())
    assert found.n_all_vectors == 480
    n_acts = int((acts > 0).sum())
    assert found.counts.sum() == len(sums._latents) <= most < n_acts
    # The vectors' shares of activations differ little, and the sample is random.
    assert found.n_vectors / 480 > 0.3 * most / n_acts
