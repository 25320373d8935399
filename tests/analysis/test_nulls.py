"""Nulls, compared with the same tokens without them."""

import copy

import pandas as pd
import pytest
import torch
from conftest import D_VOCAB, N_CTX
from saes import HOOK_NAMES, random_lens, random_sae

from sae_lens_multilayer import cli
from sae_lens_multilayer.analysis import (
    RandomWeights,
    Suite,
    TokenStream,
    layer_distributions,
    nulls,
    residual_stream,
    variances,
)
from sae_lens_multilayer.analysis.layer_variances import Variances
from sae_lens_multilayer.evaluation.encoder import LayerEncoder

NULLS = ["random_weights", "shuffled_layers", "matched_frequency"]


@pytest.fixture
def tokens():
    return torch.randint(1, D_VOCAB, (7, N_CTX))


def dense(model, sae, tokens, size=3, **options):
    """Vectors, and activations [token, layer, d_sae]."""
    encoder = LayerEncoder(sae, HOOK_NAMES)
    batches = list(
        TokenStream(
            model,
            HOOK_NAMES,
            tokens,
            encoder=encoder,
            batch_size_prompts=size,
            **options,
        )
    )
    parts = []
    for batch in batches:
        active = batch.active
        acts = torch.zeros(active.n_tokens, active.n_layers, active.d_sae).double()
        acts[active.token, active.layer, active.latent] = active.value
        parts.append(acts)
    return torch.cat([batch.x for batch in batches]), torch.cat(parts)


def test_random_weights_keep_mean_and_spread_and_are_undone(model, tokens):
    before = copy.deepcopy(model.state_dict())
    with RandomWeights(model).applied():
        null = copy.deepcopy(model)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    for name, drawn in null.state_dict().items():
        own = before[name].float()
        if own.numel() > 1 and own.std() > 0 and name.split(".")[-1].startswith("W_"):
            assert not drawn.equal(own)
            assert drawn.std().item() == pytest.approx(own.std().item(), rel=0.2)
    sae = random_sae()
    found = layer_distributions(sae, model, tokens, null="random_weights")
    expected = layer_distributions(sae, null, tokens)
    pd.testing.assert_frame_equal(found.to_dataframe(), expected.to_dataframe())


def test_an_error_restores_the_weights(model):
    before = copy.deepcopy(model.state_dict())
    context = RandomWeights(model).applied()
    with pytest.raises(KeyError), context:
        raise KeyError
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("has_lens", [False, True])
def test_shuffled_layers_permute_vectors_and_activations_alike(model, tokens, has_lens):
    sae = random_sae()
    if has_lens:
        sae.lens = random_lens()
    x, acts = dense(model, sae, tokens)
    shuffled_x, shuffled = dense(model, sae, tokens, null="shuffled_layers")
    is_swapped = (shuffled_x != x).flatten(1).any(1)
    assert 0.3 < is_swapped.double().mean() < 0.7  # two layers
    assert shuffled_x[is_swapped].equal(x[is_swapped].flip(1))
    assert shuffled[is_swapped].equal(acts[is_swapped].flip(1))
    assert shuffled[~is_swapped].equal(acts[~is_swapped])


def test_exchanged_latents_have_about_the_same_frequency(model, tokens, monkeypatch):
    monkeypatch.setattr(nulls, "_GROUP_SIZE", 5)
    sae = random_sae()
    x, acts = dense(model, sae, tokens)
    same_x, exchanged = dense(model, sae, tokens, null="matched_frequency")
    assert same_x.equal(x)
    assert not exchanged.equal(acts)
    # By frequency, the same values in each group of each token.
    counts = (acts > 0).any(1).sum(0)
    order = counts.argsort(descending=True, stable=True)
    n_active = int((counts > 0).sum())
    assert not exchanged[..., counts == 0].any()
    for start in range(0, n_active, 5):
        group = order[start : min(start + 5, n_active)]
        shifts = torch.stack(
            [acts[..., group].roll(k, -1) == exchanged[..., group] for k in range(5)]
        )
        assert shifts.all(-1).all(-1).any(0).all()


@pytest.mark.parametrize("null", NULLS)
def test_no_null_depends_on_the_batch_size(model, tokens, null):
    model.double()
    sae = random_sae().double()
    whole = dense(model, sae, tokens, size=100, null=null)
    parts = dense(model, sae, tokens, size=2, null=null)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)


def test_what_each_null_removes(model, tokens):
    sae = random_sae()

    def within(null) -> float:
        result: Variances = variances(sae, model, tokens, null=null)
        return result.history["exp_var_l_jt"].tolist()[-1]

    assert within("matched_frequency") == pytest.approx(within(None), rel=1e-6)
    own = residual_stream(model, HOOK_NAMES, tokens).norm
    shuffled = residual_stream(model, HOOK_NAMES, tokens, null="shuffled_layers").norm
    assert shuffled.sum().item() == pytest.approx(own.sum().item())
    assert abs(shuffled.diff().item()) < 0.3 * abs(own.diff().item())


def test_bad_null(model, tokens):
    with pytest.raises(ValueError, match=r"no null 'random'.*random_weights"):
        variances(random_sae(), model, tokens, null="random")


def test_a_suite_runs_all_but_the_evaluation_of_a_null(model, tokens):
    suite = Suite(random_sae(), model, tokens, null="shuffled_layers")
    with pytest.raises(ValueError, match="'evaluation' needs no null"):
        suite.run(["evaluation"])
    assert {"variances", "token_classes", "residual_stream"} <= set(suite.run())


def test_the_command_line_takes_a_null(offline, capsys):
    for null in NULLS:
        options = ["--analyses", "active_layers", "--null", null]
        cli.main(["analyze", "sae", *offline, *options, "--output_path", null])
    with pytest.raises(SystemExit):
        cli.main(["analyze", "sae", *offline, "--null", "none_such"])
    assert "shuffled_layers" in capsys.readouterr().err
