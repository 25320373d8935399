"""Runs the tutorials as notebooks and writes their pages, with outputs and pictures."""

import os
import shutil
import sys
from pathlib import Path

import jupytext
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TUTORIALS = ("train_and_look", "steer", "published", "sweep")
MADE = {"train_and_look": "sae", "sweep": "sweep"}
"""Folders that they write in outputs/tutorials."""


def main(names: list[str]) -> None:
    """Run these tutorials, or all."""
    # An SAE is not overwritten.
    for name in {*(names or TUTORIALS)} & {*MADE}:
        shutil.rmtree(ROOT / "outputs" / "tutorials" / MADE[name], ignore_errors=True)
    os.environ |= {
        "TQDM_DISABLE": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }
    for name in names or TUTORIALS:
        notebook = jupytext.read(HERE / f"{name}.py")
        NotebookClient(
            notebook, timeout=None, resources={"metadata": {"path": str(ROOT)}}
        ).execute()
        for cell in notebook.cells:
            cell.get("outputs", [])[:] = filter(is_shown, cell.get("outputs", []))
        folder = f"{name}_files"
        page, resources = MarkdownExporter().from_notebook_node(
            notebook, {"output_files_dir": folder, "unique_key": name}
        )
        for path in (HERE / folder).glob("*"):
            path.unlink()
        for path, content in resources["outputs"].items():
            (HERE / folder).mkdir(exist_ok=True)
            (HERE / path).write_bytes(content)
        (HERE / f"{name}.md").write_text(page)
        print(f"Written: {HERE / name}.md")


def is_shown(output: dict) -> bool:
    """Whether an output is not a log or a warning."""
    return output.get("name") != "stderr"


if __name__ == "__main__":
    main(sys.argv[1:])
