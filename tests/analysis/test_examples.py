"""Reference: all activations sorted by hand."""

import json

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from conftest import D_VOCAB, N_CTX
from dense import accumulate, batch_of, random_sparse, sae_of, seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from saes import random_sae

from sae_lens_multilayer.analysis import (
    ExampleCollector,
    Examples,
    SampleCollector,
    examples,
    max_activating,
    max_activating_examples,
)

N_PROMPTS, N_POS, LAYERS, D_SAE = 7, 6, 3, 5


def random_case(seed):
    """Prompts of which some tokens are left out, and activations of the others."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, 100, (N_PROMPTS, N_POS), generator=generator)
    kept = torch.rand(N_PROMPTS, N_POS, generator=generator) < 0.8
    acts = random_sparse(seed, N_PROMPTS, N_POS, LAYERS, D_SAE)
    return prompts, kept, acts * kept[..., None, None]


def batches(prompts, kept, acts, size):
    for start in range(0, N_PROMPTS, size):
        some = slice(start, start + size)
        yield batch_of(acts[some][kept[some]], prompts[some], start, kept[some])


def brute_force(prompts, acts, n_examples, before, after, latents=None):
    rows = []
    for latent in latents or range(D_SAE):
        for layer in range(LAYERS):
            places = [
                (-acts[i, pos, layer, latent].item(), i, pos)
                for i in range(N_PROMPTS)
                for pos in range(N_POS)
                if acts[i, pos, layer, latent] > 0
            ]
            for rank, (act, i, pos) in enumerate(sorted(places)[:n_examples]):
                context = slice(max(0, pos - before), pos + after + 1)
                rows.append(
                    {
                        "latent": latent,
                        "layer": layer,
                        "rank": rank,
                        "act": -act,
                        "prompt": i,
                        "position": pos,
                        "token_id": prompts[i, pos].item(),
                        "context_index": min(pos, before),
                        "context_token_ids": prompts[i, context].tolist(),
                        "context_acts": acts[i, context, layer, latent].tolist(),
                        "layer_acts": acts[i, pos, :, latent].tolist(),
                    }
                )
    return rows


def to_rows(found):
    return json.loads(found.to_dataframe().to_json(orient="records"))


@settings(max_examples=50)
@given(
    seeds,
    st.integers(1, N_PROMPTS),
    st.integers(1, 5),
    st.integers(0, 4),
    st.integers(0, 7),
    st.integers(0, 60),
)
def test_is_brute_force_for_any_batch_size(seed, size, n, before, after, room):
    prompts, kept, acts = random_case(seed)
    collector = ExampleCollector(sae_of(acts[0]), n, n_before=before, n_after=after)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(max_activating, "_FEWEST_ROWS", room)
        found = accumulate(collector, batches(prompts, kept, acts, size))
    assert to_rows(found) == brute_force(prompts, acts, n, before, after)
    assert found.n_tokens == kept.sum()


def test_chosen_latents_alone():
    prompts, kept, acts = random_case(0)
    collector = ExampleCollector(sae_of(acts[0]), 3, latents=[4, 1])
    found = accumulate(collector, batches(prompts, kept, acts, 2))
    assert to_rows(found) == brute_force(prompts, acts, 3, 10, 5, latents=[1, 4])
    assert set(found.of(4, layer=1).latents.tolist()) == {4}
    assert set(found.of(4, layer=1).layers.tolist()) == {1}
    assert to_rows(found.of(1)) == [r for r in to_rows(found) if r["latent"] == 1]


@settings(max_examples=30)
@given(seeds, st.integers(1, N_PROMPTS), st.integers(1, 9), st.integers(0, 60))
def test_a_sample_is_the_same_for_any_batch_size(seed, size, n, room):
    prompts, kept, acts = random_case(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(max_activating, "_FEWEST_ROWS", room)
        found, at_once = (
            accumulate(
                SampleCollector(sae_of(acts[0]), n, n_before=2, n_after=1),
                batches(prompts, kept, acts, s),
            )
            for s in (size, N_PROMPTS)
        )
    assert to_rows(found) == to_rows(at_once)
    everything = brute_force(prompts, acts, N_PROMPTS * N_POS, 2, 1)
    for row in everything:
        row["rank"] = 0
    sample = [{**row, "rank": 0} for row in to_rows(found)]
    assert all(row in everything for row in sample)
    for latent in range(D_SAE):
        n_acts = int((acts[..., latent] > 0).sum())
        own = [row for row in sample if row["latent"] == latent]
        assert len(own) == min(n, n_acts)
        assert len({(r["layer"], r["prompt"], r["position"]) for r in own}) == len(own)


def test_every_activation_has_the_same_chance_in_a_sample():
    acts = torch.ones(400, 4, 100)
    collector = SampleCollector(sae_of(acts), 30, n_before=0, n_after=0)
    found = accumulate(collector, [batch_of(acts)])
    assert len(found.latents) == 100 * 30
    for values, n in ((found.layers, 4), (found.positions, 400)):
        # Standard deviation of the mean of 3000 uniform numbers: 0.0053.
        assert values.double().mean() / (n - 1) == pytest.approx(0.5, abs=0.02)
    assert found.positions.bincount(minlength=400).max() < 25  # 7.5 expected


def test_few_rows_are_held():
    acts = torch.rand(4, 1000, 2, 3)
    collector = ExampleCollector(sae_of(acts[0]), 5)
    for i in range(100):
        part = acts[i % 4] + i  # each batch has larger ones than all before
        collector.update(batch_of(part, torch.ones(1, 1000).long(), i))
    assert len(collector._table.cell) == max_activating._FEWEST_ROWS
    found = collector.compute()
    assert len(found.latents) == 5 * 6
    assert (found.acts > 99).all()


def test_file_is_parquet_with_text(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(examples, "_ROWS_PER_GROUP", 7)
    prompts, kept, acts = random_case(1)
    found = accumulate(
        ExampleCollector(sae_of(acts[0]), 4, n_before=2, n_after=1),
        batches(prompts, kept, acts, 3),
    )
    found.save(tmp_path / "examples", tokenizer=tokenizer)
    file = tmp_path / "examples" / "examples.parquet"
    table = pd.read_parquet(file)
    assert pq.ParquetFile(file).metadata.num_row_groups == -(-len(table) // 7)
    for row in table.to_dict("records"):
        place = row["context_index"]
        assert row["token"] == f"w{row['token_id']}"
        assert row["context_tokens"][place] == row["token"]
        assert row["context_acts"][place] == row["act"]
    loaded = Examples.load(tmp_path / "examples")
    pd.testing.assert_frame_equal(loaded.to_dataframe(), found.to_dataframe())
    assert loaded.context_ids.equal(found.context_ids)
    some = Examples.load(tmp_path / "examples", latents=[2])
    pd.testing.assert_frame_equal(some.to_dataframe(), found.of(2).to_dataframe())
    none = Examples.load(tmp_path / "examples", latents=[99])
    assert len(none.to_dataframe()) == 0


def test_a_pass_over_a_model_finds_the_largest(model):
    sae, tokens = random_sae(), torch.randint(1, D_VOCAB, (5, N_CTX))
    tokens[:, 3] = 0
    found = max_activating_examples(
        sae, model, tokens, n_examples=1, batch_size_prompts=2, exclude_tokens=[0]
    )
    _, cache = model.run_with_cache(tokens)
    x = torch.stack([cache[name] for name in found.hook_names], dim=2)
    acts = sae.encode(x).detach()
    acts[:, 3] = 0
    largest = acts.amax((0, 1))
    assert len(found.latents) == (largest > 0).sum()
    for row in found.to_dataframe().to_dict("records"):
        cell = row["layer"], row["latent"]
        own = acts[row["prompt"], row["position"]][cell].item()
        assert row["act"] == pytest.approx(own, rel=1e-5)
        assert row["act"] == pytest.approx(largest[cell].item(), rel=1e-5)


def test_wrong_numbers_are_errors():
    sae = random_sae()
    with pytest.raises(ValueError, match="`n_examples` must be at least 1"):
        ExampleCollector(sae, 0)
    for latents in ([], [64], [-1], [3, 3]):
        with pytest.raises(ValueError, match=r"in \[0, d_sae = 64\), each once"):
            ExampleCollector(sae, latents=latents)


def test_no_activation_is_an_error():
    acts = torch.zeros(3, 2, 4)
    with pytest.raises(ValueError, match="at any of the 3 tokens"):
        accumulate(ExampleCollector(sae_of(acts)), [batch_of(acts)])


def test_a_damaged_file_is_an_error(tmp_path):
    acts = random_sparse(0, 4, 2, 4)
    found = accumulate(ExampleCollector(sae_of(acts)), [batch_of(acts)])
    found.save(tmp_path / "examples")
    with pytest.raises(FileExistsError):
        found.save(tmp_path / "examples")
    file = tmp_path / "examples" / "examples.parquet"
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 3 : len(whole) // 2] = b"\xff" * (
        len(whole) // 2 - len(whole) // 3
    )
    for damaged in (b"PAR1 no PAR1", whole):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="must hold examples"):
            Examples.load(tmp_path / "examples")
    (tmp_path / "examples" / "examples.parquet").unlink()
    with pytest.raises(ValueError, match=r"must hold examples.*FileNotFound"):
        Examples.load(tmp_path / "examples")
