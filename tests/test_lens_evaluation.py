"""SAEs in the space of a tuned lens, measured in raw space.

Reference: the paper's autoencoder and lens with the exact inverse, computed apart in
float64; SAELens' `run_evals` on a view.
"""

import json
import warnings
from typing import Any

import pytest
import torch
from conftest import D_VOCAB, N_CTX, PAPER_DATA, tiny_model
from sae_lens import HookedSAETransformer
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.load_model import load_model
from saes import HOOK_NAMES, host_numbers, random_lens, random_sae
from safetensors.torch import load_file

from sae_lens_multilayer import (
    LayerLens,
    MultiLayerSAE,
    MultiLayerSAEConfig,
    evaluate,
    reconstruction_metrics,
)
from sae_lens_multilayer.lens.config import LensConfig

FOLDER = str(PAPER_DATA / "model")
BLOCKS, D_IN = 5, 64
HF_NAMES = [f"gpt_neox.layers.{layer}" for layer in range(BLOCKS)]
TL_NAMES = [f"blocks.{layer}.hook_resid_post" for layer in range(BLOCKS)]


def papers_sae(hook_names: list[str]) -> Any:
    """The autoencoder that the paper's code trained in the space of its lens."""
    weights = load_file(PAPER_DATA / "lens_mlsae.safetensors")
    sae = MultiLayerSAE(MultiLayerSAEConfig(d_in=D_IN, d_sae=512, k=8))
    sae.cfg.metadata.hook_names = hook_names
    sae.load_state_dict(
        {
            "W_enc": weights["encoder.weight"].T,
            "W_dec": weights["decoder.weight"].T,
            "b_dec": weights["pre_encoder_bias"],
        }
    )
    config = LensConfig(hook_names, BLOCKS, D_IN, "reference")
    translators = load_file(PAPER_DATA / "lens.safetensors")
    tensors = {
        f"{i}.{part}": translators[f"{config.translator(name)}.{part}"]
        for i, name in enumerate(hook_names)
        for part in ("weight", "bias")
    }
    sae.lens = LayerLens.from_tensors(config, tensors)
    return sae


@pytest.fixture(scope="module")
def hf_model() -> Any:
    return load_model("AutoModelForCausalLM", FOLDER, "cpu", {}, HF_NAMES)


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    return load_file(PAPER_DATA / "activations.safetensors")


@pytest.fixture(scope="module")
def table(hf_model, inputs):
    return evaluate(papers_sae(HF_NAMES), hf_model, inputs["tokens"]).to_dataframe()


@pytest.mark.parametrize(
    ("column", "name"),
    [
        ("ce_loss_clean", "ce_clean"),
        ("ce_loss_spliced", "ce_spliced"),
        ("delta_ce", "delta_ce"),
        ("kl_div", "kl_clean_spliced"),
        ("kl_div_reverse", "kl_spliced_clean"),
        ("fvu", "fvu_per_dimension_mean"),
    ],
)
def test_the_papers_numbers_with_the_true_inverse(table, column, name):
    numbers = json.loads((PAPER_DATA / "splices.json").read_text())["lens"]
    assert table[column].tolist() == pytest.approx(numbers[name], abs=1e-4)


def test_the_papers_latents_and_reconstructions(inputs):
    sae = papers_sae(TL_NAMES)
    lens = load_file(PAPER_DATA / "lens.safetensors")
    latents = load_file(PAPER_DATA / "lens_mlsae.safetensors")
    x = inputs["resid_post"][:, 0, :32].movedim(0, 1)  # [token, layer, d_in]
    acts = sae.encode_topk(x)
    found = torch.zeros(32, BLOCKS, 512).scatter(-1, acts.indices, acts.values)
    values, indices = (
        latents[f"topk_{what}_head"].movedim(0, 1) for what in ("values", "indices")
    )
    expected = torch.zeros_like(found).scatter(-1, indices, values)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    want = lens["recons_true_inverse_head"].movedim(0, 1)
    torch.testing.assert_close(sae.decode_topk(acts), want, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["whole", "views"])
