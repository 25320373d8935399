"""The built wheel and source archive work outside of the repository."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Folder with the source archive and the wheel built from it, as uploads are."""
    folder = tmp_path_factory.mktemp("dist")
    run("-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder / "source", filter="data")
    source = next((folder / "source").iterdir())
    run("-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=source)
    return folder


def run(*arguments: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        # `make` names its constraints by a path relative to the repository.
        env={
            **{n: v for n, v in os.environ.items() if not n.startswith("PIP_")},
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_an_installed_wheel_runs_outside_of_the_repository(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    target = tmp_path / "site"
    pip = ("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target)
    run(*pip, wheel, cwd=tmp_path)

    script = (
        "import sae_lens_multilayer as package; print(package.__file__)\n"
        "from sae_lens_multilayer.cli import main; main(['releases', 'gpt2-x64-k32$'])"
    )
    where, *table = run("-c", script, cwd=tmp_path, PYTHONPATH=str(target)).splitlines()

    assert Path(where).is_relative_to(target)
    assert "tim-lawson/mlsae-gpt2-x64-k32" in table[-1]
    scripts = [*target.glob("*.dist-info/entry_points.txt")]
    assert "sae_lens_multilayer.cli:main" in scripts[0].read_text()
    assert [*target.glob("*.dist-info/licenses/LICENSE")]


def test_the_source_archive_has_what_the_targets_of_the_makefile_need(built):
    source = next((built / "source").iterdir())

    needed = ("Makefile", "constraints.txt", "LICENSE", "mkdocs.yml", "CHANGELOG.md")
    folders = ("docs/how-to/train.md", "docs/images", "benchmarks", "examples", "tests")
    missing = [n for n in (*needed, *folders) if not (source / n).exists()]
    assert missing == []
