"""The tutorials run; their pages show the code of the scripts.

They run with few tokens and, instead of SmolLM2, a random model with as many layers and
its tokenizer.
"""

import re
import runpy
import warnings
from pathlib import Path

import pytest
from conftest import tiny_model
from transformer_lens import HookedTransformer
from transformers import AutoTokenizer

from examples import smollm2

FOLDER = Path(__file__).parents[1] / "docs" / "tutorials"
NAMES = "train_and_look", "steer", "published", "sweep"


def test_the_tutorials_run(tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(smollm2.smollm2_folder())
    sizes = {"n_layers": 30, "d_model": 32, "n_ctx": 128, "d_vocab": len(tokenizer)}

    def load(model_class=HookedTransformer):
        return tiny_model(tokenizer, model_class, default_prepend_bos=True, **sizes)

    monkeypatch.setattr(smollm2, "load_smollm2", load)
    monkeypatch.setenv("TUTORIAL_TOKENS", "512")
    monkeypatch.setenv("TUTORIAL_FOLDER", str(tmp_path))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ran = {name: runpy.run_path(str(FOLDER / f"{name}.py")) for name in NAMES}

    assert (ran["train_and_look"]["metrics"].fvu > 0).all()
    steered = ran["steer"]
    assert all(run.kl_div()[0, -1] > 0 for run in steered["runs"].values())
    assert list(ran["sweep"]["table"].status) == ["done"] * 4
    assert ran["published"]["dists"].probs.shape == (5, 512)


@pytest.mark.parametrize("name", NAMES)
def test_the_page_of_a_tutorial_has_its_cells(name):
    page = (FOLDER / f"{name}.md").read_text()
    script = (FOLDER / f"{name}.py").read_text().replace("# %matplotlib", "%matplotlib")
    for cell in re.split(r"^# %%", script, flags=re.MULTILINE)[1:]:
        kind, text = cell.split("\n", 1)
        if "markdown" in kind:
            text = re.sub(r"^# ?", "", text, flags=re.MULTILINE)
        assert text.strip() in page
