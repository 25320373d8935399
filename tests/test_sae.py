"""The multi-layer SAE as an object of SAELens.

References: stock SAELens (`TopKSAE` with layer norm and no encoder bias;
`SAETrainer`), and the paper's code (tests/data/paper/plain.safetensors).
"""

import copy
import json
import warnings

import pytest
import torch
from conftest import D_MODEL, PAPER_DATA, tiny_sae_config
from sae_lens import SAE, SAEConfig, TopKSAE, TopKSAEConfig, TrainingSAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from saes import HOOK_NAMES, random_acts, random_sae, run_fresh
from safetensors.torch import load_file, save_file

from sae_lens_multilayer import (
    MultiLayerSAE,
    MultiLayerSAEConfig,
    MultiLayerTrainingSAE,
    MultiLayerTrainingSAEConfig,
)

both_classes = pytest.mark.parametrize(
    "training", [False, True], ids=["inference", "training"]
)
both_norms = pytest.mark.parametrize("norm", ["layer_norm", "none"])


def stock_topk(sae) -> TopKSAE:
    cfg = TopKSAEConfig(
        d_in=sae.cfg.d_in,
        d_sae=sae.cfg.d_sae,
        k=sae.cfg.k,
        dtype=sae.cfg.dtype,
        normalize_activations=sae.cfg.normalize_activations,
        apply_b_dec_to_input=True,
    )
    stock = TopKSAE(cfg)
    weights = {name: t.clone() for name, t in sae.state_dict().items()}
    b_enc = torch.zeros(sae.cfg.d_sae, dtype=sae.dtype)
    stock.load_state_dict({**weights, "b_enc": b_enc})
    return stock


# Values


@both_classes
@both_norms
@pytest.mark.parametrize("k", [1, 4, 64])
def test_latents_and_reconstructions_are_those_of_stock_topk(training, norm, k):
    sae = random_sae(training, k=k, normalize_activations=norm, dtype="float64")
    stock, x = stock_topk(sae), random_acts(3, 7, dtype=torch.float64)

    torch.testing.assert_close(sae.encode(x), stock.encode(x), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sae(x), stock(x), rtol=1e-9, atol=1e-12)


