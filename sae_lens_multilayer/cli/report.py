"""Writes a report of an SAE."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sae_lens_multilayer.analysis import layer_distributions, load_results
from sae_lens_multilayer.cli.analyze import (
    AnalysisOptions,
    check_same_inputs,
    suite_of,
    with_saved_settings,
)
from sae_lens_multilayer.cli.options import (
    Inputs,
    ModelOptions,
    SAEOptions,
    TextOptions,
)
from sae_lens_multilayer.cli.outputs import new_file, write_new
from sae_lens_multilayer.evaluation.metrics import SpliceMetrics
from sae_lens_multilayer.pictures.description import short_labels
from sae_lens_multilayer.pictures.page import ReportContent, report_html
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.sae.views import hook_names_of

EXAMPLES = """examples:
  sae-lens-multilayer report output --dataset_path held-out.jsonl
  sae-lens-multilayer report output --analysis_path analyses"""


@dataclass
class Options:
    """What the report shows."""

    sae: SAEOptions
    model: ModelOptions
    text: TextOptions
    analysis: AnalysisOptions
    n_latents: int = 1000
    """Latents in the browser: the most active ones, and --latents."""
    analysis_path: str | None = None
    """Folder that `analyze` wrote for this SAE: its results are shown, with its options
    of text and analysis; missing results are computed."""
    output_path: str = "report.html"
    """New HTML file."""


def run(options: Options) -> None:
    """Run the command."""
    file = new_file(options.output_path)
    write_new(file, report_html(inputs_and_content(options)[1]))


def inputs_and_content(
    options: Any, names: Iterable[str] | None = None
) -> tuple[Inputs, ReportContent]:
    """The SAE, model and text of some options, and the content of their report.

    Args:
        options: With `sae`, `model`, `text`, `analysis`, `analysis_path`, `n_latents`.
        names: Analyses to show as far as they are available, besides those in
            `analysis_path`; None: all.
    """
    known: dict[str, Result] = {}
    if options.analysis_path is not None:
        options = with_saved_settings(options.analysis_path, options)
    inputs = Inputs.load(options)
    if options.analysis_path is not None:
        check_same_inputs(options.analysis_path, inputs)
        known = load_results(options.analysis_path)
    return inputs, _content(inputs, options, known, names)


def _content(
    inputs: Inputs,
    options: Any,
    known: Mapping[str, Result],
    names: Iterable[str] | None,
) -> ReportContent:
    positions, notes = _excluded(inputs, options)
    analysis = replace(options.analysis, exclude_positions=positions)
    suite = suite_of(inputs, replace(options, analysis=analysis))
    available = suite.available()
    wanted = ["evaluation", *available]
    if names is not None:
        wanted = [name for name in available if name in {*names, *known}]
    results = suite.run(wanted, known)
    evaluation = results.pop("evaluation", None)
    assert evaluation is None or isinstance(evaluation, SpliceMetrics)
    prompt = layer_distributions(
        inputs.sae, inputs.model, inputs.prompts[:1], exclude_positions=positions
    )
    model_name = Path(str(inputs.sae.cfg.metadata.model_name)).name
    return ReportContent(
        f"Multi-layer SAE of {model_name}",
        _facts(inputs, options, model_name, evaluation),
        notes,
        None if evaluation is None else evaluation.to_dataframe(),
        results,
        inputs.text_of,
        prompt,
        options.n_latents,
        list(options.analysis.latents or []),
    )


def _facts(
    inputs: Inputs, options: Any, model_name: str, evaluation: SpliceMetrics | None
) -> dict[str, str]:
    sae, prompts = inputs.sae, inputs.prompts
    labels = short_labels(hook_names_of(sae))
    k: Any = getattr(sae.cfg, "k", None)
    n_tokens = prompts.ids.numel()
    facts = {
        "SAE": options.sae.sae + (f", {options.sae.sae_id}" * bool(options.sae.sae_id)),
        "model": model_name,
        "architecture": sae.cfg.architecture(),
        "latents": f"{sae.cfg.d_sae:,} ({sae.cfg.d_sae / sae.cfg.d_in:g} × d_in)",
        **({} if k is None else {"k": str(k)}),
        "layers": f"{len(labels)}, from {labels[0]} to {labels[-1]}",
        "text": inputs.text.dataset_path,
        "tokens": f"{n_tokens:,}",
    }
    if evaluation is not None:
        table = evaluation.to_dataframe()
        facts |= {
            "tokens": f"{evaluation.n_tokens:,} of {n_tokens:,}",
            "CE of the model": f"{table.ce_loss_clean.iloc[0]:.4f} nats",
            "dead latents": f"{table.dead_fraction.iloc[0]:.1%}",
        }
    return facts


def _excluded(inputs: Inputs, options: Any) -> tuple[list[int], list[str]]:
    """Positions to exclude, and notes for the page on what is excluded."""
    notes: list[str] = []
    special = inputs.text.excluded_token_ids(inputs.model.tokenizer)
    if special:
        notes.append(f"{len(special)} special tokens are excluded everywhere.")
    if inputs.text.seqpos_slice != (None,):
        notes.append(
            f"Only positions in the SAE's `seqpos_slice` {inputs.text.seqpos_slice} "
            "count. When layers are replaced the others keep their own vectors."
        )
    positions = options.analysis.exclude_positions
    warning = inputs.first_position_warning(positions)
    # The analyses in a folder keep their own positions.
    if warning and options.analysis_path is None:
        positions = [*positions, 0]
    if warning:
        notes.append(warning)
    if positions:
        notes.append(
            f"Positions {positions} of each prompt are excluded. When a layer is "
            "replaced they keep their own vectors."
        )
    return positions, notes
