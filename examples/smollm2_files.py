"""Writes SmolLM2 and its text to a folder, for commands that take paths.

`python -m examples.smollm2_files outputs/smollm2` makes `model` (a Hugging Face
folder), `train.jsonl` and `test.jsonl` (column `text`), which the files in
`examples/studies` name.
"""

import sys
from pathlib import Path

from examples.smollm2 import english_text, smollm2_folder


def write_files(folder: Path) -> None:
    """Write the text; the model's folder is linked."""
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model"
    if not model.exists():
        model.symlink_to(smollm2_folder(), target_is_directory=True)
    english_text("train").to_json(folder / "train.jsonl")
    english_text("test").to_json(folder / "test.jsonl")


if __name__ == "__main__":
    write_files(Path(sys.argv[1]))
    print(f"Written: {sys.argv[1]}")
