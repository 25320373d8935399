"""New files and folders that commands write; nothing is overwritten."""

from pathlib import Path

from sae_lens_multilayer.files import (
    check_new_file,
    check_writable,
    save_somewhere,
    write_whole,
)


def new_file(path: str) -> Path:
    """The path of a file to write, which must not exist."""
    return check_new_file(path, "output_path")


def new_folder(path: str) -> Path:
    """The path of a folder to write, which must be absent or empty."""
    folder = Path(path).expanduser()
    check_writable(folder, "output_path")
    return folder


def write_new(path: Path, text: str) -> None:
    """Write a complete file; beside `path` if something has appeared there."""
    path = save_somewhere(path, lambda path: write_whole(path, text, replace=False))
    print(f"Written: {path}")
