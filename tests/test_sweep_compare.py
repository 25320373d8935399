"""One SAE compared with single-layer SAEs. Reference: the functions on saved SAEs."""

from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from conftest import D_VOCAB, N_CTX, count_calls, tiny_model
from datasets import Dataset
from sae_lens import SAE
from test_sweeps import BASE

from sae_lens_multilayer import (
    MultiLayerSAETrainingRunner,
    PointsFailedError,
    SingleLayerRuns,
    SweepEvaluation,
    cli,
    fit_tuned_lens,
    train_and_compare,
)
from sae_lens_multilayer.analysis import (
    TransferMatrix,
    compare_with_single_layers,
    transfer_matrix,
)
from sae_lens_multilayer.models import loading
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.sweeps import sweep as run_module
from sae_lens_multilayer.training.trainer import MultiLayerTrainer

N_LAYERS = 3
SIZES = {"sae": {"expansion_factor": 2, "k": 4, "k_aux": 8}}
EVALUATION = SweepEvaluation(n_tokens=8 * N_CTX)


@pytest.fixture
def deep(tokenizer) -> Any:
    return tiny_model(tokenizer, n_layers=N_LAYERS)


@pytest.fixture
def held_out():
    tokens = torch.randint(1, D_VOCAB, (16, N_CTX))
    return Dataset.from_dict({"input_ids": tokens.tolist()})


@pytest.fixture
def run(deep, token_dataset, held_out, tmp_path):
    def compare(**changes) -> SingleLayerRuns:
        return train_and_compare(
            {**BASE, **SIZES, **changes},
            tmp_path / "out",
            evaluation=EVALUATION,
            override_model=deep,
            override_dataset=token_dataset,
            override_evaluation_dataset=held_out,
        )

    return compare


def saes_in(folder) -> tuple[SAE[Any], list[SAE[Any]]]:
    names = ["multi_layer", *(f"layer_{layer}" for layer in range(N_LAYERS))]
    multi, *singles = [SAE.load_from_disk(folder / name / "sae") for name in names]
    return multi, singles


def test_all_is_measured_on_the_same_tokens(run, deep, held_out, tmp_path):
    found = run()

    multi, singles = saes_in(tmp_path / "out")
    tokens = torch.tensor(held_out["input_ids"][:8])
    alone = compare_with_single_layers(multi, singles, deep, tokens)
    table = found.comparison.to_dataframe()
    pd.testing.assert_frame_equal(table, alone.to_dataframe(), rtol=1e-6, atol=1e-6)
    expected = transfer_matrix(singles, deep, tokens, multi_layer=multi)
    assert found.transfer is not None
    torch.testing.assert_close(found.transfer.fvu, expected.fvu)
    # A single-layer SAE at its own layer is the diagonal.
    own = table["fvu", "single_layer"].to_numpy()
    assert own == pytest.approx(found.transfer.fvu.diagonal().numpy(), rel=1e-6)


def test_costs_are_summed_and_memory_is_the_highest(run, tmp_path):
    costs = run().costs

    layers = [f"layer_{layer}" for layer in range(N_LAYERS)]
    assert list(costs.index) == ["multi_layer", *layers, "single_layers"]
    singles, total = costs.loc[layers], costs.loc["single_layers"]
    assert total.training_seconds == sum(singles.training_seconds) > 0
    assert total.training_peak_memory_mib == max(singles.training_peak_memory_mib)
    one = costs.loc["multi_layer", "n_parameters"]
    assert one == sum(p.numel() for p in saes_in(tmp_path / "out")[0].parameters())
    assert total.n_parameters == N_LAYERS * one


