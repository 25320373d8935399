"""The page: sections in HTML around figures and latents in JSON."""

import html
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import pandas as pd

from sae_lens_multilayer.analysis.distributions import LayerDistributions
from sae_lens_multilayer.analysis.examples import Examples
from sae_lens_multilayer.analysis.geometry import TokenSimilarity
from sae_lens_multilayer.analysis.results import Result
from sae_lens_multilayer.analysis.transfer import Comparison
from sae_lens_multilayer.pictures.latents import latents_data
from sae_lens_multilayer.pictures.plotly_figures import (
    Picture,
    pictures_of,
    short_labels,
)

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
"""Columns of the evaluation that the page shows."""


@dataclass
class ReportContent:
    """What a page is made of."""

    title: str
    facts: dict[str, str]
    """What the SAE is, and of which tokens the numbers are."""
    notes: list[str]
    """Sentences that a reader of the numbers must know."""
    evaluation: pd.DataFrame
    """`SpliceMetrics.to_dataframe()`."""
    results: dict[str, Result]
    """Of the analyses, by name; what is missing is left out of the page."""
    text_of: Callable[[int], str]
    """The text of a token id."""
    prompt: LayerDistributions | None = None
    """Distributions over layers of one prompt."""
    n_latents: int = 1000
    """Latents that can be looked at: those with the largest sums of activations."""
    more: list[int] = field(default_factory=list)
    """Latents that can be looked at in any case."""


def report_html(content: ReportContent) -> str:
    """The page as one text, with plotly.js and all data in it."""
    from plotly.offline import get_plotlyjs

    pictures = _pictures(content)
    latents = _latents(content)
    figures = {picture.name: _figure_data(picture) for picture in pictures}
    parts = {
        "title": html.escape(content.title),
        "facts": _facts(content.facts),
        "notes": "".join(f"<p>{html.escape(note)}</p>" for note in content.notes),
        "evaluation": _table(content.evaluation, _COLUMNS),
        "comparison": "".join(map(_comparison, content.results.values())),
        "pictures": "".join(map(_section, pictures)),
        "css": _asset("page.css"),
        "js": _asset("page.js"),
        "plotly": get_plotlyjs(),
        "figures": _json(figures),
        "latents": _json(latents),
    }
    page = _asset("page.html")
    # One pass over the template, as the parts may hold what looks like a mark.
    pieces = page.split("@@")
    return "".join(
        parts[piece] if number % 2 else piece for number, piece in enumerate(pieces)
    )


def _pictures(content: ReportContent) -> list[Picture]:
    pictures: list[Picture] = []
    for name, result in content.results.items():
        pictures += pictures_of(name, result, content.text_of)
        if name == "layer_distributions" and content.prompt is not None:
            (prompt,) = pictures_of("one_prompt", content.prompt, content.text_of)
            prompt.title = (
                f"The same in one prompt of {content.prompt.n_tokens:,} tokens"
            )
            pictures.append(prompt)
    return pictures


def _latents(content: ReportContent) -> dict[str, Any]:
    distributions = content.results.get("layer_distributions")
    examples = content.results.get("max_activating_examples")
    nearest = content.results.get("token_unembeddings")
    if not isinstance(distributions, LayerDistributions) or not isinstance(
        examples, Examples
    ):
        return {"layers": [], "texts": {}, "latents": []}
    chosen = distributions.most_active(content.n_latents)
    known = set(chosen.tolist())
    more = chosen.new_tensor([i for i in content.more if i not in known])
    return latents_data(
        distributions,
        examples,
        nearest if isinstance(nearest, TokenSimilarity) else None,
        chosen.new_tensor([*chosen.tolist(), *more.tolist()]),
        content.text_of,
    )


def _facts(facts: dict[str, str]) -> str:
    return "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in facts.items()
    )


def _comparison(result: Result) -> str:
    """The table of the SAE beside single-layer SAEs; nothing of other results."""
    if not isinstance(result, Comparison):
        return ""
    table = result.to_dataframe()
    table.columns = [f"{metric}/{which}" for metric, which in table.columns]
    names = {"multi_layer": "this SAE", "single_layer": "single layer"}
    columns = {
        f"{metric}/{which}": f"{_COLUMNS[metric]}, {name}"
        for metric in ("fvu", "delta_ce", "kl_div")
        for which, name in names.items()
    }
    return (
        "<h3>Beside single-layer SAEs</h3><p>The same tokens and metrics, with an SAE "
        f"that was trained on the layer alone.</p>{_table(table, columns)}"
    )


def _table(table: pd.DataFrame, titles: dict[str, str]) -> str:
    columns = [name for name in titles if name in table]
    head = "".join(
        f'<th scope="col" title="{name}">{titles[name]}</th>' for name in columns
    )
    labels = short_labels([str(name) for name in table.index])
    rows = [
        (label, row) for label, (_, row) in zip(labels, table.iterrows(), strict=True)
    ]
    rows.append(("mean", table.mean()))
    body = "".join(
        f'<tr data-layer="{html.escape(label)}"><th scope="row">{html.escape(label)}'
        "</th>"
        + "".join(f'<td data-column="{name}">{row[name]:#.4g}</td>' for name in columns)
        + "</tr>"
        for label, row in rows
    )
    return (
        '<div class="scroll"><table><thead><tr><th scope="col">layer</th>'
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _section(picture: Picture) -> str:
    name = html.escape(picture.name)
    return (
        f'<section class="picture"><h3>{html.escape(picture.title)}</h3>'
        f"<p>{html.escape(picture.caption)}</p>"
        f'<div class="figure" data-figure="{name}"></div></section>'
    )


def _figure_data(picture: Picture) -> dict[str, Any]:
    return json.loads(str(picture.figure.to_json()))


def _json(value: Any) -> str:
    """JSON that can stand inside a script element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _asset(name: str) -> str:
    return files(__package__ or "").joinpath(name).read_text(encoding="utf-8")
