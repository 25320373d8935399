"""Parsers of the commands: a help of one screen, and option names with "-" or "_"."""

import argparse
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

from simple_parsing import ArgumentParser
from typing_extensions import override

_NAMES_WIDTH, _WIDEST = 32, 100
"""Columns for the names of options, and for a whole line."""


@dataclass
class Row:
    """An option or argument in a help text."""

    names: str
    """With the kind of value, such as "--layers int ..."."""
    text: str

    @property
    def summary(self) -> str:
        """The first sentence."""
        return re.split(r"(?<=\.) (?=[A-Z])", self.text, maxsplit=1)[0]


@dataclass
class Section:
    """A group of options."""

    title: str
    rows: list[Row] = field(default_factory=list[Row])


class ShortHelp(argparse.HelpFormatter):
    """A line for each option. argparse calls the methods in the order of the help.

    Args:
        prog: The program and the command.
        texts: Texts of options by name; if there are any, others are not shown.
    """

    def __init__(
        self, prog: str, texts: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        super().__init__(prog)
        self._given = texts
        self.usage = ""
        self.paragraphs: list[str] = []
        """The description, and the text after the options if there is one."""
        self.sections: list[Section] = []
        self._in_section = False

    @override
    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any = None):
        needed = [_names(a) for a in actions if a.required]
        self.usage = " ".join([f"usage: {self._prog}", *needed, "[options]"])

    @override
    def start_section(self, heading: str | None) -> None:
        self.sections.append(Section(heading or ""))
        self._in_section = True

    @override
    def end_section(self) -> None:
        self._in_section = False

    @override
    def add_text(self, text: str | None) -> None:
        if text and self._in_section:  # the first line of a dataclass' docstring
            self.sections[-1].title = text.splitlines()[0].rstrip(".")
        elif text:
            self.paragraphs.append(text)

    @override
    def add_arguments(self, actions: Iterable[argparse.Action]) -> None:
        rows = (Row(_names(a), self._text(a)) for a in actions if self._is_shown(a))
        self.sections[-1].rows.extend(rows)

    @override
    def format_help(self) -> str:
        if not self.sections:  # only the usage, before an error
            return f"{self.usage}\n"
        description, *rest = self.paragraphs
        lines = [self.usage, "", description]
        width = min(shutil.get_terminal_size().columns, _WIDEST)
        for section in self.sections:
            lines += [f"\n{section.title}:"] if section.rows else []
            lines += (line for row in section.rows for line in self._lines(row, width))
        return "\n".join([*lines, *(f"\n{text}" for text in rest), ""])

    def _is_shown(self, action: argparse.Action) -> bool:
        return not self._given or _name(action) in self._given

    def _text(self, action: argparse.Action) -> str:
        text = self._given.get(_name(action), action.help or "")
        text = " ".join(text.split())
        # simple-parsing adds it to the text of some options only.
        text = re.sub(r" \(default: [^)]*\)$", "", text)
        nothing = None, [], argparse.SUPPRESS
        default = "" if action.default in nothing else f" ({_plain(action.default)})"
        return text.removesuffix(".") + default + "." * text.endswith(".")

    def _lines(self, row: Row, width: int) -> Iterator[str]:
        names = f"  {row.names}".ljust(_NAMES_WIDTH - 1)
        free = max(20, width - len(names) - 1)
        yield f"{names} {textwrap.shorten(row.summary, free, placeholder=' ...')}"


class WholeHelp(ShortHelp):
    """Every option with its whole text."""

    @override
    def _is_shown(self, action: argparse.Action) -> bool:
        return True

    @override
    def _lines(self, row: Row, width: int) -> Iterator[str]:
        yield f"  {row.names}"
        yield textwrap.indent(textwrap.fill(row.text, width - 8), " " * 8)


class Parser(ArgumentParser):
    """A parser with `--help` of one screen, and `--help_all`.

    Args:
        prog: The program and the command.
        description: What the command does.
        epilog: Text after the options, which is not wrapped.
        texts: See `ShortHelp`.
    """

    def __init__(
        self,
        prog: str,
        description: str,
        epilog: str = "",
        texts: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.texts = texts
        short: Any = partial(ShortHelp, texts=texts)
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            add_help=False,
            formatter_class=short,
        )
        whole = partial(WholeHelp, texts=texts)
        for names, formatter, text in (
            (("-h", "--help"), short, "Show this help."),
            (("--help_all",), whole, "Show every option with its whole text."),
        ):
            self.add_argument(
                *names, action=_ShowHelp, nargs=0, const=formatter, help=text
            )

    @override
    def parse_known_args(self, args: Any = None, *rest: Any, **options: Any) -> Any:
        args = [with_underscores(argument) for argument in args]
        return super().parse_known_args(args, *rest, **options)


def with_underscores(argument: str) -> str:
    """An option's name with "_" for "-"; its value, and other arguments, as they are.

    Example:
        >>> with_underscores("--n-tokens=a-b"), with_underscores("a-b")
        ('--n_tokens=a-b', 'a-b')
    """
    if not argument.startswith("--"):
        return argument
    name, sign, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{sign}{value}"


class _ShowHelp(argparse.Action):
    @override
    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        formatter: Any = self.const
        parser.formatter_class = formatter
        parser.print_help()
        parser.exit()


def _name(action: argparse.Action) -> str:
    """The option's name without dashes."""
    long = (o[2:] for o in action.option_strings if o.startswith("--"))
    return next(long, action.dest)


def _names(action: argparse.Action) -> str:
    """The option and its kind of value; the name of a positional argument."""
    if not action.option_strings:
        return str(action.metavar or action.dest)
    negative = f"--no{action.option_strings[0].removeprefix('--')}"
    options = ", ".join(o for o in action.option_strings if o != negative)
    if action.nargs == 0:
        return options
    kind = str(action.metavar or getattr(action.type, "__name__", "value")).strip("[]")
    if action.choices is not None and action.metavar is None:
        kind = "|".join(map(str, action.choices))
    elif action.nargs == "*":
        kind = f"{getattr(action.type, '__name__', kind)} ..."
    return f"{options} {kind}"


def _plain(default: Any) -> str:
    return " ".join(map(str, default)) if isinstance(default, list) else str(default)
