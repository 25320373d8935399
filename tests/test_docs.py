"""Every code block of the README and of the site runs, and the site is complete.

Blocks of a page run in order in one folder, with smaller sizes, a tiny model under the
name "pythia-70m-deduped", and no network. A block after `<!-- not run: reason -->` is
left out.
"""

import importlib
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import N_CTX, tiny_model
from markdown_it import MarkdownIt
from published_files import plain_files
from sae_lens import HookedSAETransformer
from sae_lens.saes.sae import SAEMetadata
from saes import random_sae

import sae_lens_multilayer
from examples.local_hub import put
from sae_lens_multilayer import analysis, cli, pictures
from sae_lens_multilayer.models import loading
from sae_lens_multilayer.models.kinds import as_model

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
MODEL = "pythia-70m-deduped"
N_LAYERS, D_MODEL = 6, 64

SMALLER = {
    '"monology/pile-uncopyrighted"': '"train.jsonl"',
    "1_000_000_000": "128",
    "100_000_000": "128",
    "131_072": "64",
    "65_536": "64",
    "32_768": "128",
    "64 * 512": "128",
    "2048": str(N_CTX),
    "512": str(D_MODEL),
    "[8, 16]": "[2]",
    "[16, 32]": "[16]",
    "expansion_factor: 8": "expansion_factor: 2",
    '"expansion_factor": 8': '"expansion_factor": 2',
    "n_steps=250": "n_steps=2",
}
"""Sizes on the pages, and what the test runs with."""
OPTIONS = {
    **dict.fromkeys(("evaluate", "analyze"), ("--n_tokens", "64")),
    "report": ("--n_tokens", "64", "--n_latents", "4"),
    "lens": ("--n_tokens", "256", "--n_steps", "2"),
}
"""Options that the test adds to commands, for small sizes."""


class Block(NamedTuple):
    """A fenced block of a page."""

    info: str
    text: str
    not_run: bool

    @property
    def language(self) -> str:
        return self.info.split()[0] if self.info else ""


def blocks_of(page: Path) -> list[Block]:
    tokens = MarkdownIt().parse(page.read_text())
    before = ["", *(t.content if t.type == "html_block" else "" for t in tokens)]
    return [
        Block(token.info, token.content, "<!-- not run: " in above)
        for above, token in zip(before, tokens, strict=False)
        if token.type == "fence"
    ]


def pages_that_run() -> list[Path]:
    languages = "python", "console", "yaml"
    return [
        page
        for page in PAGES
        if page.parent.name != "tutorials"  # tests/test_tutorials.py
        and any(b.language in languages and not b.not_run for b in blocks_of(page))
    ]


@pytest.fixture
def workplace(tokenizer, text_dataset, offline_hub, tmp_path, monkeypatch):
    """The model, the texts, the SAE and the published files that the pages name."""

    def load(*_, **__):
        return tiny_model(
            tokenizer, HookedSAETransformer, n_layers=N_LAYERS, d_model=D_MODEL
        )

    monkeypatch.setattr(loading, "load_by_name", load)
    monkeypatch.setattr(loading, "shape_by_name", lambda *_: as_model(load()).shape)
    monkeypatch.setattr(HookedSAETransformer, "from_pretrained_no_processing", load)
    put(offline_hub, f"tim-lawson/mlsae-{MODEL}-x64-k32", plain_files())
    for name in ("train", "held-out"):
        text_dataset.to_json(tmp_path / f"{name}.jsonl")
    monkeypatch.chdir(tmp_path)
    rows = dict(analysis.ANALYSES)
    yield
    analysis.ANALYSES.clear()
    analysis.ANALYSES.update(rows)


def save_sae() -> None:
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS)]
    metadata = SAEMetadata(
        hook_names=names, model_name=MODEL, context_size=N_CTX, prepend_bos=False
    )
    random_sae(d_in=D_MODEL, d_sae=128, k=8, metadata=metadata).save_model("output")


def with_smaller_sizes(text: str) -> str:
    for size, smaller in SMALLER.items():
        text = re.sub(rf"(?<![\w.]){re.escape(size)}(?![\w.])", smaller, text)
    return text


def run_commands(text: str) -> None:
    for line in text.replace("\\\n", "").splitlines():
        prompt, program, command, *arguments = shlex.split(line)
        assert (prompt, program) == ("$", cli.PROG), line
        try:
            cli.main([command, *arguments, *OPTIONS.get(command, ())])
        except SystemExit as stop:
            if stop.code != 0:  # as after --version
                raise


@pytest.mark.parametrize("page", pages_that_run(), ids=lambda p: p.stem)
def test_the_blocks_of_a_page_run(page, workplace, monkeypatch):
    blocks = [block for block in blocks_of(page) if not block.not_run]
    # The first block of the README trains the SAE that the others load.
    if page.name not in ("README.md", "train.md"):
        save_sae()
    names: dict[str, object] = {}
    for block in blocks:
        text = with_smaller_sizes(block.text)
        if block.language == "python":
            exec(compile(text, str(page), "exec"), names)
        elif block.language == "console":
            run_commands(text)
        elif found := re.search(r'title="(.+)"', block.info):
            Path(found[1]).write_text(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_block_has_a_language_and_the_rest_a_reason(page):
    for block in blocks_of(page):
        assert block.language in ("python", "console", "yaml", "text", "bibtex")
        if block.not_run:
            assert block.language in ("python", "console")


def test_the_examples_of_the_help_name_real_options():
    for name in cli.COMMANDS:
        module = importlib.import_module(f"sae_lens_multilayer.cli.{name}")
        examples = getattr(module, "EXAMPLES", "").replace("\\\n", "")
        parser = cli.parser_of(name) if hasattr(module, "Options") else None
        for line in examples.splitlines()[1:]:
            program, command, *arguments = shlex.split(line)
            if program == cli.PROG:
                assert command == name
                if parser is not None:
                    parser.parse_args(arguments)


def test_every_public_name_is_on_a_page_of_the_api():
    text = "".join(p.read_text() for p in (ROOT / "docs" / "api").glob("*.md"))
    documented = set(re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE))
    for module in (sae_lens_multilayer, analysis, pictures):
        names = {f"{module.__name__}.{name}" for name in module.__all__}
        assert names - documented == set()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
