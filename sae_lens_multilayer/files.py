"""Whole-or-absent folders and files, one lock, and reading JSON and tensors."""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

PARTIAL_PREFIX = ".partial-"
"""Prefix of the names of incomplete files and folders."""
LOCK_FILENAME = ".lock"
_SAMPLE_BYTES, _N_SAMPLES = 2**16, 64
_MOST_SAMPLES = 4_096

_SAVE_ERRORS = (OSError, SafetensorError, RuntimeError)
"""What saving to a full disk raises; `torch.save` raises RuntimeError."""

logger = logging.getLogger(__name__)


class KeptBesideError(FileExistsError):
    """Something has appeared at a path; the finished folder is beside it."""

    def __init__(self, path: Path, kept: Path) -> None:
        super().__init__(
            f"Something has appeared at {path}; the new folder is saved at {kept}"
        )
        self.kept = kept


@contextmanager
def complete_or_absent(path: str | Path) -> Generator[Path, None, None]:
    """Yield a folder beside `path` that is renamed to `path` when the block ends.

    If the block raises, the folder is removed and `path` is unchanged. Everything is
    flushed to the disk before the rename, so a crash cannot leave half a folder. If
    something appears at `path` during the block, the error names the finished folder.
    """
    check_free(path)
    # A folder cannot be renamed onto a link, or onto "."
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    partial.mkdir()
    try:
        yield partial
        for file in [*partial.rglob("*"), partial]:
            _flush(file)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    try:
        os.replace(partial, path)
    except OSError as error:
        kept = beside(path)
        os.replace(partial, kept)
        raise KeptBesideError(path, kept) from error
    _flush(path.parent)


def write_whole(path: Path, text: str, replace: bool = True) -> None:
    """Write a file that is the old one, or none, until all of it is on the disk.

    Args:
        replace: False: FileExistsError if there is a file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    try:
        # Paths that are not UTF-8 have characters that cannot be encoded.
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        _flush(partial)
        if replace:
            os.replace(partial, path)
        else:
            _move_to_new(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def _move_to_new(partial: Path, path: Path) -> None:
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # some file systems have no hard links
        path.touch(exist_ok=False)
        os.replace(partial, path)
    else:
        partial.unlink()


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process had begun to write or to delete in a folder."""
    for leftover in folder.glob(f"{PARTIAL_PREFIX}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder; a kill meanwhile leaves none that looks complete."""
    partial = partial_of(folder)
    folder.rename(partial)
    shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Generator[None, None, None]:
    """Make and lock a folder until the block or this process ends."""
    # Imported here because Windows has no fcntl; everything else works there.
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    # A file, as folders cannot be locked on network file systems.
    with (folder / LOCK_FILENAME).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                error.errno,
                "Another process is at work in this folder; wait until it ends",
                str(folder),
            ) from error
        yield


def check_free(path: str | Path) -> None:
    """Raise FileExistsError if something would be overwritten at `path`."""
    path = Path(path)
    if path.exists() and (
        not path.is_dir() or any(path.iterdir()) or path.resolve().is_mount()
    ):
        raise FileExistsError(
            f"{path} must be a new or an empty folder, and not the root of a file "
            "system, so that nothing is overwritten."
        )


def free_path(path: str | Path) -> Path:
    """`path`, or a new logged path beside it if something is at `path` by now."""
    path = Path(path)
    try:
        check_free(path)
    except FileExistsError:
        taken, path = path, beside(path)
        logger.warning("Something has appeared at %s; saving to %s", taken, path)
    return path


def beside(path: Path) -> Path:
    """A new name like that of `path`, in the same folder."""
    return path.with_name(f"{path.stem}-{uuid4().hex[:8]}{path.suffix}")


def save_somewhere(
    path: Path, save: Callable[[Path], None], fallback: str | Path | None = None
) -> Path:
    """Call `save` with `path`, or a free path beside it, and return that path.

    If it fails, such as on a full disk, it is called with a path in the folder
    `fallback`, the folder of temporary files or the working folder, and an OSError
    has that path.
    """
    try:
        free = free_path(path)
        save(free)
        return free
    except KeptBesideError as error:
        logger.warning("%s", error)
        return error.kept
    except _SAVE_ERRORS as error:
        message = f"Nothing could be saved at {path}: {error}."
        for folder in filter(None, (fallback, tempfile.gettempdir(), Path.cwd())):
            try:
                kept = free_path(Path(folder, path.resolve().name))
                save(kept)
            except _SAVE_ERRORS as another:
                logger.error("Nor in %s: %s", folder, another)
            else:
                raise OSError(f"{message} It is saved at {kept}.") from error
        raise OSError(f"{message} It is lost.") from error


def check_writable(path: str | Path, what: str) -> None:
    """Raise an error if no file or folder can be made at `path`, the setting `what`."""
    check_free(path)
    try:
        parent = Path(path).resolve().parent
        while not parent.exists():
            parent = parent.parent
        tempfile.TemporaryDirectory(prefix=".write-check-", dir=parent).cleanup()
    except OSError as error:
        # OSError chooses the subclass from the number.
        raise OSError(
            error.errno,
            f"`{what}` must be a path that can be written; {error.strerror}",
            str(path),
        ) from error


def check_new_file(path: str | Path, what: str) -> Path:
    """The path of a file that can be written and does not exist, not even as a folder.

    FileExistsError if something is there; for the rest see `check_writable`.
    """
    file = Path(path).expanduser()
    if file.exists():
        raise FileExistsError(
            f"`{what}` must be a new file; {path} exists, and nothing is overwritten."
        )
    check_writable(file, what)
    return file


def files_hash(path: str | Path | None) -> str | None:
    """Hash of names, sizes and 64 KiB at evenly spaced places of each file.

    These are 64 places in each of up to 64 files, and fewer in each of more.

    None if nothing is at `path`, such as for a dataset of the hub.
    """
    root = Path(path) if path else None
    if root is None or not root.exists():
        return None
    digest = xxhash.xxh3_128()
    files = sorted(f for f in [root, *root.rglob("*")] if f.is_file())
    n_samples = min(_N_SAMPLES, max(2, _MOST_SAMPLES // max(1, len(files))))
    for file in files:
        if file.name.startswith("cache-"):
            continue  # `datasets` writes these beside the data
        size = file.stat().st_size
        digest.update(os.fsencode(f"{file.relative_to(root)} {size}"))
        last = max(0, size - _SAMPLE_BYTES)
        with file.open("rb") as data:
            for start in {last * i // (n_samples - 1) for i in range(n_samples)}:
                data.seek(start)
                digest.update(data.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; a ValueError names a damaged file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(_damaged(path, "JSON", error)) from error
    if not isinstance(values, dict):
        raise ValueError(_damaged(path, "a JSON object", f"got {values!r:.80}"))
    return values  # pyright: ignore[reportUnknownVariableType]


def read_tensors(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file; a ValueError names a damaged file."""
    try:
        return load_file(path, device=str(device))
    except SafetensorError as error:
        raise ValueError(_damaged(path, "safetensors", error)) from error


def first_sentence(error: Exception) -> str:
    """Class and first sentence of an error; `torch.load` has more, of bad advice."""
    return f"{type(error).__name__}: {error}".split(". ")[0]


def _damaged(path: Path, kind: str, problem: object) -> str:
    return f"{path} must be {kind}; {problem}. The file is damaged: use another one."


def partial_of(path: Path) -> Path:
    """A new name beside `path`, which is hidden and marks what is incomplete."""
    return path.with_name(f"{PARTIAL_PREFIX}{uuid4().hex[:8]}")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
