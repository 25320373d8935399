"""Metrics of reconstructions on held-out tokens.

Reference: brute force on the whole set of tokens, from the definitions of section 6 of
the design; and `sae_lens.evals.run_evals` on a view.
"""

from typing import Any

import pytest
import torch
from conftest import D_MODEL, D_VOCAB, N_CTX, N_LAYERS, tiny_model, tiny_sae_config
from pandas.testing import assert_frame_equal
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    HookedSAETransformer,
    LanguageModelSAETrainingRunner,
    StandardTrainingSAEConfig,
)
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from saes import random_sae

from sae_lens_multilayer import (
    LayerMetrics,
    MultiLayerActivationsStore,
    evaluate,
    reconstruction_metrics,
    views,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:sae_lens")

D_SAE = 64
RESID_POST = [f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS)]
ARCHITECTURES = {
    "multilayer": tiny_sae_config(),
    "raw": tiny_sae_config(normalize_activations="none"),
    "standard": StandardTrainingSAEConfig(d_in=D_MODEL, d_sae=D_SAE),
    "batchtopk": BatchTopKTrainingSAEConfig(d_in=D_MODEL, d_sae=D_SAE, k=4),
}


@pytest.fixture
def model(tokenizer) -> HookedSAETransformer:
    model = tiny_model(tokenizer, HookedSAETransformer)
    assert isinstance(model, HookedSAETransformer)
    return model


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(1, D_VOCAB, (13, N_CTX), generator=torch.Generator())


@pytest.fixture
def train(model, token_dataset, make_config):
    def train(sae_config=None, **changes):
        config = make_config(
            sae=sae_config, lr=1e-2, training_tokens=1024, output_path=None, **changes
        )
        return LanguageModelSAETrainingRunner(
            config, override_dataset=token_dataset, override_model=model
        ).run()

    return train


@torch.no_grad()
def brute_force(sae, model, tokens, keep, hook_names=RESID_POST):
    """By the definitions, on all tokens at once and in float64."""
    _, cache = model.run_with_cache(tokens, prepend_bos=False)
    table: dict[str, list[float]] = {}
    alive = torch.zeros(D_SAE, dtype=torch.bool)
    for name, view in zip(hook_names, views(sae), strict=True):
        x = cache[name].flatten(2)[keep]
        acts = view.encode(x)
        error = (view.decode(acts) - x).double()
        x = x.double()
        mse = error.square().mean()
        row = {
            "fvu": error.square().sum() / (x - x.mean(0)).square().sum(),
            "fvu_scalar": mse / x.var(),
            "mse": mse,
            "l0": (acts > 0).sum(1).double().mean(),
            "l1": acts.double().sum(1).mean(),
            "silent_fraction": (acts == 0).all(0).double().mean(),
        }
        alive |= (acts > 0).any(0)
        for key, value in row.items():
            table.setdefault(key, []).append(value.item())
    return table, (~alive).double().mean().item()


def assert_close(metrics: LayerMetrics, table, dead_fraction, rtol=1e-4) -> None:
    for name, values in table.items():
        expected = torch.tensor(values, dtype=torch.float64)
        found = getattr(metrics, name)
        torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-6, msg=name)
    assert metrics.dead_fraction.tolist() == pytest.approx([dead_fraction] * N_LAYERS)


