"""Folders and files on disk that are complete or not there."""

import itertools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import torch
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

PARTIAL_PREFIX = ".partial-"
"""Begins the name of a folder that is not complete."""

logger = logging.getLogger(__name__)


@contextmanager
def complete_or_absent(path: str | Path) -> Generator[Path, None, None]:
    """Yield a folder beside `path` that becomes `path` when the block ends well.

    If the block raises, the folder is removed and `path` is as it was. Everything is
    flushed to the disk before the rename, so a crash cannot leave a torn folder. Where
    `path` is a link, the folder that it names is made.

    Raises:
        FileExistsError: If something is at `path` already, unless an empty folder.
    """
    check_free(path)
    # A folder cannot be renamed onto a link, or onto "."
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f"{PARTIAL_PREFIX}{uuid4().hex[:8]}"
    partial.mkdir()
    try:
        yield partial
        for file in [*partial.rglob("*"), partial]:
            _flush(file)
        os.replace(partial, path)
        _flush(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a file that is the old one, or none, until all of it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{PARTIAL_PREFIX}{uuid4().hex[:8]}")
    try:
        partial.write_text(text, encoding="utf-8")
        _flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _flush(path.parent)


@contextmanager
def alone_in(folder: Path) -> Generator[None, None, None]:
    """Keep other processes that ask for the same out of a folder, which is made.

    Raises:
        BlockingIOError: If one is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (
        (folder / ".lock").open("w") as file,
        locked(file, "Another process is at work here; wait for it", folder),
    ):
        yield


@contextmanager
def locked(
    file: IO[str] | int, problem: str, path: Path
) -> Generator[None, None, None]:
    """Lock an open file or folder until it is closed, at the latest by its process.

    Args:
        problem: What the error says if another process has locked it.
        path: What the error names.

    Raises:
        BlockingIOError: If another process has.
    """
    # Where there is none, as on Windows, what needs no lock can still be used.
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(error.errno, problem, str(path)) from error
    yield


def check_free(path: str | Path) -> None:
    """Raise FileExistsError if something would be overwritten at `path`."""
    path = Path(path)
    if not path.exists():
        return
    if not path.is_dir() or any(path.iterdir()):
        raise FileExistsError(
            f"{path} must be a new or an empty folder, so that nothing is overwritten. "
            "Choose another path or move what is there."
        )
    if path.resolve().is_mount():
        raise FileExistsError(
            f"{path} must be a new folder or an empty one that can be replaced; it is "
            "the root of a file system. Choose a folder inside it."
        )


def free_path(path: str | Path) -> Path:
    """`path`, or the first of `path-1`, `path-2`, ... where nothing is overwritten.

    Another one is logged as a warning.
    """
    for n in itertools.count():
        candidate = Path(path) if n == 0 else Path(f"{path}-{n}")
        try:
            check_free(candidate)
        except FileExistsError:
            continue
        if n > 0:
            logger.warning("%s is taken by now; saving to %s", path, candidate)
        return candidate
    raise AssertionError("unreachable: the count has no end")


def check_writable(path: str | Path, what: str) -> None:
    """Find out now whether a folder can be made at `path` later.

    Args:
        what: The name of the setting, for the message.

    Raises:
        FileExistsError: If something is there already.
        OSError: If no folder can be made there.
    """
    try:
        check_free(path)
        parent = Path(path).resolve().parent
        while not parent.exists():
            parent = parent.parent
        tempfile.TemporaryDirectory(prefix=".write-check-", dir=parent).cleanup()
    except FileExistsError as error:
        raise FileExistsError(f"`{what}`: {error}") from error
    except OSError as error:
        # OSError chooses the class that goes with the number.
        raise OSError(
            error.errno,
            f"`{what}` must be a path that can be written; {error.strerror}",
            str(path),
        ) from error


def check_checkpoint(path: str | Path, wanted: dict[str, Any]) -> None:
    """Check that a folder holds a checkpoint of a certain SAE.

    Args:
        wanted: Entries that its `cfg.json` must have: architecture, sizes and so on.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If it is the checkpoint of another SAE, or torn.
    """
    path = Path(path)
    for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME):
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"{path} must be a checkpoint folder with {SAE_CFG_FILENAME} and "
                f"{SAE_WEIGHTS_FILENAME}; {name} is not there."
            )
    cfg = read_json(path / SAE_CFG_FILENAME)
    found = {key: cfg.get(key) for key in wanted}
    if found != wanted:
        raise ValueError(
            f"The checkpoint at {path} must be of this run's SAE, {wanted}; it has "
            f"{found}."
        )


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of a checkpoint.

    Raises:
        ValueError: If it is torn; names the file.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(_torn(path, "JSON", error)) from error


def read_tensors(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read the tensors in a file of a checkpoint.

    Raises:
        ValueError: If it is torn; names the file.
    """
    try:
        return load_file(path, device=str(device))
    except SafetensorError as error:
        raise ValueError(_torn(path, "safetensors", error)) from error


def _torn(path: Path, kind: str, error: Exception) -> str:
    return (
        f"{path} must be {kind}; {error}. The file is torn or was changed: use another "
        "one, such as an earlier checkpoint's."
    )


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
