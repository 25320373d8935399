"""The study of the paper's tables and figures. Reference: results on disk, by hand."""

import pandas as pd
import pytest
import torch
from conftest import D_VOCAB, N_CTX
from datasets import Dataset
from test_sweeps import BASE

from sae_lens_multilayer import SweepEvaluation, fit_tuned_lens
from sae_lens_multilayer.analysis import LayerDistributions
from sae_lens_multilayer.evaluation.metrics import SpliceMetrics
from sae_lens_multilayer.studies.paper import PaperSettings, paper_study
from sae_lens_multilayer.studies.paper_claims import CLAIMS, PaperStudy

PROMPT = "a b c a"


@pytest.fixture
def study(model, token_dataset, tmp_path):
    tokens = torch.randint(1, D_VOCAB, (16, N_CTX))
    held_out = Dataset.from_dict({"input_ids": tokens.tolist()})
    lens = fit_tuned_lens(model, tokens, n_steps=2)
    lens.save(tmp_path / "lens")
    settings = PaperSettings(
        {**BASE, "sae": {"k_aux": 8}},
        expansion_factors=[2, 4],
        ks=[4, 8],
        expansion_factor=2,
        lens=str(tmp_path / "lens"),
        prompt=PROMPT,
        evaluation=SweepEvaluation(n_tokens=8 * N_CTX),
    )

    def run():
        return paper_study(
            settings,
            tmp_path / "out",
            override_model=model,
            override_dataset=token_dataset,
            override_evaluation_dataset=held_out,
        )

    return run


def test_runs_over_both_sizes_with_lens_and_single_layers(study, model, tmp_path):
    found = study()
    assert [*found.table.index] == ["R2_k4", "R4_k4", "R2_k8", "lens"]
    folder = tmp_path / "out"
    metrics = SpliceMetrics.load(folder / "sweep/R4_k4/analysis/evaluation")
    assert found.table.fvu["R4_k4"] == pytest.approx(metrics.fvu.mean().item())
    # At the prompt, each of its tokens is counted at each layer.
    n_tokens = len(model.tokenizer(PROMPT)["input_ids"])
    assert found.prompt.n_tokens == n_tokens
    assert found.prompt.counts.sum() <= n_tokens * len(found.prompt.hook_names) * 4
    page = (folder / "paper.md").read_text()
    for name in found.pictures():
        assert (folder / "figures" / f"{name}.png").exists()
        assert f"figures/{name}.png" in page
    assert (
        folder / "single_layers/seed42_single_layers_operations/layer_1/sae"
    ).is_dir()
    claims = pd.read_csv(folder / "claims.csv")
    assert len(claims) == len(CLAIMS)
    assert all(claim in page for claim in claims.claim)
    # A second call trains nothing.
    before = (folder / "sweep/lens/analysis/record.json").stat().st_mtime_ns
    study()
    assert (folder / "sweep/lens/analysis/record.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("fvu", "holds"), [([0.3, 0.2, 0.1], True), ([0.3, 0.1, 0.2], False), ([0.3], None)]
)
def test_a_claim_along_r_reads_the_runs_at_the_default_k(fvu, holds):
    n = len(fvu)
    rows = {
        "expansion_factor": [*[2, 4, 8][:n], 2, 2],
        "k": [4] * n + [8, 4],
        "fvu_scalar": [*fvu, 0.9, 0.9],
    }
    names = [*map(str, range(n)), "other k", "lens"]
    table = pd.DataFrame(rows, index=names).sample(frac=1, random_state=0)
    # The default point is first, as in the sweep.
    table = pd.concat([table.loc[["0"]], table.drop(index="0")])
    no_tokens = LayerDistributions([], 0, torch.zeros(0, 1).long(), torch.zeros(0, 1))
    study = PaperStudy(table, {}, {}, no_tokens, None)
    claim = next(c for c in CLAIMS if c.claim == "FVU falls as R grows")
    assert claim.measure(study)[0] is holds


@pytest.mark.parametrize("change", [{"ks": []}, {"base": {"k": 4}}, {"tokens": 3}])
def test_wrong_settings_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        PaperSettings.from_settings({"base": {}, **change})
