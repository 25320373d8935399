"""The command line: a module for each command, and one handling of errors.

A command's module has the dataclass `Options`, from which its parser is made,
`run(options)`, and `EXAMPLES` for the help. Without `Options`, `run` parses the
arguments itself.
"""

import argparse
import io
import logging
import os
import re
import signal
import sys
from importlib import import_module
from typing import Any

from sae_lens.training._interruption import InterruptedException

import sae_lens_multilayer
from sae_lens_multilayer.cli.parser import Parser
from sae_lens_multilayer.ranks import AgreedError, RankError, check_one_process

PROG = "sae-lens-multilayer"

COMMANDS = {
    "train": "Train one SAE on many layers of a model, and save it.",
    "cache": "Store the activations of a run's text on disk, to train on them often.",
    "evaluate": "Splice an SAE into each layer and compare with the clean run.",
    "lens": "Fit a lens (tuned, Jacobian, in closed form), to train an SAE with.",
    "analyze": "Run analyses of an SAE, and write results and pictures.",
    "report": "Write one HTML file with the evaluation, the analyses and the latents.",
    "serve": "Serve the report on this machine, and run the model on your own text.",
    "sweep": "Train, evaluate and analyse an SAE for each of many choices of settings.",
    "study": "Run a study of several runs, with tables, figures and a page.",
    "evals": "Run SAELens' own evaluations on published SAEs.",
    "releases": "List the published SAEs that `SAE.from_pretrained` can load.",
}
"""Modules of this package and what their commands do."""

_STOPPED_BY_PIPE, _STOPPED_BY_USER = 128 + signal.SIGPIPE, 128 + signal.SIGINT
"""Exit statuses that shells give programs that end by these signals."""

EXIT_STATUSES = {
    0: "done",
    1: "an error, such as wrong input; or stopped by a signal after a checkpoint",
    2: "a wrong option",
    _STOPPED_BY_USER: "stopped by Ctrl-C",
    _STOPPED_BY_PIPE: "the reader of the output has ended",
}
"""What the exit statuses mean."""


_INPUT_ERRORS = (
    ValueError,
    OSError,
    FloatingPointError,
    ModuleNotFoundError,
    RankError,
    re.error,
)
"""Errors of wrong input, whose messages are enough."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command that the arguments name; None: those of the process."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A path that is not UTF-8 can be printed.
        sys.stdout.reconfigure(errors="backslashreplace")
    is_first = os.environ.get("RANK", "0") == "0"  # set by torchrun
    level = logging.INFO if is_first else logging.WARNING
    logging.getLogger("sae_lens_multilayer").setLevel(level)
    try:
        _run(options.command, options.arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output, such as `head`, has ended; Python would flush again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(_STOPPED_BY_PIPE)
    except InterruptedException:
        message = f"{PROG} {options.command}: stopped after a whole step, as requested."
        sys.exit(message if is_first else 1)
    except KeyboardInterrupt:
        if options.traceback:
            raise
        print(f"\n{PROG} {options.command}: stopped.", file=sys.stderr)
        sys.exit(_STOPPED_BY_USER)
    except _INPUT_ERRORS as error:
        if options.traceback:
            raise
        is_printed_by_first = isinstance(error, AgreedError) and not is_first
        sys.exit(1 if is_printed_by_first else f"{PROG} {options.command}: {error}")


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{line}" for name, line in COMMANDS.items()]
    statuses = [f"  {status:<{width}}{text}" for status, text in EXIT_STATUSES.items()]
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Multi-layer sparse autoencoders for SAELens.",
        epilog="\n".join(["commands:", *lines, "\nexit status:", *statuses]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"{PROG} {sae_lens_multilayer.__version__}"
    parser.add_argument("--version", action="version", version=version)
    parser.add_argument(
        "--traceback", action="store_true", help="show the traceback of an error"
    )
    parser.add_argument("command", choices=COMMANDS, metavar="command")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="see: command --help"
    )
    return parser


def _run(command: str, arguments: list[str]) -> None:
    if command != "train":
        check_one_process(f"`{command}`")
    module = import_module(f"{__name__}.{command}")
    if hasattr(module, "Options"):
        parsed: Any = parser_of(command).parse_args(arguments)
        module.run(parsed.options)
    else:
        module.run(arguments)


def parser_of(command: str) -> Parser:
    """The parser of a command whose module has `Options`."""
    module = import_module(f"{__name__}.{command}")
    epilog = getattr(module, "help_epilog", str)() + getattr(module, "EXAMPLES", "")
    parser = Parser(f"{PROG} {command}", COMMANDS[command], epilog)
    parser.add_arguments(module.Options, dest="options")
    return parser