@both_classes
def test_latents_and_reconstructions_are_the_papers(training):
    paper = load_file(PAPER_DATA / "plain.safetensors")
    sae = random_sae(training, d_in=64, d_sae=512, k=8)
    sae.load_state_dict(
        {
            "W_enc": paper["encoder.weight"].T,
            "W_dec": paper["decoder.weight"].T,
            "b_dec": paper["pre_encoder_bias"],
        }
    )
    x = load_file(PAPER_DATA / "activations.safetensors")["resid_post"][:, :1]
    dense = torch.zeros(*x.shape[:-1], 512)
    dense.scatter_(-1, paper["topk_indices"], paper["topk_values"])

    torch.testing.assert_close(sae.encode(x), dense, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae(x), paper["recons"], rtol=1e-4, atol=1e-4)
    acts = sae.encode_topk(x)
    torch.testing.assert_close(scattered(acts, 512), dense, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(acts.mean, paper["stats_mean"])
    torch.testing.assert_close(acts.std, paper["stats_std"])
    torch.testing.assert_close(
        sae.decode_topk(acts), paper["recons"], rtol=1e-4, atol=1e-4
    )


def scattered(acts, d_sae: int) -> torch.Tensor:
    dense = acts.values.new_zeros(*acts.values.shape[:-1], d_sae)
    return dense.scatter(-1, acts.indices, acts.values)


@both_classes
@both_norms
@pytest.mark.parametrize("batch", [(1,), (5,), (3, 2), (2, 3, 4)])
@pytest.mark.parametrize("k", [1, 4, 64])
def test_the_sparse_path_equals_encode_and_decode(training, norm, batch, k):
    sae = random_sae(training, k=k, normalize_activations=norm, dtype="float64")
    x = random_acts(*batch, dtype=torch.float64)

    acts = sae.encode_topk(x)

    assert acts.values.shape == acts.indices.shape == (*batch, k)
    torch.testing.assert_close(scattered(acts, 64), sae.encode(x).detach())
    torch.testing.assert_close(sae.decode_topk(acts), sae(x).detach())


def test_the_sparse_path_carries_its_own_statistics():
    sae = random_sae(dtype="float64")
    a, b = random_acts(5, dtype=torch.float64), random_acts(3, dtype=torch.float64)

    acts = sae.encode_topk(a)
    sae.encode_topk(b)
    sae.encode(b)

    torch.testing.assert_close(sae.decode_topk(acts), sae(a).detach())


def test_a_vector_that_does_not_vary_gives_finite_numbers():
    sae, x = random_sae(), torch.full((1, D_MODEL), 3.0)

    torch.testing.assert_close(sae(x), x)
    torch.testing.assert_close(sae.decode_topk(sae.encode_topk(x)), x)


def test_fewer_than_k_latents_fire_where_pre_activations_are_negative():
    sae = random_sae(k=64)

    assert 0 < (sae.encode(random_acts(5)) > 0).sum(-1).max() < 64
    assert (sae.encode(random_acts(5)) >= 0).all()


# What SAELens expects of an SAE


@both_classes
def test_hook_points_see_input_pre_activations_latents_and_reconstruction(training):
    sae, x = random_sae(training), random_acts(5)

    out, cache = sae.run_with_cache(x)

    assert list(cache) == [
        "hook_sae_input",
        "hook_sae_acts_pre",
        "hook_sae_acts_post",
        "hook_sae_recons",
        "hook_sae_output",
    ]
    torch.testing.assert_close(cache["hook_sae_input"], x)
    torch.testing.assert_close(cache["hook_sae_acts_post"], sae.encode(x))
    torch.testing.assert_close(cache["hook_sae_output"], out)


def test_a_hook_on_the_latents_changes_the_reconstruction():
    sae, x = random_sae(normalize_activations="none"), random_acts(5)

    def silence(acts, hook):
        return torch.zeros_like(acts)

    out = sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", silence)])

    torch.testing.assert_close(out, sae.b_dec.expand(5, -1))


@both_classes
def test_the_error_term_restores_the_input_and_keeps_an_intervention(training):
    sae, x = random_sae(training, normalize_activations="none"), random_acts(5)
    with pytest.warns(DeprecationWarning, match="use_error_term"):
        sae.use_error_term = True

    torch.testing.assert_close(sae(x), x, rtol=1e-4, atol=1e-4)

    hooks = [("hook_sae_acts_post", lambda acts, hook: acts * 0)]
    removed = sae.encode(x) @ sae.W_dec
    out = sae.run_with_hooks(x, fwd_hooks=hooks)
    torch.testing.assert_close(out, x - removed, rtol=1e-4, atol=1e-4)


def test_decoding_before_encoding_is_an_error_with_advice():
    sae = random_sae()
    acts = sae.encode(random_acts(5))
    sae.decode(acts)

    with pytest.raises(RuntimeError, match="Call `encode` before each `decode`"):
        sae.decode(acts)


def test_a_new_sae_has_unit_decoder_rows_and_their_transpose_as_encoder():
    sae = MultiLayerTrainingSAE(tiny_sae_config())

    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(64))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    assert not sae.b_dec.any()
    assert {name for name, _ in sae.named_parameters()} == {"W_enc", "W_dec", "b_dec"}


@both_classes
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_converting_to_a_dtype_converts_all_of_the_sae(training, dtype):
    sae, x = random_sae(training), random_acts(5)
    before = sae(x)

    assert sae.to(dtype) is sae

    assert sae.dtype == dtype
    assert sae.cfg.dtype == str(dtype).removeprefix("torch.")
    assert {p.dtype for p in sae.parameters()} == {dtype}
    assert sae(x).dtype == sae.encode_topk(x).values.dtype == dtype
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
    error = (sae(x).float() - before).norm(dim=-1) / before.norm(dim=-1)
    assert error.median() < tolerance


@both_classes
def test_the_encoder_keeps_one_latent_together_in_memory(training, tmp_path):
    sae = random_sae(training)
    sae.save_model(tmp_path)
    host_class = TrainingSAE if training else SAE
    loaded = host_class.load_from_disk(tmp_path)
    reloaded = copy.deepcopy(loaded)
    reloaded.load_state_dict(sae.state_dict())
    if isinstance(reloaded, TrainingSAE):
        reloaded.load_weights_from_checkpoint(tmp_path)

    for each in (
        sae,
        loaded,
        reloaded,
        copy.deepcopy(sae),
        copy.deepcopy(sae).to(torch.bfloat16),
        host_class.load_from_disk(tmp_path, dtype="bfloat16"),
        host_class.from_dict(sae.cfg.to_dict()),
    ):
        assert each.W_enc.shape == (D_MODEL, 64)
        assert each.W_enc.T.is_contiguous()


