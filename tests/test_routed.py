"""The routed SAE: gradients, and as an object of SAELens, in training, evaluated."""

import copy
from typing import Any

import pytest
import torch
from conftest import D_MODEL, N_LAYERS
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAE, SAETrainingRunner
from sae_lens.saes.sae import SAEMetadata, TrainStepInput
from saes import HOOK_NAMES, random_acts, randomize
from safetensors.torch import load_file

from sae_lens_multilayer import (
    RoutedSAE,
    RoutedSAEConfig,
    RoutedTrainingSAE,
    RoutedTrainingSAEConfig,
    evaluate,
    reconstruction_metrics,
)
from sae_lens_multilayer.evaluation.encoder import LayerEncoder
from sae_lens_multilayer.topk.reference import standardize

D_SAE = 64


def routed_config(**changes) -> RoutedTrainingSAEConfig:
    settings = {"d_in": D_MODEL, "d_sae": D_SAE, "k": 4, "k_aux": 8, **changes}
    return RoutedTrainingSAEConfig(**settings)


def random_routed(training: bool = False, **changes: Any) -> Any:
    settings = {"n_layers": N_LAYERS, "metadata": SAEMetadata(hook_names=HOOK_NAMES)}
    settings |= {"d_in": D_MODEL, "d_sae": D_SAE, "k": 4, **changes}
    if training:
        sae: Any = randomize(RoutedTrainingSAE(routed_config(**settings)))
    else:
        sae = randomize(RoutedSAE(RoutedSAEConfig(**settings)))
    sae.W_router.data.mul_(10)  # so that weights differ
    return sae


def gradients_of(sae: Any) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in sae.parameters()]
    sae.zero_grad()
    return found


def check_parity(sae: Any, x: torch.Tensor, dead: Any, micro: int, rtol: float) -> None:
    """Losses and all gradients are those of autograd of the dense definition."""
    output = sae.training_forward_pass(
        TrainStepInput(
            sae_in=x,
            coefficients={},
            dead_neuron_mask=dead,
            n_training_steps=0,
            is_logging_step=False,
        )
    )
    output.loss.backward()
    dense = gradients_of(sae)
    step = sae.accumulate_gradients(x, dead, micro)
    torch.testing.assert_close(step.loss.to(x.dtype), output.loss, rtol=rtol, atol=0)
    assert len(dense) == 4
    for actual, expected in zip(gradients_of(sae), dense, strict=True):
        error = (actual - expected).norm() / expected.norm().clamp_min(1e-9)
        assert error < rtol


