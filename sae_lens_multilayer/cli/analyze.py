"""Run the analyses of an SAE."""

from dataclasses import dataclass, field
from typing import Any, get_args

import pandas as pd
from simple_parsing import field as option

from sae_lens_multilayer.analysis import (
    Comparison,
    Suite,
    TokenClasses,
    save_results,
)
from sae_lens_multilayer.analysis.layers_by_class import ClassKind
from sae_lens_multilayer.analysis.results import Result
from sae_lens_multilayer.analysis.suite import Analysis
from sae_lens_multilayer.cli.analysis_folder import write_settings
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
from sae_lens_multilayer.files import complete_or_absent
from sae_lens_multilayer.pictures.matplotlib_figures import (
    PLOTS,
    plot_token_classes,
    save_figure,
)


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
    with complete_or_absent(output) as folder:
        save_results(results, folder, inputs.model.tokenizer)
        write_settings(folder, inputs, options)
        for name, figure in _pictures(results, inputs).items():
            save_figure(figure, folder / f"{name}.png")
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
        inputs.tokens,
        latents=options.latents,
        n_examples=options.n_examples,
        single_layers=[
            load_sae(SAEOptions(folder), device) for folder in options.single_layers
        ],
        batch_size_prompts=text.batch_size_prompts,
        exclude_tokens=inputs.exclude_tokens,
        exclude_positions=options.exclude_positions,
    )


def _pictures(results: dict[str, Result], inputs: Inputs) -> dict[str, Any]:
    """The figure of each result that has one, by the name of its file."""
    figures: dict[str, Any] = {}
    for name, result in results.items():
        if isinstance(result, TokenClasses):
            for latent in result.latents.tolist():
                for kind in get_args(ClassKind):
                    figures[f"{name}_{latent}_{kind}"] = plot_token_classes(
                        result, latent, kind, token_texts=inputs.token_texts
                    )
        elif type(result) in PLOTS:
            figures[name] = PLOTS[type(result)](result)
    return figures