# Copies


@both_classes
def test_a_deep_copy_shares_nothing(training):
    sae, x = random_sae(training), random_acts(5)
    before = sae(x).detach().clone()
    twin = copy.deepcopy(sae)
    torch.testing.assert_close(twin(x), before)

    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.cfg.metadata.hook_names.append("other")
    twin.cfg.k = 1
    twin.hook_sae_acts_post.add_hook(lambda acts, hook: acts * 0, is_permanent=True)

    torch.testing.assert_close(sae(x).detach(), before, rtol=0, atol=0)
    assert sae.cfg.metadata.hook_names == HOOK_NAMES
    assert sae.cfg.k == 4


@both_classes
def test_a_deep_copy_keeps_its_own_statistics_between_encode_and_decode(training):
    sae, a, b = random_sae(training), random_acts(5), random_acts(5)
    whole_a, whole_b = sae(a), sae(b)
    twin = copy.deepcopy(sae)

    acts_a, acts_b = twin.encode(a), sae.encode(b)

    torch.testing.assert_close(sae.decode(acts_b), whole_b)
    torch.testing.assert_close(twin.decode(acts_a), whole_a)


# Folding


@both_classes
def test_folding_the_decoder_norm_changes_nothing(training):
    sae = random_sae(training)
    before = {name: t.clone() for name, t in sae.state_dict().items()}

    sae.fold_W_dec_norm()

    assert all(torch.equal(before[name], t) for name, t in sae.state_dict().items())


def test_folding_a_decoder_norm_that_is_not_one_is_an_error():
    sae = random_sae()
    sae.W_dec.data[3] *= 1.5

    with pytest.raises(ValueError, match=r"one is off by 0\.5"):
        sae.fold_W_dec_norm()


def test_decoder_norms_that_are_not_a_number_are_an_error():
    sae = random_sae()
    sae.W_dec.data[3, 0] = torch.nan

    with pytest.raises(ValueError, match="off by nan"):
        sae.fold_W_dec_norm()


def test_folding_a_scale_gives_the_same_map_of_unscaled_inputs():
    sae, x = random_sae(normalize_activations="none", dtype="float64"), random_acts(5)
    scaled_acts, scaled_out = sae.encode(x * 0.25), sae(x * 0.25)

    sae.fold_activation_norm_scaling_factor(0.25)

    torch.testing.assert_close(sae.encode(x), scaled_acts)
    torch.testing.assert_close(sae(x), scaled_out / 0.25)


@both_classes
@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("fold_activation_norm_scaling_factor", (2.0,)),
        ("fold_activation_whitening", (torch.zeros(16), torch.eye(16), torch.eye(16))),
    ],
)
def test_a_standardising_sae_refuses_to_fold_a_scale(training, method, arguments):
    sae = random_sae(training)
    before = sae.W_enc.clone()

    with pytest.raises(ValueError, match="normalize_activations='none'"):
        getattr(sae, method)(*arguments)

    assert torch.equal(sae.W_enc, before)
    assert sae.cfg.normalize_activations == "layer_norm"


# On disk

LOAD_IN_FRESH_PROCESS = """
import sys
import sae_lens_multilayer
from sae_lens import SAE, TrainingSAE
from safetensors.torch import load_file, save_file
x = load_file(sys.argv[1])["x"]
out = {}
for folder in sys.argv[3:]:
    host_class = TrainingSAE if folder.endswith("checkpoint") else SAE
    sae = host_class.load_from_disk(folder)
    acts = sae.encode(x)
    out |= {f"{folder}/acts": acts, f"{folder}/out": sae.decode(acts)}
    print(folder, type(sae).__name__, sae.dtype, sae.cfg.k)
save_file({name: t.detach().contiguous() for name, t in out.items()}, sys.argv[2])
"""