def test_the_chosen_layers_are_compared_and_the_run_resumes(run, monkeypatch, tmp_path):
    trainings = count_calls(monkeypatch, MultiLayerSAETrainingRunner, "run")
    measured = count_calls(monkeypatch, run_module, "measure")
    first = run(layers=[0, 2])
    pictures = {path.name for path in (tmp_path / "out/comparison").glob("*.png")}
    assert pictures == {"comparison.png", "costs.png", "transfer_matrix.png"}
    assert (len(trainings), len(measured)) == (3, 3)

    second = run(layers=[0, 2])

    assert (len(trainings), len(measured)) == (3, 3)
    pd.testing.assert_frame_equal(second.costs, first.costs)
    assert second.transfer is not None
    assert second.transfer.hook_names == first.comparison.hook_names
    with pytest.raises(
        ValueError, match=r"(?s)multi_layer was made with other.*`layers`: \[0, 2\]"
    ):
        run(layers=[0, 1])


def test_a_layer_trained_again_is_compared_again(run, tmp_path):
    run(layers=[0, 1])
    (tmp_path / "out/layer_1").rename(tmp_path / "moved")
    before = (tmp_path / "out/comparison/costs.csv").read_text()
    run(layers=[0, 1])
    assert (tmp_path / "out/comparison/costs.csv").read_text() != before


def test_a_failed_layer_is_reported_and_the_others_are_trained(
    run, monkeypatch, tmp_path
):
    original = MultiLayerTrainer.step

    def fail(self, batch):
        if self.cfg.hook_names == ["blocks.1.hook_resid_post"]:
            raise FloatingPointError("The loss is nan.")
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(MultiLayerTrainer, "step", fail)
        with pytest.raises(PointsFailedError, match="layer_1: FloatingPointError: The"):
            run()
    assert (tmp_path / "out/layer_2/sae").is_dir()
    assert run().costs.training_seconds.notna().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [1]}, "two or more layers to compare"),
        ({"layers": [0, 3]}, r"in \[0, 3\)"),
        ({"kk": 1}, "no setting 'kk'"),
    ],
)
def test_wrong_settings_are_errors(run, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(**changes)
    assert not (tmp_path / "out").exists()


def test_the_command_and_the_folders_that_analyze_takes(
    deep, token_dataset, held_out, tmp_path, monkeypatch, offline, capsys
):
    # `offline` has replaced the models by one of two layers.
    monkeypatch.setattr(loading, "load_by_name", lambda *_: deep)
    monkeypatch.setattr(loading, "shape_by_name", lambda *_: as_model(deep).shape)
    token_dataset.to_parquet(tmp_path / "train.parquet")
    held_out.to_parquet(tmp_path / "test.parquet")
    content = {
        "base": {**BASE, **SIZES, "dataset_path": "train.parquet"},
        "evaluation": {"dataset_path": "test.parquet", "n_tokens": 8 * N_CTX},
    }
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(content))

    cli.main(["compare", "compare.yaml", "--output", "out"])

    printed = capsys.readouterr().out
    assert "single_layers" in printed
    assert "Written: out/comparison" in printed
    layers = [f"out/layer_{layer}/sae" for layer in range(N_LAYERS)]
    cli.main(
        [
            *("analyze", "out/multi_layer/sae", "--dataset_path", "test.parquet"),
            *("--n_tokens", str(8 * N_CTX), "--analyses", "transfer_matrix"),
            *("--single_layers", *layers),
        ]
    )
    again = TransferMatrix.load("analyses/transfer_matrix").to_dataframe()
    found = SingleLayerRuns.load(tmp_path / "out/comparison").transfer
    assert found is not None
    pd.testing.assert_frame_equal(again, found.to_dataframe())


def test_with_a_lens_there_is_no_transfer_matrix(run, tmp_path, deep):
    tokens = torch.randint(1, D_VOCAB, (4, N_CTX))
    fit_tuned_lens(deep, tokens, n_steps=1, output_path=tmp_path / "lens")
    found = run(lens=str(tmp_path / "lens"))
    assert found.transfer is None
    assert SingleLayerRuns.load(tmp_path / "out/comparison").transfer is None
