"""New files and folders that commands write; nothing is overwritten."""

from pathlib import Path

from sae_lens_multilayer.files import check_writable, save_somewhere, write_whole


def new_file(path: str) -> Path:
    """The path of a file to write, which must not exist."""
    file = Path(path).expanduser()
    if file.exists():
        raise FileExistsError(f"{path} exists; nothing is overwritten.")
    check_writable(file, "output_path")
    return file


def new_folder(path: str) -> Path:
    """The path of a folder to write, which must be absent or empty."""
    folder = Path(path).expanduser()
    check_writable(folder, "output_path")
    return folder


def write_new(path: Path, text: str) -> None:
    """Write a complete file; beside `path` if something has appeared there."""
    path = save_somewhere(path, lambda path: write_whole(path, text, replace=False))
    print(f"Written: {path}")
