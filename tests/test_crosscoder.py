"""The crosscoder as an object of SAELens, in training, and evaluated."""

from typing import Any

import pytest
import torch
from conftest import D_MODEL, N_LAYERS, tiny_sae_config
from sae_lens import SAE, SAETrainingRunner, StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata, TrainStepInput
from saes import HOOK_NAMES, random_acts, random_lens, random_sae, randomize

from sae_lens_multilayer import (
    CrosscoderSAE,
    CrosscoderSAEConfig,
    CrosscoderTrainingSAE,
    CrosscoderTrainingSAEConfig,
    evaluate,
    reconstruction_metrics,
    view,
)
from sae_lens_multilayer.analysis import Suite, functional_layers, transfer_matrix
from sae_lens_multilayer.evaluation.encoder import LayerEncoder, ReconstructionSums

D_SAE = 64


def crosscoder_config(**changes) -> CrosscoderTrainingSAEConfig:
    settings = {"d_in": D_MODEL, "d_sae": D_SAE, "k": 4, "k_aux": 8, **changes}
    return CrosscoderTrainingSAEConfig(**settings)


def random_crosscoder(training: bool = False, **changes: Any) -> Any:
    settings = {"n_layers": N_LAYERS, "metadata": SAEMetadata(hook_names=HOOK_NAMES)}
    settings |= {"d_in": D_MODEL, "d_sae": D_SAE, "k": 4, **changes}
    if training:
        return randomize(CrosscoderTrainingSAE(crosscoder_config(**settings)))
    return randomize(CrosscoderSAE(CrosscoderSAEConfig(**settings)))


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
@pytest.mark.parametrize("n_layers", [1, 3])
@pytest.mark.parametrize("norm", ["layer_norm", "none"])
def test_sparse_and_dense_calls_agree(batch, n_layers, norm):
    sae = random_crosscoder(
        n_layers=n_layers, normalize_activations=norm, dtype="float64"
    )
    x = random_acts(*batch, n_layers, dtype=torch.float64)
    dense, acts = sae.encode(x), sae.encode_topk(x)
    assert acts.values.shape == (*batch, 4)
    sparse = torch.zeros_like(dense).scatter(-1, acts.indices, acts.values)
    torch.testing.assert_close(sparse, dense)
    x_hat = sae.decode(dense)
    assert x_hat.shape == x.shape
    torch.testing.assert_close(sae.decode_topk(acts), x_hat)
    by_layer = [sae.decode_layer(acts, layer) for layer in range(n_layers)]
    torch.testing.assert_close(torch.stack(by_layer, dim=-2), x_hat)


def test_each_layer_has_its_own_encoder_and_decoder():
    # Authority: the formula, one layer at a time.
    sae = random_crosscoder(normalize_activations="none", k=D_SAE)
    x = random_acts(5, N_LAYERS)
    b_dec = sae.b_dec.view(N_LAYERS, D_MODEL)
    products = [(x[:, i] - b_dec[i]) @ sae.encoders[i] for i in range(N_LAYERS)]
    acts = torch.stack(products).sum(0).relu()
    torch.testing.assert_close(sae.encode(x), acts, rtol=1e-4, atol=1e-4)
    for i in range(N_LAYERS):
        x_hat = acts @ sae.decoders[i] + b_dec[i]
        torch.testing.assert_close(sae(x)[:, i], x_hat, rtol=1e-4, atol=1e-3)


def test_an_activation_at_a_layer_is_the_length_of_what_the_latent_adds():
    sae, x = random_crosscoder(), random_acts(5, N_LAYERS)
    acts = sae.encode_topk(x)
    for layer in range(N_LAYERS):
        added = acts.values.unsqueeze(-1) * sae.decoders[layer][acts.indices]
        torch.testing.assert_close(sae.acts_at(acts, layer), added.norm(dim=-1))
    torch.testing.assert_close(sae.decoders.square().sum((0, 2)), torch.ones(D_SAE))


