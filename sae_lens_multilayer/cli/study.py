"""Runs a study: several runs, with tables, figures and a page."""

import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from simple_parsing import field as option

from sae_lens_multilayer.cli import PROG
from sae_lens_multilayer.cli.tables import print_table
from sae_lens_multilayer.config_files import read_settings_file
from sae_lens_multilayer.studies import STUDIES
from sae_lens_multilayer.sweeps.resumable import PointsFailedError

EXAMPLES = """example:
  sae-lens-multilayer study paper examples/studies/paper_pythia_70m.yaml \\
      --output paper"""


@dataclass
class Options:
    """What is run."""

    study: str = option(positional=True, metavar="study", choices=[*STUDIES])
    """The study: see the list below."""
    file: str = option(positional=True, metavar="file")
    """JSON or YAML file with the study's settings; see examples/studies."""
    output: str = option()
    """Folder; an earlier run of the same file is resumed there."""


def help_epilog() -> str:
    """The studies, for `--help`."""
    lines = [f"  {name:24}{text}" for name, text in STUDIES.items()]
    return "\n".join(["studies:", *lines, "\n"])


def run(options: Options) -> None:
    """Run the command."""
    module: Any = import_module(f"sae_lens_multilayer.studies.{options.study}")
    folder = Path(options.output).expanduser()
    try:
        tables = module.run_settings(read_settings_file(options.file), folder)
    except PointsFailedError as error:
        sys.exit(f"{PROG} study: {error}")
    for table in tables:
        print_table(table)
        print()
    print(f"Written: {folder}")
