"""Reference: each analysis called by itself."""

from collections.abc import Iterator
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import D_VOCAB, N_CTX, count_calls
from dense import batch_of, random_sparse, sae_of
from sae_lens.saes.sae import SAEMetadata
from saes import HOOK_NAMES, random_lens, random_sae

from sae_lens_multilayer import evaluate
from sae_lens_multilayer.analysis import (
    ActiveLayerCounts,
    DistributionSums,
    ExampleCollector,
    HistogramSums,
    SampleCollector,
    Suite,
    TokenClassSums,
    VarianceSums,
    act_histograms,
    active_layers,
    coactive_latents,
    compare_with_single_layers,
    decoder_similarity,
    layer_distributions,
    load_results,
    max_activating_examples,
    output_tokens,
    redundancy,
    residual_stream,
    sampled_examples,
    save_results,
    token_classes,
    token_embeddings,
    token_similarity,
    token_unembeddings,
    transfer_matrix,
    variances,
)
from sae_lens_multilayer.analysis import suite as suite_module


@pytest.fixture
def tokens():
    return torch.randint(1, D_VOCAB, (5, N_CTX))


@pytest.fixture
def single_layers():
    return [single_layer(name) for name in HOOK_NAMES]


def single_layer(hook_name):
    return random_sae(metadata=SAEMetadata(hook_names=[hook_name], model_name="tiny"))


OPTIONS: Any = {"exclude_tokens": [3], "exclude_positions": [0, 2]}


def test_each_is_the_analysis_by_itself(model, tokens, single_layers):
    sae = random_sae()
    sae.lens = random_lens()
    suite = Suite(
        sae, model, tokens, n_examples=2, single_layers=single_layers, **OPTIONS
    )
    found = suite.run()
    assert list(found) == suite.available()
    W_dec, call = sae.W_dec.detach(), (sae, model, tokens)
    dists = layer_distributions(*call, **OPTIONS)
    latents = dists.most_active(4).tolist()
    lens = sae.lens
    expected = {
        "evaluation": evaluate(*call, **OPTIONS),
        "single_layer_comparison": compare_with_single_layers(
            sae, single_layers, model, tokens, **OPTIONS
        ),
        "layer_distributions": dists,
        "variances": variances(*call, **OPTIONS),
        "active_layers": active_layers(*call, **OPTIONS),
        "max_activating_examples": max_activating_examples(
            *call, n_examples=2, **OPTIONS
        ),
        "sampled_examples": sampled_examples(*call, n_examples=30, **OPTIONS),
        "act_histograms": act_histograms(*call, **OPTIONS),
        "coactive_latents": coactive_latents(*call, **OPTIONS),
        "token_classes": token_classes(*call, latents, **OPTIONS),
        "residual_stream": residual_stream(model, HOOK_NAMES, tokens, **OPTIONS),
        "residual_stream_after_lens": residual_stream(
            model, HOOK_NAMES, tokens, lens=lens, **OPTIONS
        ),
        "decoder_similarity": decoder_similarity(W_dec),
        "token_embeddings": token_similarity(W_dec, token_embeddings(model)),
        "token_unembeddings": token_similarity(W_dec, token_unembeddings(model)),
        "output_tokens": output_tokens(sae, model),
        "redundancy": redundancy(W_dec, dists),
        "transfer_matrix": transfer_matrix(
            single_layers, model, tokens, multi_layer=sae, **OPTIONS
        ),
    }
    assert found.keys() == expected.keys()
    for name, result in found.items():
        pd.testing.assert_frame_equal(
            result.to_dataframe(), expected[name].to_dataframe()
        )


def test_given_results_are_not_computed_again(
    model, tokens, single_layers, monkeypatch
):
    suite = Suite(random_sae(), model, tokens, single_layers=single_layers, **OPTIONS)
    known = suite.run()
    calls = count_calls(monkeypatch, model, "forward")
    assert suite.run(known=known) == known
    assert not calls
    names = ["redundancy", "token_classes"]
    rest = {name: known[name] for name in known if name not in names}
    again = suite.run(names, known=rest)
    assert list(again) == ["token_classes", "redundancy"]
    for name in names:
        assert again[name].to_dataframe().equals(known[name].to_dataframe())


