"""The command line: arguments -> one library function; the only place that prints.

A command is a function of its own arguments, with its own parser, in `COMMANDS`. The
first line of its docstring is its line of help.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable

from sae_lens.training._interruption import InterruptedException

from sae_lens_multilayer.cli.analyze import analyze
from sae_lens_multilayer.cli.cache import cache
from sae_lens_multilayer.cli.evaluate import evaluate
from sae_lens_multilayer.cli.lens import lens
from sae_lens_multilayer.cli.parsing import PROG, help_of
from sae_lens_multilayer.cli.published import evals, releases
from sae_lens_multilayer.cli.report import report
from sae_lens_multilayer.cli.sweep import compare, sweep
from sae_lens_multilayer.cli.train import train
from sae_lens_multilayer.ranks import AgreedError, RankError, check_one_process

COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "cache": cache,
    "evaluate": evaluate,
    "lens": lens,
    "analyze": analyze,
    "report": report,
    "sweep": sweep,
    "compare": compare,
    "evals": evals,
    "releases": releases,
}


_STOPPED_BY_PIPE, _STOPPED_BY_USER = 128 + signal.SIGPIPE, 128 + signal.SIGINT
"""What a shell gives for a program that ends by these signals."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command that the arguments name.

    Args:
        arguments: None: those of the process.
    """
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{help_of(f)}" for name, f in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Multi-layer sparse autoencoders for SAELens.",
        epilog="\n".join(["commands:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--traceback", action="store_true", help="show where an error comes from"
    )
    parser.add_argument("command", choices=COMMANDS, metavar="command")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="see: command --help"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    is_first = os.environ.get("RANK", "0") == "0"  # of what torchrun has started
    level = logging.INFO if is_first else logging.WARNING
    logging.getLogger("sae_lens_multilayer").setLevel(level)
    try:
        if options.command != "train":
            check_one_process(f"`{options.command}`")
        COMMANDS[options.command](options.arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Who read the output, such as `head`, has seen enough. Python would flush what
        # is left once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(_STOPPED_BY_PIPE)
    except KeyboardInterrupt:
        if options.traceback:
            raise
        print(f"\n{PROG} {options.command}: stopped.", file=sys.stderr)
        sys.exit(_STOPPED_BY_USER)
    except InterruptedException:
        message = f"{PROG} {options.command}: stopped after a whole step, as asked for."
        sys.exit(message if is_first else 1)
    except (ValueError, OSError, ModuleNotFoundError, RankError) as error:
        # What the library says of wrong input; the way it took there is of no help.
        if options.traceback:
            raise
        is_said_by_first = isinstance(error, AgreedError) and not is_first
        sys.exit(1 if is_said_by_first else f"{PROG} {options.command}: {error}")
