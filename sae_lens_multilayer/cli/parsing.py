"""Dataclasses -> options, and what all commands share of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from simple_parsing import ArgumentParser

from sae_lens_multilayer.files import check_writable, free_path, write_whole

PROG = "sae-lens-multilayer"

T = TypeVar("T")


def help_of(command: Callable[[list[str]], None]) -> str:
    """The line of help of a command."""
    return str(command.__doc__).splitlines()[0]


def parse(
    command: Callable[[list[str]], None],
    options: type[T],
    arguments: list[str],
    epilog: str | None = None,
) -> T:
    """Fill a dataclass of options from a command's arguments.

    Args:
        epilog: Text at the end of the help.
    """
    parser = ArgumentParser(
        prog=f"{PROG} {command.__name__}", description=help_of(command), epilog=epilog
    )
    dataclass: Any = options
    parser.add_arguments(dataclass, dest="options")
    parsed: Any = parser.parse_args(arguments)
    return parsed.options


def new_file(path: str | None, suffix: str) -> Path | None:
    """The path of a file that will be written, where nothing is yet.

    Raises:
        FileExistsError: If something is there.
        ValueError: If it has another ending.
    """
    if path is None:
        return None
    file = Path(path).expanduser()
    if file.suffix != suffix:
        raise ValueError(f"`output_path` must end in {suffix}; got {path}.")
    if file.exists():
        raise FileExistsError(f"{path} is there already; nothing is overwritten.")
    check_writable(file, "output_path")
    return file


def new_folder(path: str) -> Path:
    """The path of a folder that will be made, where nothing is yet.

    Raises:
        FileExistsError: If something is there.
        OSError: If no folder can be made there.
    """
    folder = Path(path).expanduser()
    check_writable(folder, "output_path")
    return folder


def write_new(path: Path, text: str) -> None:
    """Write a file that is complete or not there; beside `path` if it is taken."""
    path = free_path(path)
    write_whole(path, text)
    print(f"Written: {path}")