def test_a_comparison_evaluates_each_side_once(
    model, tokens, single_layers, monkeypatch
):
    multi_layer = random_sae()
    suite = Suite(multi_layer, model, tokens, single_layers=single_layers)
    calls = count_calls(monkeypatch, suite_module, "evaluate")
    known = suite.run(["evaluation", "single_layer_comparison"])
    assert len(calls) == 2
    suite.run(["single_layer_comparison"], {"evaluation": known["evaluation"]})
    assert [args[0] is multi_layer for args, _ in calls] == [True, False, False]


@pytest.mark.parametrize("name", ["redundancy", "token_classes"])
def test_one_needs_the_distributions_alone(model, tokens, name, monkeypatch):
    suite = Suite(random_sae(), model, tokens)
    calls = count_calls(monkeypatch, model, "run_with_cache")
    assert list(suite.run([name])) == [name]
    assert len(calls) == (1 if name == "redundancy" else 2)


def test_prompts_that_predict_nothing_are_found_before_any_pass(
    model, tokens, monkeypatch
):
    calls = count_calls(monkeypatch, model, "forward")
    with pytest.raises(ValueError, match="at least one predicted token"):
        Suite(random_sae(), model, tokens[:, :1]).run()
    # Only longer prompts, which check whether the model runs from the middle.
    assert all(args[0].shape[1] > 1 for args, _ in calls)


def test_analyses_that_an_sae_does_not_allow_are_unavailable(
    model, tokens, single_layers
):
    sae = random_sae()
    available = Suite(sae, model, tokens).available()
    assert {"evaluation", "redundancy"} <= set(available)
    absent = {
        "residual_stream_after_lens",
        "single_layer_comparison",
        "transfer_matrix",
    }
    assert not absent & set(available)
    names = ["variances", "transfer_matrix", "no_such"]
    with pytest.raises(ValueError, match="'transfer_matrix' needs single-layer SAEs"):
        Suite(sae, model, tokens).run(names)
    with pytest.raises(ValueError, match="'no_such' needs a row in ANALYSES"):
        Suite(sae, model, tokens).run(names)
    single_layers[0].lens = random_lens(HOOK_NAMES[:1])
    suite = Suite(sae, model, tokens, single_layers=single_layers)
    assert suite.missing("transfer_matrix") == "single-layer SAEs without a lens"
    available = suite.available()
    assert absent & set(available) == {"single_layer_comparison"}
    of_other_width = Suite(random_sae(d_in=32), model, tokens).available()
    others = {"token_embeddings", "token_unembeddings", "output_tokens"}
    assert others == {*available} - {*of_other_width} - absent
    with pytest.raises(ValueError, match=r"the multi-layer SAE's; got .*mlp_out"):
        Suite(sae, model, tokens, single_layers=[single_layer("blocks.7.hook_mlp_out")])


def test_results_are_read_back_by_name(model, tokens, single_layers, tmp_path):
    sae = random_sae()
    sae.lens = random_lens()
    results = Suite(sae, model, tokens, single_layers=single_layers).run()
    save_results(results, tmp_path / "all", model.tokenizer)
    (tmp_path / "all" / "picture.png").touch()
    found = load_results(tmp_path / "all")
    assert found.keys() == results.keys()
    for name, result in results.items():
        assert type(found[name]) is type(result)
        pd.testing.assert_frame_equal(found[name].to_dataframe(), result.to_dataframe())
    with pytest.raises(FileExistsError):
        save_results(results, tmp_path / "all")
    settings = tmp_path / "all" / "variances" / "record.json"
    settings.write_text(settings.read_text().replace('"Variances"', '"Path"'))
    with pytest.raises(ValueError, match=r"must hold one of \[.*got Path"):
        load_results(tmp_path / "all")


def test_nothing_that_is_held_grows_with_the_tokens():
    def held(n_batches: int) -> dict[str, int]:
        sae = sae_of(random_sparse(0, 1, 3, 8))
        sums = [
            DistributionSums(sae),
            VarianceSums(sae),
            ActiveLayerCounts(sae),
            TokenClassSums(sae, [0, 3]),
            ExampleCollector(sae, 2),
            SampleCollector(sae, 2),
            HistogramSums(sae),
        ]
        for i in range(n_batches):
            batch = batch_of(random_sparse(i, 1000, 3, 8), first_prompt=i)
            for one in sums:
                one.update(batch)
        return {type(s).__name__: sum(map(n_bytes, tensors_in(s))) for s in sums}

    few, many = held(10), held(100)
    for name, size in many.items():
        assert size <= 1.1 * few[name], name
        assert size > 0


def n_bytes(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)
    elif hasattr(value, "__dict__"):
        yield from tensors_in(list(vars(value).values()))
