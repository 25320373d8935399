"""The HTML report: one file with its data, scripts and styles inside."""

import base64
import gzip
import html
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import pandas as pd

from sae_lens_multilayer.analysis.distributions import LayerDistributions
from sae_lens_multilayer.analysis.transfer import DRAWN, Comparison
from sae_lens_multilayer.pictures.description import (
    Picture,
    picture_of,
    pictures_of,
    short_labels,
)
from sae_lens_multilayer.pictures.latents import LatentData, latents_data
from sae_lens_multilayer.pictures.render_plotly import draw_interactive
from sae_lens_multilayer.results import Result

_COLUMNS = {
    "fvu": "FVU",
    "fvu_scalar": "FVU (scalar)",
    "mse": "MSE",
    "l0": "L0",
    "ce_loss_spliced": "CE spliced",
    "delta_ce": "ΔCE",
    "kl_div": "KL",
    "ce_loss_score": "CE score",
    "silent_fraction": "silent",
}
"""Columns of the evaluation to show, and their headings."""

_SCRIPTS = ("page.js", "latent.js", "browser.js")
_MEANING = (
    "Each layer's vectors are replaced by their reconstructions in turn. CE, ΔCE and "
    "KL are in nats; the CE score is the part of the loss of zero-ablation that is "
    "recovered; silent latents were not active at the layer."
)


@dataclass
class ReportContent:
    """The content of a report."""

    title: str
    facts: dict[str, str]
    """Facts about the SAE and the tokens, by name."""
    notes: list[str]
    """Sentences that a reader of the numbers needs."""
    evaluation: pd.DataFrame | None
    """`SpliceMetrics.to_dataframe()`; None: not shown."""
    results: dict[str, Result]
    """Results of the analyses to show, by name."""
    text_of: Callable[[int], str]
    """The text of a token id."""
    prompt: LayerDistributions | None = None
    """Distributions over layers of one prompt."""
    n_latents: int = 1000
    """Latents in the browser: those with the largest sums of activations."""
    more: list[int] = field(default_factory=list)
    """Latents in the browser in any case."""


def report_html(content: ReportContent, served: bool = False) -> str:
    """The report as one text, with plotly.js and all data inside.

    Args:
        served: Add the form for the reader's own text, which needs `serving.app`.
    """
    from plotly.offline import get_plotlyjs

    pictures = _pictures(content)
    figures = {name: _figures(picture) for name, picture in pictures.items()}
    latents = latents_data(
        content.results, content.n_latents, content.more, content.text_of
    )
    parts = {
        "title": html.escape(content.title),
        "facts": "".join(
            f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
            for name, value in content.facts.items()
        ),
        "notes": "".join(f"<p>{html.escape(note)}</p>" for note in content.notes),
        "links": _links(served, content.evaluation is not None),
        "explore": _asset("explore.html") if served else "",
        "evaluation": _evaluation(content),
        "pictures": "".join(_section(*item) for item in pictures.items()),
        "css": _asset("page.css") + (_asset("explore.css") if served else ""),
        "js": "\n".join(map(_asset, _SCRIPTS + ("explore.js",) * served)),
        "plotly": get_plotlyjs(),
        "figures": _json(figures),
        "head": _packed("latent-head", latents.head),
        "pieces": _pieces(latents),
    }
    # One pass over the template, as a part may contain "@@".
    pieces = _asset("page.html").split("@@")
    page = "".join(
        parts[piece] if number % 2 else piece for number, piece in enumerate(pieces)
    )
    # Texts of tokens may hold half of a pair of surrogates.
    return page.encode("utf-8", "replace").decode()


def _links(served: bool, evaluated: bool) -> str:
    links = {
        "#explore": ("Your text", served),
        "#latents": ("Latents", True),
        "#evaluation": ("Evaluation", evaluated),
        "#pictures": ("Analyses", True),
    }
    return " ".join(
        f'<a href="{target}">{name}</a>'
        for target, (name, is_there) in links.items()
        if is_there
    )


def _pictures(content: ReportContent) -> dict[str, Picture]:
    pictures: dict[str, Picture] = {}
    for name, result in content.results.items():
        pictures |= pictures_of({name: result}, text_of=content.text_of)
        if name == "layer_distributions" and content.prompt is not None:
            picture = picture_of(content.prompt)
            picture.title = f"{picture.title} of one prompt"
            pictures["one_prompt"] = picture
    return pictures


def _figures(picture: Picture) -> list[Any]:
    """Data for plotly.js of each panel."""
    return [json.loads(str(figure.to_json())) for figure in draw_interactive(picture)]


def _evaluation(content: ReportContent) -> str:
    """The tables of the evaluation and of single-layer SAEs, if there are any."""
    comparison = "".join(map(_comparison, content.results.values()))
    if content.evaluation is None:
        return comparison
    table = _table(content.evaluation, _COLUMNS)
    return f'<h2 id="evaluation">Evaluation</h2><p>{_MEANING}</p>{table}{comparison}'


def _comparison(result: Result) -> str:
    """The table of the SAE beside single-layer SAEs; empty for other results."""
    if not isinstance(result, Comparison):
        return ""
    table = result.to_dataframe()
    table.columns = ["/".join(names) for names in table.columns]
    names = {"multi_layer": "this SAE", "single_layer": "single layer"}
    columns = {
        f"{metric}/{which}": f"{_COLUMNS[metric]}, {name}"
        for metric in DRAWN
        for which, name in names.items()
    }
    return (
        "<h3>Beside single-layer SAEs</h3><p>The same tokens and metrics, with an SAE "
        f"that was trained on the layer alone.</p>{_table(table, columns)}"
    )


def _table(table: pd.DataFrame, headings: dict[str, str]) -> str:
    columns = [name for name in headings if name in table]
    head = "".join(
        f'<th scope="col" title="{name}">{headings[name]}</th>' for name in columns
    )
    labels = short_labels([str(name) for name in table.index])
    rows = [*zip(labels, table.to_dict("records"), strict=True), ("mean", table.mean())]
    body = "".join(
        f'<tr data-layer="{html.escape(label)}"><th scope="row">{html.escape(label)}'
        "</th>"
        + "".join(f'<td data-column="{name}">{row[name]:#.4g}</td>' for name in columns)
        + "</tr>"
        for label, row in rows
    )
    return (
        '<div class="scroll"><table class="numbers"><thead><tr><th scope="col">layer'
        f"</th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _section(name: str, picture: Picture) -> str:
    name, n_panels = html.escape(name), len(picture.panels)
    panels = "".join(
        f'<div class="figure" data-figure="{name}" data-panel="{number}"></div>'
        for number in range(n_panels)
    )
    return (
        f'<section class="picture{" wide" * (n_panels > 1)}">'
        f"<h3>{html.escape(picture.title)}</h3><p>{html.escape(picture.caption)}</p>"
        f'<div class="panels">{panels}</div></section>'
    )


def _pieces(latents: LatentData) -> str:
    pieces = enumerate(latents.pieces)
    return "\n".join(_packed(f"latents-{number}", piece) for number, piece in pieces)


def _packed(name: str, value: Any) -> str:
    """A script element with compressed data, which `unpack` in page.js reads."""
    # Level 9 takes 2.6 times as long, for 2 % less.
    zipped = gzip.compress(_json(value).encode(), compresslevel=6, mtime=0)
    packed = base64.b64encode(zipped).decode()
    return f'<script type="application/gzip" id="{name}">{packed}</script>'


def _json(value: Any) -> str:
    """ASCII JSON that can be inside a script element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _asset(name: str) -> str:
    return files(__package__ or "").joinpath(name).read_text(encoding="utf-8")
