"""Results on a device are those of the CPU: the step, the store, runs, evaluation.

`make gpu` runs these tests; elsewhere they are skipped where there is no GPU. The
environment variable `TEST_DEVICE=cpu` runs them without one, to try the tests.
"""

import copy
import os

import pytest
import torch
from conftest import N_LAYERS, tiny_model
from sae_lens import LanguageModelSAETrainingRunner
from saes import HOOK_NAMES, random_acts, random_lens, random_sae
from test_crosscoder import random_crosscoder
from test_routed import random_routed
from test_topk_sparse import (
    Weights,
    copies,
    gradients,
    make_case,
    relative_error,
    some_dead,
)

from sae_lens_multilayer import MultiLayerActivationsStore, evaluate
from sae_lens_multilayer.sae.multi_layer_sae import MultiLayerSAE
from sae_lens_multilayer.topk.reference import training_loss
from sae_lens_multilayer.topk.select import CertifiedEncoder, make_encoder
from sae_lens_multilayer.topk.sparse import decode_topk, encode_topk
from sae_lens_multilayer.topk.step import training_step

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU"
    ),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _full_precision() -> None:
    """TF32 would round float32 factors to 11 bits."""
    assert not torch.backends.cuda.matmul.allow_tf32


def on(device: str, weights: Weights, dtype: torch.dtype | None = None) -> Weights:
    """Copies of the weights on a device."""
    W_enc, W_dec, b_dec = (w.to(device, dtype) for w in weights)
    return copies((W_enc, W_dec, b_dec))


@pytest.mark.parametrize("certified", [False, True])
@pytest.mark.parametrize("dead_share", [0.0, 0.3])
@pytest.mark.parametrize("micro_batch_size", [64, 100_000])
def test_step_is_that_of_autograd_in_float64(certified, dead_share, micro_batch_size):
    z, weights = make_case(301, 3, 67, 2051, torch.float32)
    options = {"k": 9, "k_aux": 32, "aux_coefficient": 0.3}
    dead = some_dead(2051, dead_share)
    dense = on("cpu", weights, torch.float64)
    losses = training_loss(z.double(), *dense, dead_latents=dead, **options)
    losses.loss.backward()
    sparse = on(DEVICE, weights)
    step = training_step(
        z.to(DEVICE),
        *sparse,
        micro_batch_size=micro_batch_size,
        certified=certified,
        dead_latents=dead.to(DEVICE),
        **options,
    )
    assert step.loss.device.type == DEVICE
    assert step.loss.item() == pytest.approx(losses.loss.item(), rel=1e-5)
    for actual, expected in zip(gradients(sparse), gradients(dense), strict=True):
        assert relative_error(actual.cpu(), expected) < 1e-5


@pytest.mark.parametrize("random_token_sae", [random_crosscoder, random_routed])
@pytest.mark.parametrize("dead_share", [0.0, 0.3])
def test_step_of_a_token_sae_is_that_of_autograd_in_float64(
    random_token_sae, dead_share
):
    sae = random_token_sae(training=True)
    dense = copy.deepcopy(sae).double()
    x, dead = random_acts(300, N_LAYERS), some_dead(sae.cfg.d_sae, dead_share)
    losses = dense.dense_loss(
        x.double(), *dense.loss_weights(), **dense.loss_options(), dead_latents=dead
    )
    losses.loss.backward()
    sae.to(DEVICE)
    step = sae.accumulate_gradients(x.to(DEVICE), dead.to(DEVICE), 64)
    assert step.loss.device.type == DEVICE
    assert step.loss.item() == pytest.approx(losses.loss.item(), rel=1e-5)
    for actual, expected in zip(sae.parameters(), dense.parameters(), strict=True):
        assert relative_error(actual.grad.cpu(), expected.grad) < 1e-4


@pytest.mark.parametrize("certified", [False, True])
def test_selected_latents_and_reconstructions_are_those_of_float64(certified):
    z, (W_enc, W_dec, b_dec) = make_case(301, 1, 67, 2051, torch.float32)
    x = z[:, 0]
    acts = encode_topk(
        x.to(DEVICE), W_enc.to(DEVICE), b_dec.to(DEVICE), 9, certified=certified
    )
    expected = encode_topk(x.double(), W_enc.double(), b_dec.double(), 9)
    found = acts.indices.cpu().sort(-1).values
    assert (found == expected.indices.sort(-1).values).all()
    x_hat = decode_topk(acts, W_dec.to(DEVICE), b_dec.to(DEVICE)).cpu()
    exact = decode_topk(expected, W_dec.double(), b_dec.double())
    assert relative_error(x_hat, exact) < 1e-5