def test_saved_saes_are_the_same_in_a_fresh_process(tmp_path):
    x, expected, printed = random_acts(5), {}, []
    save_file({"x": x}, tmp_path / "x")
    for dtype in ("float32", "bfloat16"):
        inference, training = random_sae(dtype=dtype), random_sae(True, dtype=dtype)
        for sae, save, folder, name in (
            (inference, inference.save_model, f"{dtype}-inference", "MultiLayerSAE"),
            (
                training,
                training.save_inference_model,
                f"{dtype}-final",
                "MultiLayerSAE",
            ),
            (
                training,
                training.save_model,
                f"{dtype}-checkpoint",
                "MultiLayerTrainingSAE",
            ),
        ):
            path = str(tmp_path / folder)
            save(path)
            expected |= {f"{path}/acts": sae.encode(x), f"{path}/out": sae(x)}
            printed.append(f"{path} {name} torch.{dtype} 4")

    out = run_fresh(
        LOAD_IN_FRESH_PROCESS,
        tmp_path / "x",
        tmp_path / "out",
        *[line.split()[0] for line in printed],
    )

    assert [line for line in out.splitlines() if "MultiLayer" in line] == printed
    for name, t in load_file(tmp_path / "out").items():
        torch.testing.assert_close(t, expected[name].detach(), rtol=0, atol=0)


@both_classes
def test_saving_and_loading_keeps_weights_settings_and_metadata(training, tmp_path):
    settings = {"aux_loss_coefficient": 0.5, "k_aux": 16} if training else {}
    sae = random_sae(training, normalize_activations="none", **settings)
    sae.save_model(tmp_path)

    loaded = (TrainingSAE if training else SAE).load_from_disk(tmp_path)

    assert type(loaded) is type(sae)
    assert loaded.cfg == sae.cfg
    assert loaded.cfg.metadata.hook_names == HOOK_NAMES
    for name, t in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], t)


def test_a_training_checkpoint_loads_for_inference(tmp_path):
    sae, x = random_sae(True), random_acts(5)
    sae.save_model(tmp_path)

    loaded = SAE.load_from_disk(tmp_path, fold_W_dec_norm=True)

    assert type(loaded) is MultiLayerSAE
    torch.testing.assert_close(loaded(x), sae(x), rtol=0, atol=0)


def test_saving_does_not_change_the_sae(tmp_path):
    sae = random_sae(True)
    pointers = [p.data_ptr() for p in sae.parameters()]

    sae.save_model(tmp_path)
    sae.save_inference_model(tmp_path)

    assert [p.data_ptr() for p in sae.parameters()] == pointers
    assert sae.W_enc.T.is_contiguous()


# Training by SAELens' own trainer


@both_norms
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saelens_own_trainer_trains_it_at_one_layer(norm, dtype):
    sae = MultiLayerTrainingSAE(
        tiny_sae_config(normalize_activations=norm, dtype=dtype)
    )
    directions = torch.randn(20, D_MODEL)
    x = (torch.rand(4096, 20) < 0.1).float() @ directions + 0.1 * torch.randn(D_MODEL)
    first = x[:256]

    def data():
        while True:
            yield x[torch.randint(len(x), (256,))]

    trainer = SAETrainer(host_trainer_config(300 * 256), sae, data())
    before = fvu(sae, first)
    trainer.fit()

    assert fvu(sae, first) < 0.5 * before
    assert 0 < sae.cfg.metadata.l0 < 4.01


def host_trainer_config(samples: int) -> SAETrainerConfig:
    return SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=samples,
        device="cpu",
        autocast=False,
        lr=5e-3,
        lr_end=5e-4,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=256,
        dead_feature_window=20,
        feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False),
    )


def fvu(sae, x) -> float:
    with torch.no_grad():
        error = (sae(x).float() - x).square().sum()
    return (error / (x - x.mean(0)).square().sum()).item()


def step_input(x, dead=None) -> TrainStepInput:
    return TrainStepInput(
        sae_in=x,
        coefficients={},
        dead_neuron_mask=dead,
        n_training_steps=0,
        is_logging_step=False,
    )


@pytest.mark.parametrize("with_dead", [False, True])
def test_the_trainers_dense_loss_and_the_sparse_step_agree(with_dead):
    sae = random_sae(True, dtype="float64", k_aux=8)
    x = random_acts(12, 3, dtype=torch.float64)
    dead = torch.arange(64) % 3 == 0 if with_dead else None

    dense = sae.training_forward_pass(step_input(x, dead))
    dense.loss.backward()
    gradients = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    sparse = sae.accumulate_gradients(x, dead, micro_batch_size=5)

    torch.testing.assert_close(sparse.loss, dense.loss.detach())
    torch.testing.assert_close(sparse.aux_loss > 0, torch.tensor(with_dead))
    for name, p in sae.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name])


