"""References: brute force over the whole tensor, and the paper's `resid_cos_sim`."""

import json

import pandas as pd
import pytest
import torch
from conftest import D_MODEL, D_VOCAB, N_CTX, PAPER_DATA, tiny_model
from dense import batch_of
from paper import paper_numbers
from saes import HOOK_NAMES, random_lens
from safetensors.torch import load_file

from sae_lens_multilayer import MultiLayerActivationsStore
from sae_lens_multilayer.analysis import ResidualStream, residual_stream
from sae_lens_multilayer.analysis.residual import LayerMeans, ResidualSums
from sae_lens_multilayer.lens.config import LensConfig
from sae_lens_multilayer.lens.lens import LayerLens


def brute_force(x):
    """Of `x` [token, layer, d_in]."""
    centred = x - x.mean(0)
    n = x.shape[1]
    cos = torch.stack(
        [
            torch.cosine_similarity(centred[:, i], centred[:, j], dim=-1)
            for i in range(n)
            for j in range(n)
        ],
        dim=1,
    ).view(-1, n, n)
    norm = x.norm(dim=-1)
    return cos.mean(0), cos.var(0), norm.mean(0), norm.var(0)


def assert_agrees(found, x, **tolerance):
    names = ["cos_sim", "cos_sim_var", "norm", "norm_var"]
    for name, expected in zip(names, brute_force(x), strict=True):
        torch.testing.assert_close(
            getattr(found, name), expected.double(), msg=name, **tolerance
        )


def vectors(model, tokens):
    _, cache = model.run_with_cache(tokens)
    return torch.stack([cache[name] for name in HOOK_NAMES], dim=2).flatten(0, 1)


@pytest.fixture
def tokens():
    return torch.randint(1, D_VOCAB, (7, N_CTX))


def test_is_brute_force_over_the_models_vectors(model, tokens):
    model.to(torch.float64)
    found = residual_stream(model, HOOK_NAMES, tokens, batch_size_prompts=3)
    assert found.n_tokens == 7 * N_CTX
    assert not found.has_lens
    assert_agrees(found, vectors(model, tokens), rtol=1e-9, atol=1e-9)


def test_excluded_tokens_are_left_out(model, tokens):
    model.to(torch.float64)
    tokens[:, 0] = 0
    found = residual_stream(model, HOOK_NAMES, tokens, exclude_tokens=[0])
    x = vectors(model, tokens)[tokens.flatten() != 0]
    assert_agrees(found, x, rtol=1e-9, atol=1e-9)


def test_positions_are_left_out(model, tokens):
    model.to(torch.float64)
    found = residual_stream(model, HOOK_NAMES, tokens, exclude_positions=[0, -1])
    x = vectors(model, tokens).view(7, N_CTX, 2, D_MODEL)[:, 1:-1].flatten(0, 1)
    assert_agrees(found, x, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"`exclude_positions` must be in \[-16, 16\)"):
        residual_stream(model, HOOK_NAMES, tokens, exclude_positions=[16])


def test_a_store_gives_the_same_prompts_twice(model, token_dataset, make_config):
    config = make_config(context_size=N_CTX)
    store = MultiLayerActivationsStore.from_config(model, config, token_dataset)
    found = residual_stream(model, HOOK_NAMES, store, n_prompts=9, batch_size_prompts=4)
    tokens = torch.tensor(token_dataset["input_ids"][:9])
    assert_agrees(found, vectors(model, tokens), rtol=1e-4, atol=1e-5)


def paper_case():
    x = load_file(PAPER_DATA / "activations.safetensors")["resid_post"]
    numbers = json.loads(paper_numbers("analysis.json").read_text())["resid_cos_sim"]
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in range(5)]
    return x.flatten(1, 2).transpose(0, 1), numbers, hooks


def paper_lens(hooks):
    tensors = load_file(PAPER_DATA / "lens.safetensors")
    config = LensConfig(hooks, n_layers=5, d_in=64, alignment="reference")
    state = {
        name: tensor
        for name, tensor in tensors.items()
        if name.endswith((".weight", ".bias"))
    }
    lens = LayerLens(config)
    lens.load_state_dict(state)
    return lens


@pytest.mark.parametrize("kind", ["plain", "lens"])
def test_agrees_with_the_numbers_of_the_papers_code(kind):
    x, numbers, hooks = paper_case()
    lens = paper_lens(hooks) if kind == "lens" else None
    means, batches = LayerMeans(lens), [batch_of(part) for part in x.split(100)]
    for batch in batches:
        means.update(batch)
    sums = ResidualSums(hooks, means.compute(), lens)
    for batch in batches:
        sums.update(batch)
    table = sums.compute().to_dataframe()
    for ours, theirs in [("next_cos_sim", "cos_sim"), ("norm", "l2_norm")]:
        paper = numbers[kind][theirs]
        rows = len(paper["mean"])
        # The paper's sums are in float32, where a variance loses digits.
        for suffix, statistic in [("", "mean"), ("_std", "std"), ("_sem", "sem")]:
            found = table[ours + suffix].to_numpy()[:rows]
            assert found == pytest.approx(paper[statistic], rel=1e-4)


def test_a_lens_comes_first(model, tokens):
    lens = random_lens()
    found = residual_stream(model, HOOK_NAMES, tokens, lens=lens)
    assert found.has_lens
    x = lens.transform(vectors(model, tokens))
    assert_agrees(found, x, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"must be of the hooks \['blocks.1"):
        residual_stream(model, HOOK_NAMES[1:], tokens, lens=lens)


def test_tables_and_disk(model, tokens, tmp_path):
    found = residual_stream(model, HOOK_NAMES, tokens)
    found.save(tmp_path / "residual")
    loaded = ResidualStream.load(tmp_path / "residual")
    pd.testing.assert_frame_equal(loaded.to_dataframe(), found.to_dataframe())


def test_one_token_has_nothing_to_centre(model):
    with pytest.raises(ValueError, match="at least two tokens; got 1"):
        residual_stream(model, HOOK_NAMES, torch.ones(1, 1, dtype=torch.long))


def test_a_vector_that_is_not_finite_is_an_error(tokenizer, tokens):
    model = tiny_model(tokenizer)
    with torch.no_grad():
        model.get_parameter("blocks.1.mlp.b_out")[0] = torch.nan
    with pytest.raises(ValueError, match=r"must be finite; they are not at.*blocks.1"):
        residual_stream(model, HOOK_NAMES, tokens)