def test_run_evals_on_a_view_gives_the_same_numbers(tokenizer, kind):
    model = tiny_model(tokenizer, HookedSAETransformer)
    tokens = torch.randint(1, D_VOCAB, (6, N_CTX))
    sae = random_sae()
    sae.lens = random_lens()
    given = sae if kind == "whole" else sae.views()
    table = evaluate(given, model, tokens).to_dataframe()
    for name in HOOK_NAMES:
        host = host_numbers(sae.view(name), model, tokens)
        ours = {key: table.loc[name, key] for key in host}
        assert ours == pytest.approx(host, abs=1e-4)
    parts = reconstruction_metrics(given, model, tokens, batch_size_prompts=4)
    assert parts.to_dataframe()["fvu"].tolist() == pytest.approx(table["fvu"].tolist())


def test_the_lens_changes_what_is_measured(tokenizer):
    model = tiny_model(tokenizer)
    tokens = torch.randint(1, D_VOCAB, (6, N_CTX))
    sae = random_sae()
    plain = evaluate(sae, model, tokens).to_dataframe()
    sae.lens = random_lens()
    assert (evaluate(sae, model, tokens).to_dataframe()["fvu"] != plain["fvu"]).all()


def test_the_error_term_still_undoes_the_splice(tokenizer):
    model = tiny_model(tokenizer).to(torch.float64)
    sae = random_sae(dtype="float64")
    sae.lens = random_lens(dtype=torch.float64)
    tokens = torch.randint(1, D_VOCAB, (3, N_CTX))
    found = evaluate(sae, model, tokens, use_error_term=True).to_dataframe()
    assert found[["delta_ce", "kl_div"]].abs().to_numpy().max() < 1e-6


def test_a_bridge_with_other_hook_names_gives_the_same_metrics(table, inputs):
    bridge: Any = SAETransformerBridge.boot_transformers(FOLDER, device="cpu")
    sae = papers_sae(TL_NAMES)
    found = evaluate(sae, bridge, inputs["tokens"]).to_dataframe()
    for column in ("delta_ce", "kl_div", "fvu"):
        assert found[column].tolist() == pytest.approx(table[column].tolist(), abs=1e-3)
    tokens = inputs["tokens"][:1]
    resid = inputs["resid_post"][1, :1]
    x_hat = sae.decode(sae.encode(resid, hook=1), hook=1)
    expected = bridge.run_with_hooks(
        tokens, fwd_hooks=[("blocks.1.hook_out", lambda x, hook: x_hat)]
    )
    with bridge.saes(saes=[sae.view(1)]):
        spliced = bridge(tokens)
    torch.testing.assert_close(spliced, expected, atol=2e-3, rtol=0)
    assert (spliced - bridge(tokens)).abs().max() > 1


def test_a_lens_of_another_model_is_a_warning_that_names_it(tokenizer):
    model = tiny_model(tokenizer)
    tokens = torch.randint(1, D_VOCAB, (2, N_CTX))
    sae = random_sae()
    sae.lens = random_lens(base_model_name="theirs", unembed_hash="a1b2")
    with pytest.warns(UserWarning, match="'theirs' with unembedding hash a1b2, and"):
        evaluate(sae, model, tokens)
    with pytest.warns(UserWarning, match="'theirs'") as caught:
        evaluate(sae.views(), model, tokens)
    assert len([w for w in caught if "lens may" in str(w.message)]) == 1
    sae.lens = None
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The lens may be")
        evaluate(sae, model, tokens)


def test_a_model_of_another_depth_is_an_error(tokenizer):
    model = tiny_model(tokenizer, n_layers=3)
    sae = random_sae()
    sae.lens = random_lens()
    message = "for 2 blocks of width 16; 'custom' has 3 of width 16"
    with pytest.raises(ValueError, match=message):
        evaluate(sae, model, torch.randint(1, D_VOCAB, (2, N_CTX)))
    # Also with the lens of another SAE, if neither names its model.
    right = random_sae()
    right.lens = random_lens(n_layers=3)
    for saes in ([sae.view(0), right.view(1)], [right.view(0), sae.view(1)]):
        with pytest.raises(ValueError, match=message):
            evaluate(saes, model, torch.randint(1, D_VOCAB, (2, N_CTX)))
