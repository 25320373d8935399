"""Run the analyses of an SAE."""

import logging
from dataclasses import dataclass, field

from sae_lens_multilayer.analysis import (
    ANALYSES,
    Suite,
    save_results,
)
from sae_lens_multilayer.cli.analysis_folder import write_record
from sae_lens_multilayer.cli.inputs import (
    Inputs,
    ModelOptions,
    SAEOptions,
    TextOptions,
    load_inputs,
    load_sae,
)
from sae_lens_multilayer.cli.parsing import new_folder, parse
from sae_lens_multilayer.files import complete_or_absent, free_path
from sae_lens_multilayer.pictures import draw, pictures_of, save_figure

logger = logging.getLogger(__name__)


@dataclass
class AnalysisOptions:
    """Options of the analyses."""

    exclude_positions: list[int] = field(default_factory=list)
    """Positions in a prompt to exclude: 0 if the vectors of the first position are many
    times longer than all others."""
    latents: list[int] | None = None
    """Latents for token_classes; None: the most active ones."""
    n_examples: int = 8
    """Examples to keep for each latent and layer."""
    single_layers: list[str] = field(default_factory=list)
    """Folders of single-layer SAEs, for single_layer_comparison and transfer_matrix."""


@dataclass
class Options:
    """Options of `analyze`."""

    sae: SAEOptions
    model: ModelOptions
    text: TextOptions
    analysis: AnalysisOptions
    analyses: list[str] = field(default_factory=lambda: ["all"])
    """Analyses from the list below, or all that are available. The evaluation takes the
    longest."""
    output_path: str = "analyses"
    """New folder for the results, one folder each, and their pictures."""


def analyze(arguments: list[str]) -> None:
    """Run analyses of an SAE, and write results and pictures."""
    options = parse(analyze, Options, arguments, epilog=_list_of_analyses())
    if not options.analyses:
        raise ValueError("`analyses` must name at least one analysis, or be all.")
    output = new_folder(options.output_path)
    inputs = load_inputs(options.sae, options.model, options.text)
    if warning := inputs.first_position_warning(options.analysis.exclude_positions):
        logger.warning("%s --exclude_positions 0 excludes it.", warning)
    names = None if options.analyses == ["all"] else options.analyses
    results = suite_of(inputs, options.text, options.analysis).run(names)
    output = free_path(output)
    with complete_or_absent(output) as folder:
        save_results(results, folder, inputs.model.tokenizer)
        write_record(folder, inputs, options)
        for name, picture in pictures_of(results, text_of=inputs.text_of).items():
            save_figure(draw(picture), folder / f"{name}.png")
    for name, result in results.items():
        if table := ANALYSES[name].table:
            print(table(result).to_string(float_format="{:.4f}".format))
        print(f"Written: {output / name}, a {type(result).__name__}")


def _list_of_analyses() -> str:
    lines = ["analyses:"]
    for name, row in ANALYSES.items():
        needs = ", ".join(need.description for need in row.needs)
        lines.append(f"  {name:28}needs {needs}" if needs else f"  {name}")
    return "\n".join(lines)


def suite_of(inputs: Inputs, text: TextOptions, options: AnalysisOptions) -> Suite:
    """The suite for these options."""
    device = str(inputs.sae.device)
    return Suite(
        inputs.sae,
        inputs.model,
        inputs.prompts,
        latents=options.latents,
        n_examples=options.n_examples,
        single_layers=[
            load_sae(SAEOptions(folder), device) for folder in options.single_layers
        ],
        batch_size_prompts=text.batch_size_prompts,
        exclude_positions=options.exclude_positions,
    )
