"""Hooks of MkDocs: formulas become MathML, and parsers the page of the command line.

Pictures become links to themselves at full size."""

import html
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Installed by `make docs`.
from latex2mathml.converter import convert  # pyright: ignore[reportMissingImports]

from sae_lens_multilayer import cli
from sae_lens_multilayer.cli import train
from sae_lens_multilayer.cli.parser import Parser, WholeHelp

_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL
)
_PICTURE = re.compile(r'<img [^>]*?src="([^"]+)"[^>]*>')


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Insert what a page takes from elsewhere: the README, the commands."""
    for mark, content in (
        ("<!-- readme -->", _readme),
        ("<!-- exit statuses -->", _exit_statuses),
        ("<!-- commands -->", _commands),
    ):
        if mark in markdown:
            markdown = markdown.replace(mark, "\n".join(content()))
    return markdown


def on_page_content(content: str, **_: Any) -> str:
    """Render the formulas that pymdownx.arithmatex has marked, and link pictures."""

    def render(found: re.Match[str]) -> str:
        display = "block" if found[2] == "[" else "inline"
        return convert(html.unescape(found[3]).strip(), display=display)

    content = _FORMULA.sub(render, content)
    return _PICTURE.sub(r'<a class="picture" href="\1">\g<0></a>', content)


def _readme() -> Iterator[str]:
    text = Path("README.md").read_text(encoding="utf-8")
    for there, here in (
        ("](docs/", "]("),
        ("](benchmarks/README.md)", "](numbers/benchmarks.md)"),
        ("](CHANGELOG.md)", "](changelog.md)"),
        ("[MIT](LICENSE)", "MIT"),
    ):
        text = text.replace(there, here)
    yield text


def _exit_statuses() -> Iterator[str]:
    yield "| exit status | meaning |\n|---|---|"
    for status, meaning in cli.EXIT_STATUSES.items():
        yield f"| {status} | {meaning} |"


def _commands() -> Iterator[str]:
    for name, description in cli.COMMANDS.items():
        yield f"\n## {name}\n\n{description}\n"
        if name == "train":
            yield from _options(train.parser_of("multilayer"))
        elif name == "evals":
            yield "The options are those of `python -m sae_lens.evals`."
        else:
            yield from _options(cli.parser_of(name))


def _options(parser: Parser) -> Iterator[str]:
    found = WholeHelp(parser.prog, parser.texts)
    collect: Any = lambda prog: found  # noqa: E731
    parser.formatter_class = collect
    parser.print_help(io.StringIO())
    yield f"```text\n{found.usage}\n```\n"
    for section in found.sections:
        if section.rows:
            yield f"\n**{_escaped(section.title)}**\n\n| option | meaning |\n|---|---|"
            for row in section.rows:
                yield f"| `{row.names}` | {_escaped(row.text)} |"
    for text in found.paragraphs[1:]:
        yield f"\n```text\n{text}\n```"


def _escaped(text: str) -> str:
    """Text without markup, for a cell of a table."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", text)
