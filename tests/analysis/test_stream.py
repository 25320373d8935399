"""The batches of an analysis, compared with `run_with_cache` and dense encoding."""

import pytest
import torch
from conftest import D_MODEL, D_VOCAB, N_CTX, count_calls, tiny_model, tiny_sae_config
from datasets import Dataset
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    HookedSAETransformer,
    JumpReLUTrainingSAEConfig,
    LanguageModelSAETrainingRunner,
    StandardTrainingSAEConfig,
)
from saes import HOOK_NAMES, random_lens, random_sae

from sae_lens_multilayer import MultiLayerActivationsStore, views
from sae_lens_multilayer.analysis import (
    ActiveLayerCounts,
    DistributionSums,
    ExampleCollector,
    TokenClassSums,
    TokenStream,
    VarianceSums,
    analyze,
    layer_distributions,
)
from sae_lens_multilayer.evaluation import encoder

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:sae_lens")


@pytest.fixture
def tokens():
    return torch.randint(1, D_VOCAB, (7, N_CTX))


def all_accumulators(sae):
    return [
        DistributionSums(sae),
        VarianceSums(sae),
        ActiveLayerCounts(sae),
        ExampleCollector(sae),
        TokenClassSums(sae, [1, 5]),
    ]


def test_several_analyses_share_a_pass(model, tokens, monkeypatch):
    sae = random_sae()
    forward = count_calls(monkeypatch, model, "run_with_cache")
    encode = count_calls(monkeypatch, sae, "encode_topk")
    together = analyze(sae, model, tokens, *all_accumulators(sae), batch_size_prompts=3)
    assert len(forward) == len(encode) == 3
    for result, accumulator in zip(together, all_accumulators(sae), strict=True):
        (alone,) = analyze(sae, model, tokens, accumulator, batch_size_prompts=3)
        assert result.to_dataframe().equals(alone.to_dataframe())


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_no_result_depends_on_the_batch_size(tokenizer, tokens, size):
    model = tiny_model(tokenizer, dtype=torch.float64)
    sae = random_sae().double()
    whole = analyze(sae, model, tokens, *all_accumulators(sae))
    parts = analyze(sae, model, tokens, *all_accumulators(sae), batch_size_prompts=size)
    for a, b in zip(whole, parts, strict=True):
        left, right = a.to_dataframe(), b.to_dataframe()
        for column in left.select_dtypes("number"):
            assert right[column].to_numpy() == pytest.approx(
                left[column].to_numpy(), rel=1e-9, abs=1e-9, nan_ok=True
            )


@pytest.mark.parametrize("elements", [1, 200, 2**24])
@pytest.mark.parametrize(
    "sae_config",
    [
        tiny_sae_config(normalize_activations="none"),
        StandardTrainingSAEConfig(d_in=D_MODEL, d_sae=64),
        JumpReLUTrainingSAEConfig(d_in=D_MODEL, d_sae=64),
        BatchTopKTrainingSAEConfig(d_in=D_MODEL, d_sae=64, k=4),
    ],
    ids=lambda config: config.architecture(),
)
def test_any_architecture_is_analysed(
    tokenizer, tokens, make_config, token_dataset, sae_config, elements, monkeypatch
):
    monkeypatch.setattr(encoder, "_DENSE_ELEMENTS", elements)
    model = tiny_model(tokenizer, HookedSAETransformer)
    config = make_config(sae=sae_config, output_path=None, checkpoint_path=None)
    sae = LanguageModelSAETrainingRunner(
        config, override_dataset=token_dataset, override_model=model
    ).run()
    dists = layer_distributions(sae, model, tokens)
    _, cache = model.run_with_cache(tokens)
    for layer, view in enumerate(views(sae)):
        acts = view.encode(cache[HOOK_NAMES[layer]]).flatten(0, 1).double().detach()
        torch.testing.assert_close(
            dists.totals[layer], acts.sum(0), rtol=1e-5, atol=1e-5
        )
        assert dists.counts[layer].equal((acts > 0).sum(0))
        assert dists.counts[layer].any()


def test_an_sae_with_a_lens_is_analysed(model, tokens):
    sae = random_sae()
    sae.lens = random_lens()
    dists = layer_distributions(sae, model, tokens)
    _, cache = model.run_with_cache(tokens)
    for layer, name in enumerate(HOOK_NAMES):
        acts = sae.encode(cache[name].flatten(0, 1), name).double().detach()
        assert dists.counts[layer].equal((acts > 0).sum(0))
        torch.testing.assert_close(
            dists.totals[layer], acts.sum(0), rtol=1e-5, atol=1e-5
        )
    plain = layer_distributions(random_sae(), model, tokens)
    assert not plain.counts.equal(dists.counts)


