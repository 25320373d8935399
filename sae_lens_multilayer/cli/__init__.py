"""The command line: arguments -> one library function; the only place that prints.

A command is a function of its own arguments, with its own parser, in `COMMANDS`. The
first line of its docstring is its line of help.
"""

import argparse
import logging
import os
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
from sae_lens_multilayer.ranks import RankError

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
        COMMANDS[options.command](options.arguments)
    except InterruptedException:
        sys.exit(f"{PROG} {options.command}: stopped after a whole step, as asked for.")
    except (ValueError, OSError, ModuleNotFoundError, RankError) as error:
        # What the library says of wrong input; the way it took there is of no help.
        if options.traceback:
            raise
        sys.exit(f"{PROG} {options.command}: {error}")
