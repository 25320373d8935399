"""The command line."""

import dataclasses
import json
import logging
import re
import runpy
import signal
import subprocess
import sys
from typing import Any

import pytest
import sae_lens.evals
from conftest import tiny_model
from published_files import plain_files
from sae_lens.training._interruption import InterruptedException

from examples.local_hub import put
from sae_lens_multilayer import MultiLayerConfig, __version__, cli
from sae_lens_multilayer.analysis import ANALYSES
from sae_lens_multilayer.cli import releases, train
from sae_lens_multilayer.ranks import AgreedError, RankError


def test_without_a_command_the_help_lists_them(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])

    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"\n  {name} " in text


@pytest.mark.parametrize("arguments", [[], ["evil"], ["--evals"]])
def test_an_unknown_command_is_an_error(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)

    assert stop.value.code == 2
    assert "usage: sae-lens-multilayer" in capsys.readouterr().err


def test_releases_prints_the_table(capsys):
    cli.main(["releases", "410m.*-x64-k32$"])

    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["release", "sae_id", "repository"]
    assert "tim-lawson/mlsae-pythia-410m-deduped-x64-k32 " in row


def test_releases_prints_csv(capsys):
    cli.main(["releases", "--csv", "gpt2"])

    header, *rows = capsys.readouterr().out.split()
    assert header.startswith("release,sae_id,repository,model,")
    assert [row.split(",")[1] for row in rows] == ["x64-k32", "x64-k32-tfm"]


def test_a_pattern_that_is_no_regular_expression_is_an_error():
    with pytest.raises(SystemExit, match=r"releases: .*unterminated subpattern"):
        cli.main(["releases", "("])


def test_evals_takes_regular_expressions_alone(capsys):
    with pytest.raises(SystemExit, match=r"evals: .*unterminated subpattern"):
        cli.main(["evals", "mlsae-.*", "("])
    with pytest.raises(SystemExit):
        cli.main(["evals"])
    assert "usage: sae-lens-multilayer evals [-h]" in capsys.readouterr().err


def test_evals_refuses_saes_of_all_hooks_before_it_loads_any():
    with pytest.raises(
        SystemExit, match=r"2 of all hooks, as 'x64-k32' .*'x64-k32/\.\*'"
    ):
        cli.main(["evals", "mlsae-gpt2", ".*"])


def test_evals_measures_one_hook_of_a_published_mlsae(
    offline_hub, tokenizer, text_dataset, tmp_path, monkeypatch, capsys
):
    put(offline_hub, "tim-lawson/mlsae-pythia-70m-deduped-x64-k32", plain_files())
    model = tiny_model(tokenizer, n_layers=6, d_model=64)
    asked: list[str] = []

    def load(name, **kwargs):
        asked.append(name)
        return model

    monkeypatch.setattr(
        sae_lens.evals.HookedTransformer, "from_pretrained_no_processing", load
    )
    text_dataset.to_parquet(tmp_path / "text" / "train.parquet")
    output = tmp_path / "results"

    cli.main(
        [
            "evals",
            "mlsae-pythia-70m-deduped",
            r"x64-k32/blocks\.[24].*",
            *("--datasets", str(tmp_path / "text")),
            *("--ctx_lens", "8", "--batch_size_prompts", "2"),
            *("--n_eval_reconstruction_batches", "1"),
            *("--output_dir", str(output)),
        ]
    )

    assert asked == ["EleutherAI/pythia-70m-deduped"]
    results = json.loads((output / "all_eval_results.json").read_text())
    assert [result["sae_id"] for result in results] == [
        f"x64-k32/blocks.{layer}.hook_resid_post" for layer in (2, 4)
    ]
    for result in results:
        assert 0 < result["metrics"]["sparsity"]["l0"] <= 8
        assert result["metrics"]["model_behavior_preservation"]["kl_div_with_sae"] > 0


def test_the_package_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "releases", "gpt2-x64-k32$"])

    runpy.run_module("sae_lens_multilayer", run_name="__main__")

    assert "tim-lawson/mlsae-gpt2-x64-k32" in capsys.readouterr().out


def test_a_closed_pipe_is_no_error():
    command = [sys.executable, "-m", "sae_lens_multilayer", "releases"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert "Error" not in process.stderr.read()
    assert process.wait() == 128 + signal.SIGPIPE


def test_a_stop_by_the_user_is_one_line(monkeypatch, capsys):
    def stop(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(releases, "run", stop)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["releases"])

    assert stopped.value.code == 128 + signal.SIGINT
    assert capsys.readouterr().err == "\nsae-lens-multilayer releases: stopped.\n"
    with pytest.raises(KeyboardInterrupt):
        cli.main(["--traceback", "releases"])


@pytest.mark.parametrize(
    ("error", "message", "others_say_it"),
    [
        (InterruptedException(), "stopped after a whole step, as requested.", False),
        (AgreedError("Rank 1 has failed: no."), "Rank 1 has failed: no.", False),
        (RankError("Rank 1 has lost 0."), "Rank 1 has lost 0.", True),
    ],
)
def test_the_first_rank_prints_shared_errors(
    monkeypatch, error, message, others_say_it
):
    def fail(arguments):
        raise error

    # Restores the log level after the test.
    package = logging.getLogger("sae_lens_multilayer")
    monkeypatch.setattr(package, "setLevel", lambda level: None)
    monkeypatch.setattr(train, "run", fail)
    said: list[Any] = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as ended:
            cli.main(["train"])
        said.append(ended.value.code)

    message = f"sae-lens-multilayer train: {message}"
    assert said == [message, message if others_say_it else 1]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_describes_every_option(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])

    assert stop.value.code == 0
    text = capsys.readouterr().out
    # Help texts that simple-parsing and dataclasses generate by default.
    assert not re.search(r"^  str  |= <factory>|type: ignore", text, re.MULTILINE)
    if command != "evals":  # SAELens' own
        assert len(text.splitlines()) <= 48
        assert f"  {cli.PROG} {command}" in text  # an example


def test_the_whole_help_has_every_option(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help-all"])

    text = capsys.readouterr().out
    names = [field.name for field in dataclasses.fields(MultiLayerConfig)]
    nested = "sae", "logger", "eval"
    missing = [n for n in names if n not in nested and f"--{n} " not in text]
    assert missing == []


def test_options_may_have_dashes_for_underscores():
    given = ["--d-in", "16", "--d_sae=64", "--output-path=a-b", "--model-name", "c-d"]

    cfg = train.parse_config(given)

    assert (cfg.sae.d_in, cfg.sae.d_sae) == (16, 64)
    assert (cfg.output_path, cfg.model_name) == ("a-b", "c-d")


def test_a_wrong_option_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", "sae", "--n-latent", "3", "--wrong"])

    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "usage: sae-lens-multilayer report sae [options]" in error
    assert "--wrong" in error


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])

    assert stop.value.code == 0
    assert capsys.readouterr().out.split() == [cli.PROG, __version__]


def test_the_help_of_analyze_lists_the_analyses(capsys):
    with pytest.raises(SystemExit):
        cli.main(["analyze", "--help"])

    words = capsys.readouterr().out.replace(",", " ").split()
    assert {*ANALYSES} <= {*words}