class TestMetrics:
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_metrics_are_those_by_brute_force(self, train, model, tokens, name):
        sae = train(ARCHITECTURES[name])
        metrics = reconstruction_metrics(sae, model, tokens)
        keep = torch.ones_like(tokens, dtype=torch.bool)
        assert_close(metrics, *brute_force(sae, model, tokens, keep))
        assert metrics.hook_names == RESID_POST
        assert metrics.n_tokens == tokens.numel()

    def test_inference_sae_gives_the_same(self, train, model, tokens, tmp_path):
        sae = train()
        sae.save_inference_model(tmp_path)
        loaded = type(sae).load_from_disk(tmp_path)
        mine, theirs = (reconstruction_metrics(s, model, tokens) for s in (sae, loaded))
        assert mine.to_log_dict() == theirs.to_log_dict()

    @pytest.mark.parametrize("name", ["multilayer", "standard"])
    def test_batch_size_does_not_matter(self, train, model, tokens, name):
        sae = train(ARCHITECTURES[name])
        whole = reconstruction_metrics(sae, model, tokens, batch_size_prompts=100)
        for size in (1, 4, 5, 13):
            part = reconstruction_metrics(sae, model, tokens, batch_size_prompts=size)
            assert part.n_tokens == whole.n_tokens
            assert torch.equal(part.dead_fraction, whole.dead_fraction)
            for field in ("fvu", "fvu_scalar", "mse", "l0", "l1", "silent_fraction"):
                torch.testing.assert_close(
                    getattr(part, field), getattr(whole, field), rtol=1e-6, atol=1e-9
                )

    def test_vectors_are_taken_in_blocks(self, train, model, tokens, monkeypatch):
        sae = train()
        whole = reconstruction_metrics(sae, model, tokens)
        monkeypatch.setattr("sae_lens_multilayer.evaluation.encoder._MAX_ROWS", 7)
        blocks = reconstruction_metrics(sae, model, tokens)
        torch.testing.assert_close(blocks.fvu, whole.fvu)
        torch.testing.assert_close(blocks.l0, whole.l0)

    def test_excluded_tokens_are_left_out(self, train, model, tokens):
        sae = train()
        excluded = tokens.flatten()[:50].unique().tolist()
        keep = ~torch.isin(tokens, torch.tensor(excluded))
        metrics = reconstruction_metrics(
            sae, model, tokens, exclude_tokens=excluded, batch_size_prompts=3
        )
        assert metrics.n_tokens == keep.sum()
        assert_close(metrics, *brute_force(sae, model, tokens, keep))

    def test_layers_in_another_order(self, train, model, tokens):
        sae = train(layers=[1, 0])
        metrics = reconstruction_metrics(sae, model, tokens)
        keep = torch.ones_like(tokens, dtype=torch.bool)
        assert metrics.hook_names == RESID_POST[::-1]
        assert_close(metrics, *brute_force(sae, model, tokens, keep, RESID_POST[::-1]))
        assert next(iter(metrics.to_log_dict())) == "layer_1/fvu"

    @pytest.mark.parametrize("head", [None, 1])
    def test_hooks_with_heads(self, train, model, tokens, head):
        names = [f"blocks.{layer}.attn.hook_z" for layer in range(N_LAYERS)]
        sae = train(
            tiny_sae_config(d_in=16 if head is None else 8),
            hook_name="blocks.{layer}.attn.hook_z",
            hook_head_index=head,
        )
        metrics = reconstruction_metrics(sae, model, tokens)
        _, cache = model.run_with_cache(tokens)
        for layer, name in enumerate(names):
            z = cache[name]
            x = (z.flatten(2) if head is None else z[:, :, head]).flatten(0, 1)
            x_hat = sae.decode_topk(sae.encode_topk(x))
            expected = (x_hat - x).square().mean().item()
            assert metrics.mse[layer].item() == pytest.approx(expected, rel=1e-4)

    def test_tokens_may_come_from_a_store(
        self, train, model, make_config, token_dataset
    ):
        sae = train()
        store = MultiLayerActivationsStore.from_config(
            model, make_config(), token_dataset
        )
        found = reconstruction_metrics(sae, model, store, n_prompts=3)
        given = torch.as_tensor(token_dataset[:3]["input_ids"])
        expected = reconstruction_metrics(sae, model, given)
        assert found.to_log_dict() == pytest.approx(expected.to_log_dict())

    def test_one_view_is_a_list_of_one(self, train, model, tokens):
        view = views(train())[1]
        found = reconstruction_metrics(view, model, tokens)
        assert found.hook_names == RESID_POST[1:]
        expected = reconstruction_metrics([view], model, tokens)
        assert found.to_log_dict() == expected.to_log_dict()

    def test_last_layer_after_a_layer_is_all_that_runs(self, train, model, tokens):
        sae = train(layers=[0])
        ran = []
        model.blocks[1].register_forward_hook(lambda *_: ran.append(1))
        reconstruction_metrics(sae, model, tokens)
        assert ran == []


class TestAgreementWithSAELens:
    @pytest.mark.parametrize("name", ["multilayer", "standard"])
    @pytest.mark.parametrize("layer", range(N_LAYERS))
    def test_run_evals_on_a_view_gives_the_same_numbers(
        self, train, model, token_dataset, name, layer
    ):
        sae = train(ARCHITECTURES[name])
        view = views(sae)[layer]
        store = ActivationsStore.from_sae(
            model, view, token_dataset, context_size=N_CTX, store_batch_size_prompts=8
        )
        numbers, _ = run_evals(
            view,
            store,
            model,
            ActivationScaler(),
            EvalConfig(
                n_eval_sparsity_variance_batches=8,
                batch_size_prompts=8,
                compute_variance_metrics=True,
                compute_sparsity_metrics=True,
            ),
            exclude_special_tokens=False,
        )
        rows = torch.tensor(token_dataset.with_format(None)["input_ids"])
        metrics = reconstruction_metrics(sae, model, rows)
        host_fvu = 1 - numbers["reconstruction_quality"]["explained_variance"]
        assert metrics.fvu[layer].item() == pytest.approx(host_fvu, rel=1e-4)
        # SAELens sums the squared error over dimensions.
        host_mse = numbers["reconstruction_quality"]["mse"]
        assert metrics.mse[layer].item() * D_MODEL == pytest.approx(host_mse, rel=1e-4)
        for key in ("l0", "l1"):
            host = numbers["sparsity"][key]
            assert getattr(metrics, key)[layer].item() == pytest.approx(host, rel=1e-4)


class TestErrors:
    def test_no_token_to_measure(self, train, model):
        tokens = torch.full((2, N_CTX), 7)
        with pytest.raises(ValueError, match="at least one token"):
            reconstruction_metrics(train(), model, tokens, exclude_tokens=[7])

    def test_model_of_another_width(self, train, tokenizer, tokens):
        wider = tiny_model(tokenizer, d_model=24)
        with pytest.raises(ValueError, match=r"must be 24, .*resid_post'; got 16"):
            reconstruction_metrics(train(), wider, tokens)

    def test_model_without_the_hook(self, train, tokenizer, tokens):
        other = tiny_model(tokenizer, n_layers=1)
        with pytest.raises(ValueError, match=r"no hook 'blocks.1.hook_resid_post'"):
            reconstruction_metrics(train(), other, tokens)


def test_the_padding_side_does_not_matter_without_padding(
    tokenizer, tokens, monkeypatch
):
    model: Any = tiny_model(tokenizer, default_prepend_bos=True)
    sae = random_sae()
    tokens[:, 0] = model.tokenizer.pad_token_id  # also its BOS
    assert model.tokenizer.bos_token_id == model.tokenizer.pad_token_id
    found = {}
    for side in ("right", "left"):
        monkeypatch.setattr(model.tokenizer, "padding_side", side)
        found[side] = [
            measure(sae, model, tokens).to_dataframe()
            for measure in (evaluate, reconstruction_metrics)
        ]
    for left, right in zip(*found.values(), strict=True):
        assert_frame_equal(left, right, rtol=1e-4)
