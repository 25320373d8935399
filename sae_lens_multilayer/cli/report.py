"""Write a report of an SAE."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sae_lens_multilayer.analysis import layer_distributions
from sae_lens_multilayer.analysis.suite import first_position_ratio
from sae_lens_multilayer.cli.analyze import AnalysisOptions, suite_of
from sae_lens_multilayer.cli.inputs import (
    Inputs,
    ModelOptions,
    SAEOptions,
    TextOptions,
    load_inputs,
)
from sae_lens_multilayer.cli.parsing import new_file, parse, write_new
from sae_lens_multilayer.evaluation import evaluate
from sae_lens_multilayer.report import ReportContent, report_html
from sae_lens_multilayer.report.figures import short_labels
from sae_lens_multilayer.views import hook_names_of

_SINK_RATIO = 4.0
"""How many times longer the first position's vectors are where it is left out."""


@dataclass
class Options:
    """What the report is of."""

    sae: SAEOptions
    model: ModelOptions
    text: TextOptions
    analysis: AnalysisOptions
    n_latents: int = 1000
    """Latents that can be looked at: the most active ones, and --latents."""
    output_path: str = "report.html"
    """New HTML file."""


def report(arguments: list[str]) -> None:
    """Write one HTML file with the evaluation, the analyses and the latents.

    The first position of prompts is left out where its vectors are many times longer
    than the others, and the page says so.
    """
    options = parse(report, Options, arguments)
    path = new_file(options.output_path, ".html")
    assert path is not None
    if options.n_latents < 1:
        raise ValueError(f"`n_latents` must be at least 1; got {options.n_latents}.")
    inputs = load_inputs(options.sae, options.model, options.text)
    content = _content(inputs, options)
    write_new(path, report_html(content))


def _content(inputs: Inputs, options: Options) -> ReportContent:
    sae, tokens = inputs.sae, inputs.tokens
    names = hook_names_of(sae)
    positions, notes = _left_out(inputs, options)
    analysis = replace(options.analysis, exclude_positions=positions)
    suite = suite_of(inputs, options.text, analysis)
    metrics = evaluate(
        sae,
        inputs.model,
        tokens,
        batch_size_prompts=options.text.batch_size_prompts,
        exclude_tokens=inputs.exclude_tokens,
        keep_positions=positions,
    )
    results = suite.run()
    prompt = layer_distributions(
        sae,
        inputs.model,
        tokens[:1],
        exclude_tokens=inputs.exclude_tokens,
        exclude_positions=positions,
    )
    labels = short_labels(names)
    model_name = Path(str(sae.cfg.metadata.model_name)).name
    k: Any = getattr(sae.cfg, "k", None)
    facts = {
        "SAE": options.sae.sae + (f", {options.sae.sae_id}" * bool(options.sae.sae_id)),
        "model": model_name,
        "architecture": sae.cfg.architecture(),
        "latents": f"{sae.cfg.d_sae:,} ({sae.cfg.d_sae / sae.cfg.d_in:g} × d_in)",
        **({} if k is None else {"k": str(k)}),
        "layers": f"{len(names)}, from {labels[0]} to {labels[-1]}",
        "text": options.text.dataset_path or str(sae.cfg.metadata.dataset_path),
        "tokens": f"{metrics.reconstruction.n_tokens:,} of {tokens.numel():,}",
        "CE of the model": f"{metrics.ce_loss_clean:.4f} nats",
        "dead latents": f"{metrics.reconstruction.dead_fraction[0]:.1%}",
    }
    return ReportContent(
        f"Multi-layer SAE of {model_name}",
        facts,
        notes,
        metrics.to_dataframe(),
        results,
        inputs.text_of,
        prompt,
        options.n_latents,
        list(options.analysis.latents or []),
    )


def _left_out(inputs: Inputs, options: Options) -> tuple[list[int], list[str]]:
    """Positions that are left out, and what the page says of it."""
    notes: list[str] = []
    if inputs.exclude_tokens:
        notes.append(
            f"{len(inputs.exclude_tokens)} special tokens of the tokenizer are left "
            "out everywhere."
        )
    given = options.analysis.exclude_positions
    if given:
        notes.append(f"Positions {given} of each prompt are left out, as asked for.")
        return given, notes
    names = hook_names_of(inputs.sae)
    some = inputs.tokens[: options.text.batch_size_prompts]
    ratio = first_position_ratio(inputs.model, names, some)
    if ratio < _SINK_RATIO:
        return [], notes
    notes.append(
        f"Position 0 of each prompt is left out: its vectors are up to {ratio:.0f} "
        "times as long as those of other positions, as the model attends to it when it "
        "has nothing to attend to, and would decide every average. When layers are "
        "replaced it keeps its own vectors."
    )
    return [0], notes
