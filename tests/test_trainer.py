"""The trainer on batches made by hand.

Reference: brute force for counters, starts and metrics; the same batches in other
pieces for accumulation; the formulas of the schedules; SAELens' SAE after folding its
scale.
"""

import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import D_MODEL, N_LAYERS, count_calls, tiny_sae_config
from sae_lens import (
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    StandardTrainingSAEConfig,
    TrainingSAE,
)
from saes import random_acts, random_sae
from torch import Tensor

from sae_lens_multilayer import MultiLayerConfig, MultiLayerTrainingSAE
from sae_lens_multilayer.topk import select
from sae_lens_multilayer.training import memory, steps
from sae_lens_multilayer.training.geometric_median import median_of_inputs
from sae_lens_multilayer.training.scale import fold_scale
from sae_lens_multilayer.training.trainer import MultiLayerTrainer

RESID_POST = [f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS)]
D_SAE = 64
BATCH = 64


def random_batches(n: int, tokens: int = BATCH, seed: int = 0) -> list[Tensor]:
    """Batches whose layers differ in mean and scale, like those of a model."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([1.0, 20.0]).view(1, -1, 1)
    shape = (n, tokens, N_LAYERS, D_MODEL)
    x = torch.randn(shape, generator=generator) * scale + scale
    return list(x * (1 + torch.arange(D_MODEL) / D_MODEL))


class Batches(Iterator[Tensor]):
    """Serves a list of batches over and over."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches, self.n_taken = batches, 0

    def __next__(self) -> Tensor:
        self.n_taken += 1
        return self.batches[(self.n_taken - 1) % len(self.batches)].clone()


def build_sae(config: MultiLayerConfig, seed: int = 0) -> TrainingSAE[Any]:
    torch.manual_seed(seed)
    sae_config = config.get_training_sae_cfg_dict()
    if config.standardizes_stock_inputs:
        sae_config["normalize_activations"] = "layer_norm"
    return TrainingSAE.from_dict(sae_config)


def make_trainer(config: MultiLayerConfig, batches=None) -> MultiLayerTrainer:
    trainer_config = config.to_sae_trainer_config()
    trainer_config.hook_names = RESID_POST
    return MultiLayerTrainer(
        cfg=trainer_config,
        sae=build_sae(config),
        data_provider=Batches(batches or random_batches(4)),
    )


def take_steps(trainer: MultiLayerTrainer, n_steps: int) -> list[Any]:
    stats = []
    for _ in range(n_steps):
        stats.append(trainer.step(next(trainer.data_provider)))
        trainer.n_training_steps += 1
    return stats


def weights(sae) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in sae.named_parameters()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], **tolerance) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance)


class TestDeadLatents:
    @pytest.mark.parametrize("threshold", [0.0, 2.0])
    def test_counter_is_tokens_since_a_latent_last_fired_on_any_layer(
        self, make_config, threshold
    ):
        config = make_config(
            sae=tiny_sae_config(
                k=2, dead_after_tokens=192, dead_latent_threshold=threshold
            ),
            lr=3e-2,
        )
        trainer = make_trainer(config, random_batches(12))
        assert isinstance(trainer.sae, MultiLayerTrainingSAE)
        expected = torch.zeros(D_SAE, dtype=torch.int64)
        any_dead = False
        for _ in range(12):
            x = next(trainer.data_provider)
            if trainer.n_training_steps == 0:
                trainer.sae.b_dec.data.copy_(median_of_inputs(trainer.sae, x))
            acts = trainer.sae.encode(x)
            fired = (acts > threshold).any(0).any(0)
            was_dead = expected >= 192
            stats = trainer.step(x)
            trainer.n_training_steps += 1
            expected = torch.where(fired, 0, expected + BATCH)
            assert torch.equal(trainer.tokens_since_fired, expected)
            assert torch.equal(trainer.dead_neurons, expected >= 192)
            aux_loss = stats.losses["auxiliary_reconstruction_loss"]
            assert (aux_loss > 0) == was_dead.any()
            any_dead |= bool(was_dead.any())
        assert any_dead
        assert not trainer.dead_neurons.all()

    def test_stock_latent_is_dead_after_more_than_the_hosts_window_of_steps(
        self, make_config
    ):
        config = make_config(
            sae=StandardTrainingSAEConfig(d_in=D_MODEL, d_sae=D_SAE),
            dead_feature_window=3,
        )
        trainer = make_trainer(config)
        trainer.sae.state_dict()["b_enc"][5] = -1e6
        for step in range(6):
            take_steps(trainer, 1)
            # The host: passes since fired > dead_feature_window.
            assert trainer.dead_neurons[5] == (step + 1 > 3)
        assert trainer.dead_neurons.sum() == 1


