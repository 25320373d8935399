"""Run the analyses of an SAE."""

from dataclasses import dataclass, field
from typing import get_args

import pandas as pd
from simple_parsing import field as option

from sae_lens_multilayer.analysis import (
    Comparison,
    Suite,
    save_results,
)
from sae_lens_multilayer.analysis.suite import Analysis
from sae_lens_multilayer.cli.analysis_folder import write_record
from sae_lens_multilayer.cli.inputs import (
    Inputs,
    ModelOptions,
    SAEOptions,
    TextOptions,
    load_inputs,
    load_sae,
    warn_of_first_position,
)
from sae_lens_multilayer.cli.parsing import new_folder, parse
from sae_lens_multilayer.files import complete_or_absent, free_path
from sae_lens_multilayer.pictures import draw, pictures_of, save_figure


@dataclass
class AnalysisOptions:
    """How the analyses go over the tokens."""

    exclude_positions: list[int] = field(default_factory=list)
    """Positions in a prompt that are left out: 0 where the vectors of the first
    position are many times longer than all others."""
    latents: list[int] | None = None
    """Latents whose token classes are looked at; None: the most active ones."""
    n_examples: int = 8
    """Examples to keep of each latent at each layer."""
    single_layers: list[str] = field(default_factory=list)
    """Folders of SAEs of single layers, to compare with: FVU, delta CE and KL at their
    layers, and their FVU at the others (the transfer matrix)."""


@dataclass
class Options:
    """What is analysed."""

    sae: SAEOptions
    model: ModelOptions
    text: TextOptions
    analysis: AnalysisOptions
    analyses: list[str] = option(  # noqa: RUF009  (it makes a field, with a help)
        default_factory=lambda: ["all"],
        help=f"Any of {', '.join(get_args(Analysis))}, as the folders that are written;"
        " all: every one that the SAE allows. The evaluation takes longest.",
    )
    output_path: str = "analyses"
    """New folder for the results and pictures."""


def analyze(arguments: list[str]) -> None:
    """Run analyses of an SAE, and write results and pictures."""
    options = parse(analyze, Options, arguments)
    if not options.analyses:
        raise ValueError("`analyses` must name at least one analysis, or be all.")
    output = new_folder(options.output_path)
    inputs = load_inputs(options.sae, options.model, options.text)
    warn_of_first_position(inputs, options.text, options.analysis.exclude_positions)
    names = None if options.analyses == ["all"] else options.analyses
    results = suite_of(inputs, options.text, options.analysis).run(names)
    output = free_path(output)
    with complete_or_absent(output) as folder:
        save_results(results, folder, inputs.model.tokenizer)
        write_record(folder, inputs, options)
        for name, result in results.items():
            pictures = pictures_of(name, result, inputs.text_of)
            for file_name, picture in pictures.items():
                save_figure(draw(picture), folder / f"{file_name}.png")
    for name, result in results.items():
        if isinstance(result, Comparison):
            columns = ["fvu", "delta_ce", "kl_div"]
            table: pd.DataFrame = result.to_dataframe().loc[:, columns]
            print(table.to_string(float_format="{:.4f}".format))
        print(f"Written: {output / name}, a {type(result).__name__}")


def suite_of(inputs: Inputs, text: TextOptions, options: AnalysisOptions) -> Suite:
    """The analyses as the options want them."""
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