def test_rows_that_bfloat16_cannot_order_are_selected_in_float32():
    """Latents that differ by less than bfloat16's rounding: nothing can be proven."""
    rows = torch.ones(2048, 64) + 1e-4 * torch.randn(2048, 64)
    v = torch.ones(300, 64) + 1e-3 * torch.randn(300, 64)
    encoder = make_encoder(rows.to(DEVICE), 8, n_acts=300, certified=True)
    assert isinstance(encoder, CertifiedEncoder)
    selection = encoder(v.to(DEVICE))
    assert encoder.n_unproven == 300
    expected = (v.double() @ rows.double().T).topk(8).values
    torch.testing.assert_close(
        selection.values.cpu().sort(descending=True).values, expected.float()
    )


@pytest.fixture
def on_device(tokenizer):
    return tiny_model(tokenizer).to(DEVICE)


@pytest.fixture
def device_config(make_config):
    def config(device: str, **changes):
        names = ("device", "llm_device", "act_store_device")
        return make_config(**dict.fromkeys(names, device), **changes)

    return config


def test_store_serves_the_vectors_of_the_cpu(
    model, on_device, device_config, token_dataset
):
    batches = [
        next(
            MultiLayerActivationsStore.from_config(lm, device_config(d), token_dataset)
        )
        for lm, d in ((model, "cpu"), (on_device, DEVICE))
    ]
    assert batches[1].device.type == DEVICE
    torch.testing.assert_close(batches[1].cpu(), batches[0], rtol=1e-4, atol=1e-4)


def run(cfg, model, dataset):
    runner = LanguageModelSAETrainingRunner(
        cfg, override_dataset=dataset, override_model=model
    )
    return runner.run()


def test_run_ends_with_the_weights_of_the_cpu(
    model, on_device, device_config, token_dataset, tmp_path
):
    own = {"output_path": None, "checkpoint_path": None}
    expected = run(device_config("cpu", **own), model, token_dataset)
    cfg = device_config(DEVICE, output_path=str(tmp_path / "sae"), checkpoint_path=None)
    found = run(cfg, on_device, token_dataset)
    assert found.W_dec.device.type == DEVICE
    for name, weight in found.state_dict().items():
        assert relative_error(weight.cpu(), expected.state_dict()[name]) < 1e-3
    saved = MultiLayerSAE.load_from_disk(tmp_path / "sae", device=DEVICE)
    assert torch.equal(saved.W_dec, found.W_dec)


def test_run_resumes_from_a_checkpoint(on_device, device_config, token_dataset):
    cfg = device_config(DEVICE, n_checkpoints=2, save_final_checkpoint=True)
    whole = run(cfg, on_device, token_dataset)
    again = device_config(
        DEVICE, resume_from_checkpoint="latest", output_path=None, n_checkpoints=2
    )
    resumed = run(again, on_device, token_dataset)
    for name, weight in resumed.state_dict().items():
        assert relative_error(weight, whole.state_dict()[name]) < 1e-4


@pytest.mark.parametrize("from_middle", [True, False])
@pytest.mark.parametrize("with_lens", [True, False])
def test_evaluation_is_that_of_the_cpu(
    model, on_device, token_dataset, from_middle, with_lens
):
    sae = random_sae()
    if with_lens:
        sae.lens = random_lens(HOOK_NAMES)
    tokens = torch.tensor(token_dataset["input_ids"])[:8]
    tables = [
        evaluate(s, lm, tokens.to(d), from_middle=from_middle).to_dataframe()
        for s, lm, d in (
            (sae, model, "cpu"),
            (sae.to(DEVICE), on_device, DEVICE),
        )
    ]
    assert len(tables[0]) == N_LAYERS
    torch.testing.assert_close(
        torch.tensor(tables[1].to_numpy(float)),
        torch.tensor(tables[0].to_numpy(float)),
        rtol=1e-3,
        atol=1e-4,
        equal_nan=True,
    )
