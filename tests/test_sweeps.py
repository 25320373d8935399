"""Sweeps. Reference: each point trained, evaluated and analysed by itself."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from conftest import D_MODEL, D_VOCAB, N_CTX, PAPER_DATA, count_calls, tiny_model
from datasets import Dataset
from sae_lens import SAE
from sae_lens.training._interruption import InterruptedException
from safetensors.torch import load_file

from sae_lens_multilayer import (
    MultiLayerConfig,
    MultiLayerSAETrainingRunner,
    SweepEvaluation,
    cli,
    evaluate,
    grid,
    sweep,
)
from sae_lens_multilayer.analysis import Variances, active_layers, decoder_similarity
from sae_lens_multilayer.analysis import variances as variances_of
from sae_lens_multilayer.evaluation.metrics import SpliceMetrics
from sae_lens_multilayer.files import locked
from sae_lens_multilayer.models import loading
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.sweeps import sweep as run_module
from sae_lens_multilayer.sweeps.cost import read_cost
from sae_lens_multilayer.sweeps.points import combine, make_points
from sae_lens_multilayer.training.trainer import MultiLayerTrainer

BASE: dict[str, Any] = {
    "sae": {"k_aux": 8},
    "model_name": "tiny",
    "context_size": N_CTX,
    "training_tokens": 256,
    "train_batch_size_tokens": 64,
    "store_batch_size_prompts": 4,
    "n_batches_in_buffer": 4,
    "logger": {"log_to_wandb": False},
    "prepend_bos": False,
    "verbose": False,
}
POINTS = grid(expansion_factor=[2, 4], k=[2, 4])
NAMES = ["R2_k2", "R2_k4", "R4_k2", "R4_k4"]
EVALUATION = SweepEvaluation(n_tokens=8 * N_CTX, exclude_positions=(0,))


@pytest.fixture
def held_out():
    tokens = torch.randint(1, D_VOCAB, (16, N_CTX))
    return Dataset.from_dict({"input_ids": tokens.tolist()})


@pytest.fixture
def run(model, token_dataset, held_out, tmp_path):
    """Run a sweep of the tiny model; a test passes the settings that it changes."""

    def run_sweep(points=POINTS, base=None, evaluation=EVALUATION, **changes):
        settings = {
            "override_model": model,
            "override_dataset": token_dataset,
            "override_evaluation_dataset": held_out,
            **changes,
        }
        return sweep(
            {**BASE, **(base or {})},
            points,
            tmp_path / "sweep",
            evaluation=evaluation,
            **settings,
        )

    return run_sweep


@pytest.fixture
def trainings(monkeypatch):
    return count_calls(monkeypatch, MultiLayerSAETrainingRunner, "run")


def listing(folder: Path) -> dict[str, int]:
    return {
        str(file.relative_to(folder)): file.stat().st_mtime_ns
        for file in folder.rglob("*")
        if file.is_file() and file.name not in ("table.csv", "sweep.png", ".lock")
    }


class TestPoints:
    def test_grid_is_every_combination(self):
        assert grid(k=[1, 2], layers=[None, [0]]) == [
            {"k": 1, "layers": None},
            {"k": 1, "layers": [0]},
            {"k": 2, "layers": None},
            {"k": 2, "layers": [0]},
        ]

    @pytest.mark.parametrize("values", [3, [], "ab"])
    def test_grid_needs_lists(self, values):
        with pytest.raises(ValueError, match="`k` must be a list of values"):
            grid(k=values)

    @pytest.mark.parametrize(
        ("point", "name"),
        [
            ({"expansion_factor": 8, "k": 4}, "R8_k4"),
            ({"k": 4, "layers": [0, 1]}, "k4_layers-0-1"),
            ({"layers": None}, "layers-all"),
            ({"lr": 1e-3}, "lr-0.001"),
            ({"sae": {"k": 4}}, "k4"),
            ({"model_name": "a/b"}, "model_name-a%2Fb"),
            ({"model_name": "a/b", "name": "small"}, "small"),
            ({}, "base"),
        ],
    )
    def test_a_folder_is_named_by_the_settings(self, point, name):
        (made,) = make_points({**BASE, "sae": {"d_in": 16, "d_sae": 64}}, [point])
        assert made.name == name

    def test_the_width_of_a_model_in_a_folder_is_read(self, tmp_path):
        config = json.loads((PAPER_DATA / "model" / "config.json").read_text())
        # Not needed by transformers; TransformerLens reads a folder only with it.
        config.pop("architectures", None)
        (tmp_path / "config.json").write_text(json.dumps(config))
        base = {**BASE, "model_name": str(tmp_path), "expansion_factor": 2, "k": 4}
        (made,) = make_points(base, [{"layers": [0]}])
        assert (made.cfg.sae.d_in, made.cfg.sae.d_sae) == (64, 128)

    def test_names_that_are_too_long_differ_in_the_end(self):
        points = [{"model_name": "a" * 200 + end} for end in "bc"]
        first, second = make_points({**BASE, "sae": {"d_in": 16, "d_sae": 64}}, points)
        assert len(first.name) == len(second.name) == 100
        assert first.name != second.name

    def test_named_points_take_part_in_a_grid(self):
        alone = [{"name": "small", "k": 1}]
        assert combine(alone, grid()) == alone
        points = combine([{"name": "small", "model_name": "a/b"}], grid(k=[1, 2]))
        assert [point["name"] for point in points] == ["small_k1", "small_k2"]

    def test_settings_of_a_point_win(self):
        base = {**BASE, "lr": 1.0, "sae": {"d_in": 16, "d_sae": 64, "k_aux": 8, "k": 1}}
        (point,) = make_points(
            base, [{"expansion_factor": 2, "k": 3, "lr": 2.0, "layers": [1]}]
        )
        cfg = point.cfg
        assert (cfg.sae.d_sae, cfg.sae.k, cfg.sae.k_aux) == (32, 3, 8)
        assert (cfg.lr, cfg.layers, cfg.logger.run_name) == (2.0, [1], point.name)

    @pytest.mark.parametrize(
        ("points", "message"),
        [
            ([], "needs one or more points"),
            ([{"k": 2}, {"k": 2}], r"differ; got \['k2', 'k2'\]"),
            ([{"kk": 2}], "no setting 'kk'"),
            ([{"layer": [0]}], r"no setting 'layer'. Known: \['layers'"),
            ([{"k": 65}], "`k` must be .*at most d_sae = 64; got 65"),
            ([{"expansion_factor": 0.3}], r"must be a whole number; got 0\.3"),
            ([{"expansion_factor": "2"}], "must be a whole number; got '2'"),
            ([{"expansion_factor": 2, "d_sae": 3}], "not both"),
            ([{"name": "../up"}], r"`name` must be letters.*got '\.\./up'"),
            ([{"layers": [0, 0]}], "each once"),
            ([{"architecture": "foo"}], "`architecture` must be one of"),
        ],
    )
    def test_wrong_points_are_errors(self, points, message):
        base = {**BASE, "sae": {"d_in": 16, "d_sae": 64}}
        with pytest.raises(ValueError, match=message):
            make_points(base, points)

    def test_points_and_grid_must_not_vary_the_same(self):
        with pytest.raises(ValueError, match=r"must not both vary \['k'\]"):
            combine([{"k": 1}], grid(k=[1, 2]))


class TestSweep:
    def test_each_point_is_what_it_is_by_itself(
        self, run, model, token_dataset, held_out, tmp_path
    ):
        table = run()

        assert list(table.index) == NAMES
        assert (table.status == "done").all()
        tokens = torch.tensor(held_out["input_ids"][:8])
        for name, point in zip(NAMES, POINTS, strict=True):
            folder, row = tmp_path / "sweep" / name, table.loc[name]
            alone = train_alone(model, token_dataset, point)
            sae = SAE.load_from_disk(folder / "sae")
            for key, tensor in alone.state_dict().items():
                torch.testing.assert_close(sae.state_dict()[key], tensor)
            assert row.expansion_factor == point["expansion_factor"]
            assert row.d_sae == D_MODEL * point["expansion_factor"]
            metrics = evaluate(sae, model, tokens, exclude_positions=[0])
            for column, value in metrics.mean().items():
                assert row[column] == pytest.approx(value, rel=1e-6), column
            saved = SpliceMetrics.load(folder / "analysis/evaluation").to_dataframe()
            pd.testing.assert_frame_equal(saved, metrics.to_dataframe(), rtol=1e-6)
            spread = variances_of(sae, model, tokens, exclude_positions=[0])
            assert row.token_ratio == pytest.approx(spread.summary.token_ratio)
            assert row.latent_ratio == pytest.approx(spread.summary.latent_ratio)
            active = active_layers(sae, model, tokens, exclude_positions=[0])
            mean = active.mean_per_token.nanmean().item()
            assert row.active_layers_per_token == pytest.approx(mean)
            mmcs = decoder_similarity(sae.W_dec.detach()).mean
            assert row.mean_max_cos_sim == pytest.approx(mmcs)
            assert Variances.load(folder / "analysis/variances")
            assert row.training_seconds > 0
            assert row.n_tokens == 8 * (N_CTX - 1)
        written = pd.read_csv(tmp_path / "sweep/table.csv", index_col="point")
        pd.testing.assert_frame_equal(
            written.drop(columns="error"), table.drop(columns="error"), rtol=1e-12
        )
        assert (tmp_path / "sweep/sweep.png").stat().st_size > 10_000

    def test_finished_points_are_not_run_again(
        self, run, trainings, tmp_path, monkeypatch
    ):
        first = run(POINTS[:2])
        before = listing(tmp_path / "sweep")
        measured = count_calls(monkeypatch, run_module, "measure")
        again = run(POINTS[:2])
        assert listing(tmp_path / "sweep") == before
        assert (len(trainings), measured) == (2, [])
        pd.testing.assert_frame_equal(again, first)

    def test_a_point_is_added(self, run, trainings):
        run(POINTS[:1])
        assert (run(POINTS[:2]).status == "done").all()
        assert len(trainings) == 2

    def test_an_interrupted_training_resumes_from_its_checkpoint(
        self, run, tmp_path, monkeypatch, trainings
    ):
        steps = count_calls(monkeypatch, MultiLayerTrainer, "step")
        with monkeypatch.context() as patch:
            interrupt_after(patch, 6)  # of 4 steps each: in the second point
            with pytest.raises(InterruptedException):
                run(POINTS[:3])
        assert (len(trainings), len(steps)) == (2, 6)
        written = pd.read_csv(tmp_path / "sweep/table.csv", index_col="point")
        assert list(written.status) == ["done", "waiting", "waiting"]
        first = read_cost(tmp_path / "sweep/R2_k4/cost.json")

        table = run(POINTS[:3])

        assert (table.status == "done").all()
        assert (len(trainings), len(steps)) == (4, 12)
        total = read_cost(tmp_path / "sweep/R2_k4/cost.json")
        assert table.loc["R2_k4", "training_seconds"] == total.seconds > first.seconds
        assert total.peak_memory_mib >= first.peak_memory_mib
        interrupted = load_file(tmp_path / "sweep/R2_k4/sae/sae_weights.safetensors")
        (tmp_path / "sweep").rename(tmp_path / "before")
        run([POINTS[1]])
        whole = load_file(tmp_path / "sweep/R2_k4/sae/sae_weights.safetensors")
        assert all(torch.equal(whole[name], interrupted[name]) for name in whole)

    def test_only_an_interrupted_analysis_is_repeated(
        self, run, monkeypatch, trainings, tmp_path
    ):
        with monkeypatch.context() as patch:
            patch.setattr(run_module, "measure", raising(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                run(POINTS[:1])
        assert not (tmp_path / "sweep/R2_k2/analysis").exists()
        assert (run(POINTS[:1]).status == "done").all()
        assert len(trainings) == 1

    def test_a_failed_point_is_recorded_and_the_others_continue(
        self, run, monkeypatch, tmp_path, trainings, caplog
    ):
        original = MultiLayerTrainer.step

        def fail(self, batch):
            if self.sae.cfg.k == 4 and self.sae.cfg.d_sae == 32:
                raise FloatingPointError("The loss is nan.")
            return original(self, batch)

        with monkeypatch.context() as patch:
            patch.setattr(MultiLayerTrainer, "step", fail)
            table = run(POINTS[:3])
        assert list(table.status) == ["done", "failed", "done"]
        assert table.loc["R2_k4", "error"] == "FloatingPointError: The loss is nan."
        assert "R2_k4 has failed: FloatingPointError" in caplog.text
        assert "in fail" in (tmp_path / "sweep/R2_k4/error.txt").read_text()
        assert table.fvu.isna().tolist() == [False, True, False]

        table = run(POINTS[:3])

        assert (table.status == "done").all()
        assert table.error.isna().all()
        assert len(trainings) == 4

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"base": {"lr": 0.1}},
                r"(?s)R2_k2 was made with other.*`lr`: .*, 0\.1 here.*`lr_end`",
            ),
            (
                {"base": {"sae": {"k_aux": 4}}},
                r"(?s)other settings.*`sae\.k_aux`: 8 in .*, 4 here",
            ),
            (
                {"evaluation": SweepEvaluation(n_tokens=N_CTX)},
                "(?s)made with other settings.*`n_tokens`.*`exclude_positions`",
            ),
        ],
    )
    def test_changed_settings_are_refused(self, run, trainings, changes, message):
        run(POINTS[:1])
        with pytest.raises(ValueError, match=message):
            run(**changes)
        assert len(trainings) == 1

    def test_another_text_to_measure_on_is_refused(self, run, token_dataset, trainings):
        run(POINTS[:1])
        table = run(POINTS[:2], override_evaluation_dataset=token_dataset)
        assert list(table.status) == ["done", "failed"]
        assert "R2_k2/analysis was made with other" in table.error.iloc[1]
        assert len(trainings) == 1
        assert (run(POINTS[:2]).status == "done").all()

    def test_a_position_that_no_prompt_has_is_found_before_training(
        self, run, trainings
    ):
        evaluation = SweepEvaluation(n_tokens=N_CTX, exclude_positions=(N_CTX,))
        table = run(POINTS[:1], evaluation=evaluation)
        assert "`exclude_positions` must be in [-16, 16)" in table.error.iloc[0]
        assert trainings == []
        with pytest.raises(ValueError, match="must be a list of whole numbers"):
            SweepEvaluation(exclude_positions=(True,))

    def test_two_processes_do_not_work_on_the_same(self, run, tmp_path, trainings):
        at_work = pytest.raises(BlockingIOError, match="Another process is at work")
        with locked(tmp_path / "sweep"), at_work:
            run(POINTS[:1])
        assert trainings == []

    def test_files_of_a_process_killed_at_the_start_do_not_prevent_a_restart(
        self, run, tmp_path
    ):
        (tmp_path / "sweep/R2_k2").mkdir(parents=True)
        (tmp_path / "sweep/R2_k2/.partial-1234").write_text("{")
        assert (run(POINTS[:1]).status == "done").all()

    def test_a_folder_of_something_else_is_refused(self, run, tmp_path):
        (tmp_path / "sweep/R2_k2").mkdir(parents=True)
        (tmp_path / "sweep/R2_k2/mine").write_text("")
        with pytest.raises(ValueError, match="R2_k2 must be the folder of a point"):
            run()

    @pytest.mark.parametrize("name", ["table.csv", "sweep.png", "comparison"])
    def test_files_of_the_user_are_not_overwritten(
        self, run, tmp_path, name, trainings
    ):
        (tmp_path / "sweep").mkdir()
        (tmp_path / "sweep" / name).write_text("mine")
        with pytest.raises(FileExistsError, match=name):
            run(POINTS[:1])
        assert (tmp_path / "sweep" / name).read_text() == "mine"
        assert trainings == []

    def test_a_picture_of_the_user_is_not_replaced_by_the_first_of_the_sweep(
        self, run, tmp_path, monkeypatch
    ):
        picture = tmp_path / "sweep/sweep.png"
        measure = run_module.measure

        def measure_later(*args):
            picture.write_text("mine")
            return measure(*args)

        monkeypatch.setattr(run_module, "measure", measure_later)
        run(POINTS[:1])
        assert picture.read_text() == "mine"
        assert len(list(picture.parent.glob("sweep-*.png"))) == 1

    def test_text_settings_that_vary_do_not_change_the_measured_tokens(
        self, run, tmp_path
    ):
        run(grid(context_size=[8, N_CTX]), {"sae": {"d_sae": 64, "k_aux": 8}})
        prints = {
            json.loads(path.read_text())["fingerprints"]["tokens"]
            for path in (tmp_path / "sweep").glob("*/analysis/record.json")
        }
        assert len(prints) == 1

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"override_evaluation_dataset": None}, "give `dataset_path` of"),
            ({"evaluation": SweepEvaluation("x.jsonl")}, "and not both"),
            ({"override_dataset": None}, "Give `dataset_path`"),
            ({"points": [{"layers": [2]}]}, r"in \[0, 2\) for 'tiny'; got \[2\]"),
            ({"points": [{"d_in": 8, "d_sae": 8, "k": 1}]}, "`d_in` must be 16"),
            ({"points": [{"context_size": 99}]}, "must be at most 16 tokens"),
            ({"points": grid(model_name=["a", "b"])}, "must not vary"),
        ],
    )
    def test_wrong_settings_fail_before_anything_runs(
        self, run, changes, message, trainings
    ):
        points = [{"k": 2}, *changes.pop("points", [])]
        with pytest.raises(ValueError, match=message):
            run(points, {"sae": {"d_sae": 64, "k_aux": 8}}, **changes)
        assert trainings == []

    def test_other_architectures(self, run):
        table = run(grid(architecture=["standard", "gated"]), {"sae": {"d_sae": 32}})
        assert (table.status == "done").all(), table.error.tolist()
        assert table.k.isna().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"analyses": ["transfer_matrix"]}, "`analyses` must be among"),
        ({"analyses": ["single_layer_comparison"]}, "`analyses` must be among"),
        ({"tokens": 1}, "no setting 'tokens'"),
    ],
)
def test_wrong_evaluations_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        SweepEvaluation.from_settings(settings)


class TestModels:
    @pytest.fixture
    def loads(self, tokenizer, token_dataset, held_out, tmp_path, monkeypatch):
        """Two models by name, of different width, and text in files."""
        models = {
            "narrow": tiny_model(tokenizer),
            "wide": tiny_model(tokenizer, d_model=32, n_layers=3),
        }
        loaded: list[str] = []

        def load(class_name, name, *_) -> Any:
            loaded.append(name)
            return models[name]

        def shape(model_class_name, model_name, kwargs=None):
            return as_model(models[model_name]).shape

        monkeypatch.setattr(loading, "load_by_name", load)
        monkeypatch.setattr(loading, "shape_by_name", shape)
        token_dataset.to_parquet(tmp_path / "train.parquet")
        held_out.to_parquet(tmp_path / "test.parquet")
        monkeypatch.chdir(tmp_path)
        return loaded

    @pytest.fixture
    def file(self, loads, tmp_path):
        def write(**sections) -> str:
            content = {
                "base": {**BASE, "dataset_path": "train.parquet"},
                "evaluation": {"dataset_path": "test.parquet", "n_tokens": 4 * N_CTX},
                **sections,
            }
            (tmp_path / "sweep.yaml").write_text(
                yaml.safe_dump(content, sort_keys=False)
            )
            return "sweep.yaml"

        return write

    def test_a_file_sweeps_over_models_of_several_widths(self, file, loads, capsys):
        grid_ = {
            "k": [2, 4],
            "model_name": ["narrow", "wide"],
            "expansion_factor": [2],
        }
        cli.main(["sweep", file(grid=grid_), "--output", "out"])

        # Each is loaded once, though the models alternate in the grid.
        assert loads == ["narrow", "wide"]
        table = pd.read_csv("out/table.csv", index_col="point")
        assert len(table) == 4
        assert (table.status == "done").all()
        assert set(table.d_sae) == {32, 64}
        wide = SAE.load_from_disk("out/k2_model_name-wide_R2/sae")
        assert len(wide.cfg.metadata.hook_names) == 3
        assert "out/table.csv" in capsys.readouterr().out
        cli.main(["sweep", file(grid=grid_), "--output", "out"])
        assert len(loads) == 2

    def test_a_failed_point_ends_the_command_with_an_error(self, file, monkeypatch):
        points = [{"k": 2, "d_sae": 32}, {"k": 4, "d_sae": 32}]
        original = MultiLayerTrainer.step

        def fail(self, batch):
            if self.sae.cfg.k == 2:
                raise FloatingPointError("nan")
            return original(self, batch)

        monkeypatch.setattr(MultiLayerTrainer, "step", fail)
        base = {**BASE, "dataset_path": "train.parquet", "model_name": "narrow"}
        with pytest.raises(SystemExit, match=r"failed:\n  k2_d_sae-32: FloatingP") as e:
            cli.main(["sweep", file(points=points, base=base), "--output", "out"])
        assert e.value.code != 0
        assert Path("out/k4_d_sae-32/analysis").is_dir()

    @pytest.mark.parametrize(
        ("sections", "message"),
        [
            ({"grids": {}}, "no setting 'grids'"),
            ({"points": {"k": 1}}, "`points` must be a list of settings"),
            ({"grid": {"k": 1}}, "`k` must be a list of values"),
            ({"grid": {"layers": [[7]]}}, r"in \[0, 2\)"),
            ({"evaluation": {"dataset_path": "./no.parquet"}}, "does not exist"),
            ({"evaluation": {"n_token": 3}}, "no setting 'n_token'"),
        ],
    )
    def test_wrong_files_are_one_line(self, file, loads, sections, message):
        base = {
            **BASE,
            "dataset_path": "train.parquet",
            "model_name": "narrow",
            "sae": {"d_sae": 32, "k": 2},
        }
        with pytest.raises(
            SystemExit, match=f"^sae-lens-multilayer sweep: .*{message}"
        ):
            cli.main(["sweep", file(**{"base": base, **sections}), "--output", "out"])
        assert loads == []
        assert not Path("out").exists()


def interrupt_after(patch: pytest.MonkeyPatch, n_steps: int) -> None:
    """Ask the trainer to stop, as a signal does, in the step of this number."""
    original, n_done = MultiLayerTrainer.step, [0]

    def step(self, batch):
        n_done[0] += 1
        self.stop_requested = n_done[0] == n_steps
        return original(self, batch)

    patch.setattr(MultiLayerTrainer, "step", step)


def raising(error: BaseException) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise error

    return call


def train_alone(model: Any, dataset: Dataset, point: dict[str, Any]) -> SAE[Any]:
    """As `MultiLayerSAETrainingRunner` trains it, with the settings spelt out."""
    d_sae = D_MODEL * point["expansion_factor"]
    sae = {"d_in": D_MODEL, "d_sae": d_sae, "k": point["k"], "k_aux": 8}
    settings = {
        **BASE,
        "sae": {"architecture": "multilayer", **sae},
        "checkpoint_path": None,
        "output_path": None,
    }
    cfg = MultiLayerConfig.from_dict(settings)
    runner = MultiLayerSAETrainingRunner(
        cfg, override_dataset=dataset, override_model=model
    )
    return runner.run()