@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize("dead_share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("micro", [7, 40])
def test_losses_and_gradients_are_those_of_autograd(dtype, rtol, dead_share, micro):
    sae = random_routed(training=True, dtype=dtype, n_layers=3)
    x = random_acts(40, 3, dtype=sae.dtype)
    check_parity(sae, x, torch.rand(D_SAE) < dead_share, micro, rtol)


@settings(max_examples=20, deadline=None)
@given(
    n_tokens=st.integers(3, 30),
    n_layers=st.integers(1, 4),
    d_sae=st.integers(1, 80),
    data=st.data(),
)
def test_parity_for_any_sizes(n_tokens, n_layers, d_sae, data):
    sae = random_routed(
        training=True,
        dtype="float64",
        n_layers=n_layers,
        d_sae=d_sae,
        k=data.draw(st.integers(1, d_sae)),
        k_aux=data.draw(st.integers(1, d_sae)),
        normalize_activations=data.draw(st.sampled_from(["layer_norm", "none"])),
    )
    dead = torch.rand(d_sae) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    x = random_acts(n_tokens, n_layers, dtype=torch.float64)
    check_parity(sae, x, dead, data.draw(st.integers(1, n_tokens + 2)), 1e-8)


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
@pytest.mark.parametrize("norm", ["layer_norm", "none"])
def test_sparse_and_dense_calls_agree(batch, norm):
    sae = random_routed(normalize_activations=norm, dtype="float64")
    x = random_acts(*batch, N_LAYERS, dtype=torch.float64)
    dense, acts = sae.encode(x), sae.encode_topk(x)
    sparse = torch.zeros_like(dense).scatter(-1, acts.indices, acts.values)
    torch.testing.assert_close(sparse, dense)
    x_hat = sae.decode(dense)
    assert x_hat.shape == x.shape
    torch.testing.assert_close(sae.decode_topk(acts), x_hat)


def test_the_chosen_layer_is_reconstructed_and_the_others_are_the_bias():
    # Authority: the formula, token by token.
    sae, x = random_routed(k=D_SAE), random_acts(20, N_LAYERS)
    u, mean, std = standardize(x)
    p = (u.mean(1) @ sae.W_router).softmax(-1)
    acts, x_hat = sae.encode_topk(x), sae(x)
    assert acts.layer.unique().numel() == N_LAYERS
    for t in range(20):
        chosen = int(p[t].argmax())
        v = p[t, chosen] * u[t, chosen]
        v_hat = ((v - sae.b_dec) @ sae.W_enc).relu() @ sae.W_dec + sae.b_dec
        for layer in range(N_LAYERS):
            u_hat = v_hat / p[t, chosen] if layer == chosen else sae.b_dec
            expected = u_hat * std[t, layer] + mean[t, layer]
            torch.testing.assert_close(x_hat[t, layer], expected, rtol=1e-3, atol=1e-3)
            is_zero = (sae.acts_at(acts, layer)[t] == 0).all()
            assert bool(is_zero) == (layer != chosen)


def test_saving_and_loading_by_saelens_changes_nothing(tmp_path):
    sae = random_routed(training=True)
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert isinstance(loaded, RoutedSAE)
    x = random_acts(5, N_LAYERS)
    assert torch.equal(loaded(x), sae(x))


@pytest.fixture
def train(make_config, model, token_dataset):
    def run(**changes) -> Any:
        changes = {"training_tokens": 1024, "lr": 1e-2, "output_path": None, **changes}
        cfg = make_config(sae=routed_config(), **changes)
        return SAETrainingRunner(cfg, token_dataset, model).run()

    return run


def test_a_resumed_run_ends_with_the_same_bits_and_a_trained_router(train, tmp_path):
    whole = train(n_checkpoints=2)
    found = [path.parent for path in tmp_path.glob("checkpoints/*/*/cfg.json")]
    first = min((p for p in found if p.name.isdigit()), key=lambda p: int(p.name))
    resumed = train(n_checkpoints=2, resume_from_checkpoint=str(first))
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)
    early = load_file(first / "sae_weights.safetensors")
    assert not torch.equal(whole.W_router, early["W_router"])


def test_saved_frequencies_are_those_among_encoded_vectors(train, tmp_path):
    train(output_path=str(tmp_path / "sae"), feature_sampling_window=1000)
    saved = load_file(tmp_path / "sae" / "sparsity.safetensors")["sparsity"]
    # All k activations of a vector are above 0 here, or nearly all.
    assert 3.6 < (10 ** saved.double()).sum().item() < 4.001


def test_a_copy_after_encode():
    sae, x = random_routed(training=True), random_acts(5, N_LAYERS)
    sae.encode(x)
    copied = copy.deepcopy(sae)
    assert torch.equal(copied(x), sae(x))


def test_evaluation_is_of_the_reconstruction_at_each_layer(model):
    sae, tokens = random_routed(), torch.randint(1, 500, (3, 16))
    metrics = evaluate(sae, model, tokens, batch_size_prompts=2)
    _, cache = model.run_with_cache(tokens)
    x = torch.stack([cache[name] for name in HOOK_NAMES], dim=2)
    x_hat = sae(x)
    for i, name in enumerate(HOOK_NAMES):
        loss = model.run_with_hooks(
            tokens,
            return_type="loss",
            fwd_hooks=[(name, lambda _x, hook, i=i: x_hat[:, :, i])],
        )
        assert metrics.ce_loss_spliced[i].item() == pytest.approx(loss.item(), rel=1e-4)
    alone = reconstruction_metrics(sae, model, tokens)
    torch.testing.assert_close(alone.fvu, metrics.fvu)
    found = LayerEncoder(sae).encode(x.flatten(0, 1))
    assert (alone.l0.sum() * 48).item() == pytest.approx(len(found.row))
