"""References: `reconstruction_metrics` and `evaluate` of each SAE by itself."""

from functools import partial
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import D_MODEL, D_VOCAB, N_CTX
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from saes import HOOK_NAMES, random_lens, random_sae

from sae_lens_multilayer import evaluate, reconstruction_metrics
from sae_lens_multilayer.analysis import (
    Comparison,
    TransferMatrix,
    compare_with_single_layers,
    transfer_matrix,
)


@pytest.fixture
def tokens():
    tokens = torch.randint(1, D_VOCAB, (5, N_CTX))
    tokens[:, 0] = 0
    return tokens


@pytest.fixture
def saes():
    return [single_layer(name, seed) for seed, name in enumerate(HOOK_NAMES)]


def single_layer(hook_name, seed, **changes):
    torch.manual_seed(seed)
    metadata = SAEMetadata(hook_name=hook_name, model_name="tiny")
    settings = {"d_in": D_MODEL, "d_sae": 32, "metadata": metadata, **changes}
    sae = StandardSAE(StandardSAEConfig(**settings))
    with torch.no_grad():
        sae.b_dec.add_(torch.randn(sae.cfg.d_in))
    return sae


def test_each_entry_is_that_sae_at_that_layer(model, tokens, saes, tmp_path):
    multi = random_sae()
    found = transfer_matrix(
        saes, model, tokens, multi_layer=multi, exclude_tokens=[0], batch_size_prompts=2
    )
    assert found.trained_on == found.hook_names == HOOK_NAMES
    assert found.n_tokens == 5 * (N_CTX - 1)
    for i in range(len(saes)):
        for layer, name in enumerate(HOOK_NAMES):
            moved = single_layer(name, i)
            alone = reconstruction_metrics(moved, model, tokens, exclude_tokens=[0])
            assert found.fvu[i, layer] == pytest.approx(alone.fvu.item(), rel=1e-5)
    alone = reconstruction_metrics(multi, model, tokens, exclude_tokens=[0])
    assert found.multi_layer_fvu is not None
    torch.testing.assert_close(found.multi_layer_fvu, alone.fvu, rtol=1e-5, atol=0)
    table = found.to_dataframe()
    assert list(table.index) == ["layer_0", "layer_1", "multi_layer"]
    assert table.loc["layer_1", "layer_0"] == found.fvu[1, 0].item()
    found.save(tmp_path / "transfer")
    loaded = TransferMatrix.load(tmp_path / "transfer")
    pd.testing.assert_frame_equal(loaded.to_dataframe(), table)


def test_without_a_multi_layer_sae(model, tokens, saes, tmp_path):
    found = transfer_matrix(saes[::-1], model, tokens)
    assert found.trained_on == found.hook_names == HOOK_NAMES[::-1]
    both = transfer_matrix(saes, model, tokens)
    torch.testing.assert_close(found.fvu.flip(0, 1), both.fvu)
    found.save(tmp_path / "transfer")
    assert TransferMatrix.load(tmp_path / "transfer").multi_layer_fvu is None


def test_a_run_on_one_layer_gives_a_single_layer_sae(model, tokens):
    saes = [
        random_sae(metadata=SAEMetadata(hook_names=[name], model_name="tiny"))
        for name in HOOK_NAMES
    ]
    views = [sae.view(name) for sae, name in zip(saes, HOOK_NAMES, strict=True)]
    found = transfer_matrix(saes, model, tokens)
    torch.testing.assert_close(found.fvu, transfer_matrix(views, model, tokens).fvu)
    table = compare_with_single_layers(random_sae(), saes, model, tokens).to_dataframe()
    own = found.fvu.diagonal().tolist()
    assert table["fvu", "single_layer"].tolist() == pytest.approx(own, rel=1e-5)
    with pytest.raises(ValueError, match="must have one hook; got"):
        transfer_matrix([random_sae()], model, tokens)


def test_a_multi_layer_sae_may_have_a_lens(model, tokens, saes):
    multi = random_sae()
    multi.lens = random_lens()
    found = transfer_matrix(saes, model, tokens, multi_layer=multi).multi_layer_fvu
    alone = reconstruction_metrics(multi, model, tokens).fvu
    assert found is not None
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="must have no lens"):
        transfer_matrix(multi.views(), model, tokens)


def test_comparison_is_the_two_evaluations(model, tokens, saes, tmp_path):
    multi = random_sae()
    found = compare_with_single_layers(
        multi, saes[::-1], model, tokens, exclude_tokens=[0]
    )
    table = found.to_dataframe()
    for name, sae in [("multi_layer", multi), ("single_layer", saes)]:
        alone = evaluate(sae, model, tokens, exclude_tokens=[0]).to_dataframe()
        for metric in ("fvu", "delta_ce", "kl_div", "dead_fraction"):
            pd.testing.assert_series_equal(
                table[metric, name], alone[metric], check_names=False
            )
    found.save(tmp_path / "comparison")
    loaded = Comparison.load(tmp_path / "comparison")
    pd.testing.assert_frame_equal(loaded.to_dataframe(), table)


def test_some_layers_are_compared(model, tokens, saes):
    multi = random_sae()
    options: Any = {"exclude_tokens": [0], "exclude_positions": [1]}
    every = compare_with_single_layers(multi, saes, model, tokens, **options)
    one = compare_with_single_layers(multi, saes[1:], model, tokens, **options)
    assert one.hook_names == HOOK_NAMES[1:]
    found, expected = one.to_dataframe(), every.to_dataframe().iloc[1:]
    pd.testing.assert_frame_equal(found, expected)
    alone = evaluate(saes, model, tokens, **options).to_dataframe()
    assert expected["kl_div", "single_layer"].iloc[0] == alone["kl_div"].iloc[1]


def test_wrong_saes_are_errors(model, tokens, saes):
    other = single_layer("blocks.1.hook_resid_pre", 0)
    with pytest.raises(ValueError, match=r"the multi-layer SAE's; got .*resid_pre"):
        compare_with_single_layers(random_sae(), [other], model, tokens)
    with pytest.raises(ValueError, match="must name its own hook"):
        transfer_matrix([saes[0], saes[0]], model, tokens)
    narrow = single_layer(HOOK_NAMES[1], 0, d_in=8)
    for function in (
        transfer_matrix,
        partial(compare_with_single_layers, random_sae()),
    ):
        with pytest.raises(ValueError, match=r"the same `d_in`; got \[8, 16\]"):
            function([saes[0], narrow], model, tokens)