class TestAccumulation:
    @pytest.mark.parametrize("normalization", ["layer_norm", "none"])
    def test_update_does_not_depend_on_the_micro_batch(
        self, make_config, normalization
    ):
        def train(micro):
            config = make_config(
                sae=tiny_sae_config(
                    k=2,
                    dtype="float64",
                    dead_after_tokens=100,
                    normalize_activations=normalization,
                ),
                train_batch_size_tokens=48,
                micro_batch_size_tokens=micro,
                lr=1e-2,
                max_grad_norm=0.5,
            )
            batches = [b.double() for b in random_batches(8, 48)]
            trainer = make_trainer(config, batches)
            stats = take_steps(trainer, 8)
            return weights(trainer.sae), stats, trainer

        expected, whole, trainer = train(None)
        assert whole[-1].losses["auxiliary_reconstruction_loss"] > 0
        for micro in (3, 16, 48):
            result, stats, other = train(micro)
            assert_same(result, expected, rtol=1e-9, atol=1e-10)
            for mine, theirs in zip(stats, whole, strict=True):
                torch.testing.assert_close(mine.by_layer(), theirs.by_layer())
                for name in ("fire_counts", "max_acts"):
                    torch.testing.assert_close(
                        getattr(mine, name), getattr(theirs, name)
                    )
            assert torch.equal(other.tokens_since_fired, trainer.tokens_since_fired)

    @pytest.mark.parametrize("standardize", [True, False])
    @pytest.mark.parametrize(
        "sae_config", [StandardTrainingSAEConfig, GatedTrainingSAEConfig]
    )
    def test_update_of_a_stock_sae_does_not_depend_on_the_micro_batch(
        self, make_config, sae_config, standardize
    ):
        def train(micro):
            config = make_config(
                sae=sae_config(d_in=D_MODEL, d_sae=D_SAE, dtype="float64"),
                micro_batch_size_tokens=micro,
                standardize_stock_inputs=standardize,
                lr=1e-3,
            )
            batches = [b.double() for b in random_batches(6)]
            trainer = make_trainer(config, batches)
            stats = take_steps(trainer, 6)
            return weights(trainer.sae), stats[-1]

        expected, whole = train(None)
        for micro in (4, 64):
            result, stats = train(micro)
            assert_same(result, expected, rtol=1e-8, atol=1e-9)
            torch.testing.assert_close(stats.sums.fvu, whole.sums.fvu)
            torch.testing.assert_close(
                stats.losses["overall_loss"], whole.losses["overall_loss"]
            )