def test_a_batch_in_another_dtype_is_widened_a_part_at_a_time(monkeypatch):
    wide, low = random_sae(True), random_acts(40, 2, dtype=torch.bfloat16)
    parts = copy.deepcopy(wide)
    expected = wide.accumulate_gradients(low.float(), None, micro_batch_size=5)
    sizes = []
    original = torch.Tensor.to

    def record(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        # The indices of active latents are converted, too.
        is_copy = out is not self and out.is_floating_point()
        sizes.append(out.numel() if is_copy else 0)
        return out

    monkeypatch.setattr(torch.Tensor, "to", record)
    step = parts.accumulate_gradients(low, None, micro_batch_size=5)
    assert max(sizes) == 5 * D_MODEL
    assert torch.equal(step.loss, expected.loss)
    for a, b in zip(parts.parameters(), wide.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_a_batch_of_rows_is_a_batch_of_one_layer():
    sae, x = random_sae(True), random_acts(12)

    rows = sae.training_forward_pass(step_input(x))
    one_layer = sae.training_forward_pass(step_input(x.unsqueeze(1)))

    assert rows.sae_out.shape == (12, D_MODEL)
    assert rows.feature_acts.shape == rows.hidden_pre.shape == (12, 64)
    torch.testing.assert_close(rows.loss, one_layer.loss)
    torch.testing.assert_close(rows.sae_out, one_layer.sae_out.squeeze(1))
    torch.testing.assert_close(rows.sae_out, sae(x))
    assert set(rows.losses) == {"mse_loss", "auxiliary_reconstruction_loss"}


def test_the_auxiliary_loss_alone_is_refused():
    with pytest.raises(NotImplementedError, match="`training_forward_pass`"):
        random_sae(True).calculate_aux_loss()


# Settings


@pytest.mark.parametrize(
    ("d_in", "d_sae", "k_aux"),
    [(512, 4096, 256), (64, 512, 32), (16, 64, 8), (64, 16, 16), (1, 4, 1)],
)
def test_k_aux_is_a_power_of_two_near_half_the_width(d_in, d_sae, k_aux):
    cfg = MultiLayerTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=1)

    assert cfg.k_aux == k_aux
    assert cfg.to_dict()["metadata"]["training_architecture_details"]["k_aux"] == k_aux
    assert cfg.metadata["training_architecture_details"]["k_aux"] == k_aux


def test_training_settings_default_to_the_papers_recipe():
    cfg = MultiLayerTrainingSAEConfig(d_in=512, d_sae=64 * 512)

    assert cfg.k == 32
    assert cfg.aux_loss_coefficient == 1 / 32
    assert cfg.dead_after_tokens == 10_000_000
    assert cfg.dead_latent_threshold == 1e-3
    assert cfg.normalize_activations == "layer_norm"
    assert cfg.apply_b_dec_to_input is True


@pytest.mark.parametrize(
    "config_class", [MultiLayerSAEConfig, MultiLayerTrainingSAEConfig]
)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 65}, "`k` .* d_sae = 64; got 65"),
        ({"k": 0}, "`k` .*got 0"),
        ({"d_in": 0}, "`d_in` .*got 0"),
        ({"d_sae": -64}, "`d_sae` .*got -64"),
        (
            {"normalize_activations": "expected_average_only_in"},
            "`normalize_activations` .*'layer_norm'.*got 'expected_average_only_in'",
        ),
        ({"normalize_activations": "batch_norm"}, "Got batch_norm"),
        ({"apply_b_dec_to_input": False}, "`apply_b_dec_to_input` .*got False"),
        ({"reshape_activations": "hook_z"}, "`reshape_activations` .*got 'hook_z'"),
    ],
)
def test_settings_out_of_range_are_an_error(config_class, changes, message):
    with pytest.raises(ValueError, match=message):
        config_class(**{"d_in": 16, "d_sae": 64, "k": 4, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k_aux": 65}, "`k_aux` .* d_sae = 64; got 65"),
        ({"k_aux": 0}, "`k_aux` .*got 0"),
    ],
)
def test_training_settings_out_of_range_are_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_sae_config(**changes)


@both_classes
def test_settings_survive_json(training):
    cfg = random_sae(training).cfg

    again = (MultiLayerTrainingSAEConfig if training else SAEConfig).from_dict(
        json.loads(json.dumps(cfg.to_dict()))
    )

    assert again == cfg


def test_building_and_using_an_sae_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sae = random_sae(True)
        sae(random_acts(5))
        sae.views()
