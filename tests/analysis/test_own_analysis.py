"""An analysis in a file outside of the package, with one row in the table."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import D_VOCAB, N_CTX, count_calls
from saes import HOOK_NAMES, random_sae

from examples.own_analysis import SHARED_LATENTS, SharedLatentCounts, SharedLatents
from sae_lens_multilayer import Prompts, SweepEvaluation, cli, evaluate
from sae_lens_multilayer.analysis import (
    ANALYSES,
    Suite,
    analyze,
    load_results,
    save_results,
)
from sae_lens_multilayer.pictures import draw, draw_interactive
from sae_lens_multilayer.pictures.page import ReportContent, report_html
from sae_lens_multilayer.sweeps.evaluation import measure, numbers_of


@pytest.fixture(autouse=True)
def row(monkeypatch):
    monkeypatch.setitem(ANALYSES, "shared_latents", SHARED_LATENTS)


@pytest.fixture
def tokens():
    return torch.randint(1, D_VOCAB, (5, N_CTX))


def test_it_counts_latents_that_are_active_at_both_layers(model, tokens):
    sae = random_sae()
    (found,) = analyze(sae, model, tokens, SharedLatentCounts())
    _, cache = model.run_with_cache(tokens)
    x = torch.stack([cache[name] for name in HOOK_NAMES], dim=2)
    active = sae.encode(x.flatten(0, 1)) > 0
    assert found.n_shared[0, 1] == (active[:, 0] & active[:, 1]).sum()
    either = (active[:, 0] | active[:, 1]).sum()
    assert found.jaccard[1, 0] == pytest.approx((found.n_shared[0, 1] / either).item())
    assert found.jaccard.diagonal().tolist() == [1, 1]


def test_it_runs_in_the_shared_pass_and_is_saved(model, tokens, tmp_path, monkeypatch):
    suite = Suite(random_sae(), model, tokens)
    assert "shared_latents" in suite.available()
    calls = count_calls(monkeypatch, model, "run_with_cache")
    results = suite.run(["shared_latents", "variances"])
    assert len(calls) == 1
    save_results(results, tmp_path)
    loaded = load_results(tmp_path)["shared_latents"]
    assert isinstance(loaded, SharedLatents)
    expected = results["shared_latents"].to_dataframe()
    pd.testing.assert_frame_equal(loaded.to_dataframe(), expected)


def test_the_command_line_offers_runs_and_draws_it(offline, capsys):
    with pytest.raises(SystemExit):
        cli.main(["analyze", "--help"])
    assert "  shared_latents\n" in capsys.readouterr().out
    cli.main(["analyze", "sae", *offline, "--analyses", "shared_latents"])
    assert Path("analyses/shared_latents.png").read_bytes().startswith(b"\x89PNG")
    assert SharedLatents.load("analyses/shared_latents").n_shared.shape == (2, 2)


def test_both_renderers_and_the_report_show_it(model, tokens):
    (found,) = analyze(random_sae(), model, tokens, SharedLatentCounts())
    title = found.pictures()[""].title
    assert draw(found).get_suptitle() == title
    heatmap: Any = draw_interactive(found)[0].data[0]
    assert heatmap.z == pytest.approx(found.jaccard.numpy())
    table = evaluate(random_sae(), model, tokens).to_dataframe()
    page = report_html(ReportContent("", {}, [], table, {"shared": found}, str))
    assert 'data-figure="shared"' in page
    assert f"<h3>{title}</h3>" in page


def test_a_sweep_reports_its_numbers(model, tokens):
    evaluation = SweepEvaluation(analyses=("shared_latents",))
    prompts = Prompts(tokens, torch.ones_like(tokens, dtype=torch.bool))
    results = measure(random_sae(), model, prompts, evaluation)
    found = numbers_of(results)["next_layer_jaccard"]
    assert found == results["shared_latents"].to_dataframe().loc[0, 1]
