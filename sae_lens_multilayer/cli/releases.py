"""Lists the published SAEs."""

import re
from dataclasses import dataclass

from simple_parsing import field as option

from sae_lens_multilayer.published.releases import releases

EXAMPLES = """examples:
  sae-lens-multilayer releases gpt2
  sae-lens-multilayer releases --csv"""


@dataclass
class Options:
    """What is listed."""

    pattern: str = option(default="", positional=True, nargs="?", metavar="pattern")
    """Regular expression to find in the repository's name."""
    csv: bool = option(default=False, action="store_true")
    """Print a CSV file."""


def run(options: Options) -> None:
    """Run the command."""
    table = releases()
    pattern = re.compile(options.pattern)
    table = table[table.repository.map(lambda name: bool(pattern.search(name)))]
    print(table.to_csv(index=False) if options.csv else table.to_string(index=False))
