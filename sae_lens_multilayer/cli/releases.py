"""Lists the published SAEs."""

import re
from dataclasses import dataclass

from simple_parsing import field as option

from sae_lens_multilayer.published.releases import releases


@dataclass
class Options:
    """What is listed."""

    pattern: str = option(default="", positional=True, nargs="?", metavar="pattern")
    """Regular expression to find in the repository's name."""
    csv: bool = option(default=False, action="store_true")
    """Print a CSV file."""


def run(options: Options) -> None:
    """Run the command."""
    pattern = compiled(options.pattern)
    table = releases()
    table = table[table.repository.map(lambda name: bool(pattern.search(name)))]
    if table.empty:
        raise ValueError(f"no published SAE matches {options.pattern!r}.")
    print(table.to_csv(index=False) if options.csv else table.to_string(index=False))


def compiled(pattern: str) -> re.Pattern[str]:
    """A regular expression; ValueError if it is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{pattern!r} is not a regular expression: {error}."
        ) from error