def test_a_lens_maps_each_layer():
    sae, lens = random_crosscoder(), random_lens()
    plain = random_crosscoder(normalize_activations="layer_norm")
    plain.load_state_dict(sae.state_dict())
    sae.lens = lens
    x = random_acts(5, N_LAYERS)
    acts = sae.encode_topk(x)
    torch.testing.assert_close(
        sae.encode(x), plain.encode(lens.transform(x)), rtol=1e-4, atol=1e-4
    )
    z_hat = plain.decode_topk(plain.encode_topk(lens.transform(x)))
    x_hat = sae.decode_topk(acts)
    torch.testing.assert_close(x_hat, lens.invert(z_hat), rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(sae.decode_layer(acts, 1), x_hat[:, 1])


def test_vectors_of_one_layer_are_refused():
    sae = random_crosscoder()
    for call in (sae.encode, sae.encode_topk):
        with pytest.raises(ValueError, match=r"\[\.\.\., 2, 16\]; got \[5, 16\]"):
            call(random_acts(5))
    for call in (lambda: sae.view(0), sae.views, lambda: view(sae, 0)):
        with pytest.raises(ValueError, match="has no SAE of a single hook"):
            call()


def test_saelens_own_loss_has_the_same_gradients():
    sae = random_crosscoder(training=True, dtype="float64")
    x = random_acts(20, N_LAYERS, dtype=torch.float64)
    dead = torch.arange(D_SAE) % 3 == 0
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
    dense = [p.grad.clone() for p in sae.parameters()]
    sae.zero_grad()
    step = sae.accumulate_gradients(x, dead, micro_batch_size=7)
    torch.testing.assert_close(step.loss, output.loss)
    for parameter, gradient in zip(sae.parameters(), dense, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_saving_and_loading_by_saelens_changes_nothing(tmp_path):
    sae = random_crosscoder(training=True)
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert isinstance(loaded, CrosscoderSAE)
    assert loaded.cfg.n_layers == N_LAYERS
    assert loaded.cfg.metadata.hook_names == HOOK_NAMES
    x = random_acts(5, N_LAYERS)
    assert torch.equal(loaded.encode_topk(x).values, sae.encode_topk(x).values)
    assert torch.equal(loaded(x), sae(x))


# Training


@pytest.fixture
def train(make_config, model, token_dataset):
    def run(sae=None, **changes) -> Any:
        settings = {"training_tokens": 1024, "lr": 1e-2, **changes}
        cfg = make_config(sae=sae or crosscoder_config(), **settings)
        return SAETrainingRunner(cfg, token_dataset, model).run()

    return run


def test_the_runner_trains_a_crosscoder_for_saelens(train, model, tmp_path):
    sae = train()
    assert sae.cfg.n_layers == N_LAYERS
    norms = sae.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(D_SAE))
    loaded = SAE.load_from_disk(tmp_path / "output")
    assert isinstance(loaded, CrosscoderSAE)
    tokens = torch.randint(1, 500, (4, 16))
    trained = reconstruction_metrics(loaded, model, tokens).fvu.mean()
    new = CrosscoderSAE(CrosscoderSAEConfig(D_MODEL, D_SAE, k=4, n_layers=N_LAYERS))
    new.cfg.metadata.hook_names = HOOK_NAMES
    assert trained < reconstruction_metrics(new, model, tokens).fvu.mean()


def test_a_crosscoder_of_one_layer_trains_as_the_mlsae(train, tmp_path):
    paths = [str(tmp_path / name) for name in ("a", "b")]
    crosscoder = train(layers=[1], output_path=paths[0])
    mlsae = train(tiny_sae_config(), layers=[1], output_path=paths[1])
    for name, value in mlsae.state_dict().items():
        assert torch.equal(crosscoder.state_dict()[name], value)


def test_a_resumed_run_ends_with_the_same_bits(train, tmp_path):
    whole = train(n_checkpoints=2, output_path=None)
    first = sorted(tmp_path.glob("checkpoints/*/*/cfg.json"), key=str)
    assert first
    checkpoint = min(
        (path.parent for path in first if path.parent.name.isdigit()),
        key=lambda path: int(path.name),
    )
    resumed = train(
        n_checkpoints=2, output_path=None, resume_from_checkpoint=str(checkpoint)
    )
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


def test_the_number_of_layers_must_be_that_of_the_hooks(train):
    with pytest.raises(ValueError, match=r"`n_layers` must be .* 2; the SAE has 3"):
        train(crosscoder_config(n_layers=3))
    with pytest.raises(ValueError, match=r"`n_layers` must be .*got None"):
        CrosscoderTrainingSAE(crosscoder_config())


# Evaluation


@pytest.mark.parametrize("from_middle", [None, False])
def test_each_layer_is_spliced_from_the_clean_vectors_of_all(model, from_middle):
    # Authority: the model run with a hook, and the dense reconstruction.
    sae, tokens = random_crosscoder(), torch.randint(1, 500, (3, 16))
    metrics = evaluate(
        sae,
        model,
        tokens,
        from_middle=from_middle,
        together="all",
        batch_size_prompts=2,
    )
    _, cache = model.run_with_cache(tokens)
    x = torch.stack([cache[name] for name in HOOK_NAMES], dim=2)
    x_hat = sae(x)
    clean = model(tokens, return_type="loss").item()
    assert metrics.ce_loss_clean == pytest.approx(clean, rel=1e-5)
    hooks = [
        (name, lambda _x, hook, i=i: x_hat[:, :, i])
        for i, name in enumerate(HOOK_NAMES)
    ]
    for i, one in enumerate(hooks):
        loss = model.run_with_hooks(tokens, return_type="loss", fwd_hooks=[one])
        assert metrics.ce_loss_spliced[i].item() == pytest.approx(loss.item(), rel=1e-4)
    loss = model.run_with_hooks(tokens, return_type="loss", fwd_hooks=hooks)
    assert metrics.together is not None
    joint = metrics.together["ce_loss_spliced"]
    assert joint == pytest.approx(loss.item(), rel=1e-4)
    of_layer = x.flatten(0, 1)
    error = (x_hat - x).flatten(0, 1).square().sum((0, 2))
    deviation = (of_layer - of_layer.mean(0)).square().sum((0, 2))
    torch.testing.assert_close(
        metrics.fvu.float(), error / deviation, rtol=1e-4, atol=1e-5
    )
    alone = reconstruction_metrics(sae, model, tokens, batch_size_prompts=2)
    torch.testing.assert_close(alone.fvu, metrics.fvu)
    torch.testing.assert_close(alone.l1, metrics.l1)


def test_the_vectors_of_a_model_on_several_devices_are_encoded_on_that_of_the_sae():
    encoder = LayerEncoder(random_crosscoder(device="meta"))
    x = random_acts(5, N_LAYERS)
    ReconstructionSums(encoder).start(lambda: [x[:, 0].to("meta"), x[:, 1]])


def test_the_encoder_gives_the_activations_at_each_layer():
    sae, x = random_crosscoder(), random_acts(5, N_LAYERS)
    found = LayerEncoder(sae).encode(x)
    dense = torch.zeros(5 * N_LAYERS, D_SAE)
    dense[found.row, found.latent] = found.value
    expected = sae.encode(x).unsqueeze(1) * sae.decoders.norm(dim=-1)
    torch.testing.assert_close(dense.view(5, N_LAYERS, -1), expected)


# Analyses


def test_functional_layers_are_those_of_brute_force(model):
    sae, tokens = random_crosscoder(), torch.randint(1, 500, (3, 16))
    found = functional_layers(sae, model, tokens, batch_size_prompts=2)
    _, cache = model.run_with_cache(tokens)
    x = torch.stack([cache[name] for name in HOOK_NAMES], dim=2).flatten(0, 1)
    acts = sae.encode(x)
    v = sae.process_sae_in(x).unflatten(1, (N_LAYERS, D_MODEL))
    h = torch.einsum("tld,lds->lts", v, sae.encoders) * (acts > 0)
    counts = (acts > 0).sum(0)
    assert torch.equal(found.counts, counts)
    contribution = h.abs().sum(1) / counts
    left_out = 1 - (acts - h).relu().sum(1) / acts.sum(0)
    for actual, expected in (
        (found.contribution, contribution),
        (found.fall, left_out),
        (found.decoder_norm, sae.decoders.norm(dim=-1)),
    ):
        torch.testing.assert_close(
            actual.float(), expected, rtol=1e-3, atol=1e-4, equal_nan=True
        )
    p = contribution / contribution.sum(0)
    torch.testing.assert_close(
        found.n_functional.float(), (-(p * p.log()).sum(0)).exp(), equal_nan=True
    )


@pytest.mark.parametrize("null", ["shuffled_layers", "matched_frequency"])
def test_nulls_without_functional_layers_are_refused(model, null):
    sae, tokens = random_crosscoder(), torch.randint(1, 500, (3, 16))
    with pytest.raises(ValueError, match=rf"must be .*random_weights.*; got '{null}'"):
        functional_layers(sae, model, tokens, null=null)
    sae.cfg.metadata.model_name = "tiny"
    assert Suite(sae, model, tokens, null=null).missing("functional_layers")
    suite = Suite(sae, model, tokens, null="random_weights")
    assert suite.missing("functional_layers") is None


def test_functional_layers_leave_nothing_on_the_sae(model):
    sae = random_crosscoder(normalize_activations="layer_norm")
    functional_layers(sae, model, torch.randint(1, 500, (3, 16)))
    assert not hasattr(sae, "ln_mu")


def test_a_crosscoder_beside_single_layer_saes(model):
    # Authority: the metrics of the crosscoder alone.
    sae, tokens = random_crosscoder(), torch.randint(1, 500, (3, 16))
    singles = [
        StandardSAE(
            StandardSAEConfig(
                d_in=D_MODEL, d_sae=8, metadata=SAEMetadata(hook_name=name)
            )
        )
        for name in HOOK_NAMES
    ]
    found = transfer_matrix(
        singles, model, tokens, multi_layer=sae, batch_size_prompts=2
    )
    alone = reconstruction_metrics(sae, model, tokens)
    assert found.multi_layer_fvu is not None
    torch.testing.assert_close(found.multi_layer_fvu, alone.fvu, rtol=1e-5, atol=0)


def test_a_latent_that_reads_one_layer_has_one_functional_layer(model):
    sae = random_crosscoder()
    sae.encoders[1].data.zero_()
    found = functional_layers(sae, model, torch.randint(1, 500, (3, 16)))
    active = found.counts > 0
    assert active.any()
    torch.testing.assert_close(
        found.n_functional[active], torch.ones(int(active.sum())).double()
    )
    assert (found.fall[0][active] == 1).all()
    assert (found.fall[1][active] == 0).all()


def test_all_analyses_of_the_table_that_are_available_run(model):
    sae, tokens = random_crosscoder(), torch.randint(1, 500, (3, 16))
    sae.cfg.metadata.model_name = "tiny"
    suite = Suite(sae, model, tokens)
    results = suite.run()
    assert "functional_layers" in results
    assert "output_tokens" not in results
    for result in results.values():
        result.to_dataframe()
        result.pictures()
    assert Suite(random_sae(), model, tokens).missing("functional_layers")