def test_a_lens_of_another_model_is_a_warning(model, tokens):
    sae = random_sae()
    sae.lens = random_lens(unembed_hash="of another")
    with pytest.warns(UserWarning, match="may be for another model"):
        layer_distributions(sae, model, tokens)


def make_store(model, dataset, make_config, **changes):
    config = make_config(**changes)
    return MultiLayerActivationsStore.from_config(model, config, dataset)


def test_prompts_are_taken_from_a_store(model, token_dataset, make_config):
    sae = random_sae()
    store = make_store(model, token_dataset, make_config)
    dists = layer_distributions(sae, model, store, n_prompts=10, batch_size_prompts=4)
    tokens = torch.tensor(token_dataset[:]["input_ids"])
    expected = layer_distributions(sae, model, tokens[:10], batch_size_prompts=4)
    assert dists.to_dataframe().equals(expected.to_dataframe())
    # The next analysis continues in the dataset.
    dists = layer_distributions(sae, model, store, n_prompts=2)
    expected = layer_distributions(sae, model, tokens[10:12])
    assert dists.to_dataframe().equals(expected.to_dataframe())
    assert layer_distributions(sae, model, store).n_tokens == 4 * N_CTX


def test_a_store_with_too_few_prompts_is_an_error(model, token_dataset, make_config):
    store = make_store(model, token_dataset, make_config)
    with pytest.raises(ValueError, match="`n_prompts` must be at most 64"):
        layer_distributions(random_sae(), model, store, n_prompts=1000)


def test_tokens_that_a_store_excludes_are_left_out(model, make_config):
    ids = torch.randint(1, D_VOCAB, (8, N_CTX))
    ids[:, ::3] = 0  # the end-of-text token
    dataset = Dataset.from_dict({"input_ids": ids.tolist()})
    store = make_store(model, dataset, make_config, exclude_special_tokens=True)
    dists = layer_distributions(random_sae(), model, store, n_prompts=8)
    assert dists.n_tokens == (ids != 0).sum()
    store = make_store(model, dataset, make_config, exclude_special_tokens=True)
    dists = layer_distributions(
        random_sae(), model, store, n_prompts=8, exclude_tokens=[]
    )
    assert dists.n_tokens == ids.numel()


def test_batches_have_the_prompt_and_position_of_their_tokens(model, tokens):
    tokens[2:4] = 0
    _, cache = model.run_with_cache(tokens)
    stream = TokenStream(
        model, HOOK_NAMES, tokens, exclude_tokens=[0], batch_size_prompts=2
    )
    n_prompts = 0
    for batch in stream:
        assert batch.first_prompt == n_prompts
        where = batch.first_prompt + batch.prompt, batch.position
        assert batch.token_ids.equal(tokens[where])
        for layer, name in enumerate(HOOK_NAMES):
            torch.testing.assert_close(batch.x[:, layer], cache[name][where])
        n_prompts += len(batch.prompts)
    assert n_prompts == 7


def test_wrong_input_is_an_early_error(model, tokens):
    sae = random_sae()
    sums = DistributionSums(sae)
    with pytest.raises(ValueError, match="All tokens are excluded"):
        analyze(sae, model, tokens, sums, exclude_tokens=list(range(D_VOCAB)))
    with pytest.raises(ValueError, match="`batch_size_prompts` must be at least 1"):
        analyze(sae, model, tokens, sums, batch_size_prompts=0)
    with pytest.raises(ValueError, match="take from a store"):
        analyze(sae, model, tokens, sums, n_prompts=3)
    with pytest.raises(ValueError, match=r"Token ids must be in \[0, 512\)"):
        analyze(sae, model, tokens + D_VOCAB, sums)
    with pytest.raises(ValueError, match="must name its hooks"):
        analyze(sae.view(0), model, tokens, sums)
    with pytest.raises(ValueError, match=r"`d_in` must be 16.*got 8"):
        analyze(random_sae(d_in=8), model, tokens, sums)


def test_values_that_are_not_finite_are_an_error_that_names_the_hook(model, tokens):
    sae = random_sae()
    with torch.no_grad():
        model.get_parameter("blocks.1.mlp.b_out")[0] = torch.nan
    with pytest.raises(ValueError, match=r"finite and at least 0; one at 'blocks.1"):
        layer_distributions(sae, model, tokens)


def test_attached_saes_are_an_error(tokenizer, tokens):
    model = tiny_model(tokenizer, HookedSAETransformer)
    sae = random_sae()
    assert isinstance(model, HookedSAETransformer)
    model.add_sae(sae.view(0))
    with pytest.raises(ValueError, match="must have no SAEs attached"):
        layer_distributions(sae, model, tokens)