class TestSteps:
    def test_decoder_rows_have_unit_norm_after_every_step(self, make_config):
        trainer = make_trainer(make_config(lr=0.1))
        for _ in range(10):
            take_steps(trainer, 1)
            norms = trainer.sae.W_dec.norm(dim=1)
            torch.testing.assert_close(norms, torch.ones(D_SAE), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("normalization", ["layer_norm", "none"])
    def test_b_dec_starts_at_the_geometric_median_of_what_the_encoder_sees(
        self, make_config, normalization
    ):
        sae_config = tiny_sae_config(normalize_activations=normalization)
        trainer = make_trainer(make_config(sae=sae_config, lr=1e-30))
        x = random_batches(1)[0]
        take_steps(trainer, 1)
        vectors = x.flatten(0, 1).double()
        if normalization == "layer_norm":
            std, mean = torch.std_mean(vectors, dim=1, keepdim=True)
            vectors = (vectors - mean) / (std + 1e-5)
        expected = weiszfeld(vectors)
        found = trainer.sae.b_dec.double()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize(("given", "taken"), [(None, 512), (100, 100)])
    def test_weights_are_not_read_again_for_every_few_vectors(
        self, monkeypatch, given, taken
    ):
        monkeypatch.setitem(select._BLOCK_ELEMENTS, "cpu", 64)  # as if d_sae were large
        calls = count_calls(monkeypatch, MultiLayerTrainingSAE, "accumulate_gradients")
        dead = torch.zeros(64, dtype=torch.bool)
        steps.topk_gradients(random_sae(True), random_acts(600, 2), dead, given)
        assert calls[0][0][3] == taken

    @pytest.mark.parametrize("micro", [None, 16])
    def test_stats_of_a_step_are_those_by_brute_force(self, make_config, micro):
        trainer = make_trainer(make_config(micro_batch_size_tokens=micro))
        take_steps(trainer, 1)
        x = next(trainer.data_provider)
        with torch.no_grad():
            acts = trainer.sae.encode(x)
            x_hat = trainer.sae.decode(acts)
        stats = trainer.step(x)
        error = (x_hat - x).square().sum((0, 2))
        expected = {
            "fvu": error / (x - x.mean(0)).square().sum((0, 2)),
            "mse": error / x[:, 0].numel(),
            "l0": (acts > 0).sum(2).float().mean(0),
            "l1": acts.sum(2).mean(0),
        }
        found = stats.by_layer()
        found |= {"fire_counts": stats.fire_counts, "max_acts": stats.max_acts}
        expected["fire_counts"] = (acts > 0).sum((0, 1))
        expected["max_acts"] = acts.amax((0, 1))
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name].to(value.dtype), value, rtol=1e-4, atol=1e-4
            )
        assert stats.n_tokens == BATCH

    @pytest.mark.parametrize(
        ("normalization", "standardize"),
        [
            ("none", True),
            ("none", False),
            ("layer_norm", False),
            ("expected_average_only_in", False),
            ("covariance_whitening", False),
        ],
    )
    def test_stats_of_a_stock_step_are_in_raw_space(
        self, make_config, normalization, standardize
    ):
        config = make_config(
            sae=StandardTrainingSAEConfig(
                d_in=D_MODEL, d_sae=D_SAE, normalize_activations=normalization
            ),
            standardize_stock_inputs=standardize,
            n_batches_for_norm_estimate=3,
            lr=1e-30,
        )
        trainer = make_trainer(config)
        trainer._estimate_scale()
        x = next(trainer.data_provider)
        stats = trainer.step(x)
        fold_scale(trainer.activation_scaler, trainer.sae)
        # After folding, the SAE takes and gives raw vectors by itself.
        with torch.no_grad():
            x_hat = trainer.sae(x)
        torch.testing.assert_close(
            stats.sums.mse, (x_hat - x).square().mean((0, 2)), rtol=1e-3, atol=1e-5
        )

    def test_loss_that_is_not_finite_changes_nothing(self, make_config):
        trainer = make_trainer(make_config())
        take_steps(trainer, 3)
        before, state = weights(trainer.sae), trainer.optimizer.state_dict()["state"]
        moments = {i: s["exp_avg"].clone() for i, s in state.items()}
        counter = trainer.tokens_since_fired.clone()
        bad = next(trainer.data_provider)
        bad[3, 1, 2] = float("nan")
        with pytest.raises(FloatingPointError, match="the loss is nan at step 3"):
            trainer.step(bad)
        assert_same(weights(trainer.sae), before, rtol=0, atol=0)
        for i, s in trainer.optimizer.state_dict()["state"].items():
            assert torch.equal(s["exp_avg"], moments[i])
        assert torch.equal(trainer.tokens_since_fired, counter)
        assert trainer.n_training_samples == 3 * BATCH
        take_steps(trainer, 1)  # and the gradients of the bad batch are gone
        assert all(p.isfinite().all() for p in trainer.sae.parameters())

    def test_loss_that_is_not_finite_at_the_first_step_changes_nothing(
        self, make_config
    ):
        trainer = make_trainer(make_config())
        before = weights(trainer.sae)
        with pytest.raises(FloatingPointError, match="at step 0"):
            trainer.step(torch.full((BATCH, N_LAYERS, D_MODEL), float("inf")))
        assert_same(weights(trainer.sae), before, rtol=0, atol=0)

    @pytest.mark.parametrize("max_norm", [None, 0.01])
    def test_gradient_is_clipped_only_on_request(self, make_config, max_norm):
        trainer = make_trainer(make_config(max_grad_norm=max_norm))
        norms = []
        original = trainer.optimizer.step

        def step(*args, **kwargs):
            grads = [
                p.grad.flatten() for p in trainer.sae.parameters() if p.grad is not None
            ]
            norms.append(torch.nn.utils.get_total_norm(grads).item())
            return original(*args, **kwargs)

        trainer.optimizer.step = step
        take_steps(trainer, 5)
        if max_norm is None:
            assert max(norms) > 0.05
        else:
            assert 0 < max(norms) <= 0.01 + 1e-6

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({}, [1.0] * 8),
            ({"lr_warm_up_steps": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
            ({"lr_decay_steps": 4}, [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
            (
                {"lr_scheduler_name": "cosineannealing", "lr_end": 0.0},
                [(1 + np.cos(np.pi * i / 8)) / 2 for i in range(8)],
            ),
            (
                {
                    "lr_scheduler_name": "cosineannealingwarmrestarts",
                    "n_restart_cycles": 2,
                    "lr_end": 0.0,
                },
                [(1 + np.cos(np.pi * i / 4)) / 2 for i in range(4)] * 2,
            ),
        ],
        ids=["constant", "warm_up", "decay", "cosine", "restarts"],
    )
    def test_learning_rate_follows_its_schedule(self, make_config, changes, expected):
        trainer = make_trainer(make_config(lr=1e-2, **changes))
        rates = []
        for _ in range(8):
            rates.append(trainer.optimizer.param_groups[0]["lr"] / 1e-2)
            take_steps(trainer, 1)
        np.testing.assert_allclose(rates, expected, atol=1e-6)

    def test_coefficients_of_a_stock_sae_warm_up(self, make_config):
        config = make_config(
            sae=StandardTrainingSAEConfig(
                d_in=D_MODEL, d_sae=D_SAE, l1_coefficient=2.0, l1_warm_up_steps=4
            )
        )
        trainer = make_trainer(config)
        seen = []
        original = trainer.sae.training_forward_pass

        def forward(step_input):
            seen.append(step_input.coefficients["l1"])
            return original(step_input)

        trainer.sae.training_forward_pass = forward
        take_steps(trainer, 6)
        assert seen == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]

    def test_stock_sae_runs_under_autocast(self, make_config):
        config = make_config(
            sae=StandardTrainingSAEConfig(d_in=D_MODEL, d_sae=D_SAE),
            autocast=True,
            micro_batch_size_tokens=16,
            lr=1e-2,
        )
        trainer = make_trainer(config)
        stats = take_steps(trainer, 40)
        assert stats[-1].sums.fvu.mean() < 0.5 * stats[0].sums.fvu.mean()
        assert trainer.sae.W_enc.dtype == torch.float32
        without = make_trainer(replace(config, autocast=False))
        assert not torch.equal(take_steps(without, 1)[0].sums.fvu, stats[0].sums.fvu)

    @pytest.mark.parametrize("store_dtype", ["float32", "bfloat16"])
    def test_bfloat16_sae_trains(self, make_config, store_dtype):
        config = make_config(
            sae=tiny_sae_config(dtype="bfloat16"), lr=1e-2, dtype=store_dtype
        )
        batches = [b.to(getattr(torch, store_dtype)) for b in random_batches(2)]
        trainer = make_trainer(config, batches)
        stats = take_steps(trainer, 60)
        assert trainer.sae.W_dec.dtype == torch.bfloat16
        assert stats[-1].sums.fvu.mean() < 0.8 * stats[0].sums.fvu.mean()
        torch.testing.assert_close(
            trainer.sae.W_dec.float().norm(dim=1), torch.ones(D_SAE), rtol=0, atol=1e-2
        )


def weiszfeld(points: Tensor) -> Tensor:
    median = points.mean(0)
    for _ in range(2000):
        weight = 1 / (points - median).norm(dim=1, keepdim=True)
        median = (weight * points).sum(0) / weight.sum()
    return median


class TestState:
    @pytest.mark.parametrize(
        ("sae_config", "changes"),
        [
            (tiny_sae_config(dead_after_tokens=100, k=1), {"lr_warm_up_steps": 6}),
            (
                StandardTrainingSAEConfig(
                    d_in=D_MODEL, d_sae=D_SAE, l1_warm_up_steps=10
                ),
                {"lr_scheduler_name": "cosineannealing", "lr_decay_steps": 3},
            ),
            (
                JumpReLUTrainingSAEConfig(
                    d_in=D_MODEL,
                    d_sae=D_SAE,
                    l0_warm_up_steps=10,
                    normalize_activations="expected_average_only_in",
                ),
                {
                    "lr_scheduler_name": "cosineannealingwarmrestarts",
                    "n_restart_cycles": 2,
                    "standardize_stock_inputs": False,
                    "n_batches_for_norm_estimate": 2,
                },
            ),
        ],
        ids=["multilayer", "standard", "jumprelu"],
    )
    def test_a_loaded_trainer_continues_exactly(
        self, make_config, tmp_path, sae_config, changes
    ):
        config = make_config(sae=sae_config, training_tokens=640, lr=1e-2, **changes)
        first, second = (make_trainer(config, random_batches(10)) for _ in range(2))
        first._estimate_scale()
        take_steps(first, 5)
        first.save_checkpoint("here", tmp_path)
        second.load_trainer_state(tmp_path / "here")
        second.sae.load_weights_from_checkpoint(tmp_path / "here")
        # A loaded scale is kept: no batch is taken to estimate it.
        second.data_provider = first.data_provider = iter(random_batches(10))
        second._estimate_scale()
        for _ in range(5):
            batch = next(second.data_provider)
            losses = []
            for trainer in (first, second):
                losses.append(trainer.step(batch).losses["overall_loss"])
                trainer.n_training_steps += 1
            assert losses[0] == losses[1]
        assert next(second.data_provider).equal(random_batches(10)[5])
        assert_same(weights(first.sae), weights(second.sae), rtol=0, atol=0)
        assert torch.equal(first.tokens_since_fired, second.tokens_since_fired)
        assert torch.equal(first.log_feature_sparsity, second.log_feature_sparsity)
        assert first.n_training_samples == second.n_training_samples == 640
        assert first.get_coefficients() == second.get_coefficients()

    def test_random_numbers_of_an_architecture_continue(self, make_config, tmp_path):
        trainer = make_trainer(make_config())
        take_steps(trainer, 1)
        trainer.save_checkpoint("here", tmp_path)
        expected = torch.rand(3)
        torch.manual_seed(5)
        trainer.load_trainer_state(tmp_path / "here")
        assert torch.equal(torch.rand(3), expected)

    def test_the_files_of_a_state_need_no_pickle(self, make_config, tmp_path):
        trainer = make_trainer(make_config())
        take_steps(trainer, 2)
        trainer.save_checkpoint("here", tmp_path)
        kinds = {path.suffix for path in (tmp_path / "here").iterdir()}
        assert kinds == {".json", ".safetensors"}

    def test_a_failure_while_saving_leaves_nothing(
        self, make_config, tmp_path, monkeypatch
    ):
        trainer = make_trainer(make_config())
        take_steps(trainer, 1)
        trainer.save_checkpoint_fn = fail
        with pytest.raises(OSError, match="disk is full"):
            trainer.save_checkpoint("here", tmp_path)
        assert list(tmp_path.iterdir()) == []


def fail(*args: Any, **kwargs: Any) -> None:
    raise OSError("The disk is full")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc")
@pytest.mark.parametrize("keeps", [True, False])
def test_freed_memory_is_kept_for_the_next_step(keeps):
    # Authority: the kernel's count of pages that were handed out; 80 MiB are 20,480.
    # The module alone in a process without torch: what else is in the heap decides what
    # glibc returns. PR_SET_THP_DISABLE (41) is against huge pages, which are fewer.
    code = f"""
import ctypes, resource, runpy
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.prctl(41, 1, 0, 0, 0)
if {keeps}:
    runpy.run_path({memory.__file__!r})["keep_freed_memory"]()
n_faults = []
for _ in range(3):
    blocks = [libc.malloc(20 << 20) for _ in range(4)]
    for block in blocks:
        ctypes.memset(block, 1, 20 << 20)
    for block in blocks:
        libc.free(block)
    n_faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(n_faults[2] - n_faults[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert (int(done.stdout) < 2_000) == keeps
