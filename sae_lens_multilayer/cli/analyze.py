"""Runs analyses of an SAE; a report can be made from the folder they are saved in."""

import logging
import textwrap
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from sae_lens_multilayer.analysis import ANALYSES, Null, Suite, save_results
from sae_lens_multilayer.cli.options import (
    Inputs,
    ModelOptions,
    SAEOptions,
    TextOptions,
)
from sae_lens_multilayer.cli.outputs import new_folder
from sae_lens_multilayer.cli.tables import print_table
from sae_lens_multilayer.files import complete_or_absent, save_somewhere
from sae_lens_multilayer.pictures import draw, pictures_of, save_figure
from sae_lens_multilayer.published.saved_sae import load_sae
from sae_lens_multilayer.record import Record, sae_hash

logger = logging.getLogger(__name__)

KIND = "analyses"

_WITHOUT_EFFECT = ("device", "batch_size_prompts", "trust_remote_code")
_RECORDED = ("model", "text", "analysis")
T = TypeVar("T")

EXAMPLES = """example:
  sae-lens-multilayer analyze output --dataset_path held-out.jsonl \\
      --analyses variances redundancy --exclude_positions 0"""


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
    null: Null | None = None
    """Analyse a null, to compare with: a model with random weights, the layers of each
    token shuffled, or latents exchanged with others of about the same frequency."""


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


def help_epilog() -> str:
    """The list of analyses, for the help."""
    names = textwrap.fill(", ".join(ANALYSES), 76)
    return f"analyses:\n{textwrap.indent(names, '  ')}\n\n"


def run(options: Options) -> None:
    """Run the command."""
    output = new_folder(options.output_path)
    inputs = Inputs.load(options)
    inputs.warn_of_first_position(options.analysis.exclude_positions)
    names = None if options.analyses == ["all"] else options.analyses
    results = suite_of(inputs, options).run(names)
    for name, result in results.items():
        if table := ANALYSES[name].table:
            print_table(table(result))
    output = save_somewhere(output, lambda path: _write(results, path, inputs, options))
    for name, result in results.items():
        print(f"{name}: {type(result).__name__}")
    print(f"Written: {output}, a folder and pictures for each result.")


def suite_of(inputs: Inputs, options: Any) -> Suite:
    """The suite for options that have `text` and `analysis`."""
    analysis: AnalysisOptions = options.analysis
    device = str(inputs.sae.device)
    return Suite(
        inputs.sae,
        inputs.model,
        inputs.prompts,
        latents=analysis.latents,
        n_examples=analysis.n_examples,
        single_layers=[load_sae(path, None, device) for path in analysis.single_layers],
        batch_size_prompts=options.text.batch_size_prompts,
        exclude_positions=analysis.exclude_positions,
        null=analysis.null,
    )


def _write(
    results: dict[str, Any], output: Path, inputs: Inputs, options: Options
) -> None:
    settings = {name: _settings(getattr(options, name)) for name in _RECORDED}
    with complete_or_absent(output) as folder:
        save_results(results, folder, inputs.model.tokenizer)
        Record(KIND, settings, _fingerprints(inputs)).write(folder)
        try:
            for name, picture in pictures_of(results, text_of=inputs.text_of).items():
                save_figure(draw(picture), folder / f"{name}.png")
        except (ValueError, RuntimeError, TypeError):
            logger.exception("A picture failed; the results are saved without it.")


def with_saved_settings(folder: str | Path, options: T) -> T:
    """Options with the values that the analyses in a folder were run with."""
    saved, given = Record.read(folder, KIND).settings, vars(options)
    parts = {name: _as_saved(given[name], saved[name], folder) for name in _RECORDED}
    return type(options)(**{**given, **parts})


def check_same_inputs(folder: str | Path, inputs: Inputs) -> None:
    """Raise ValueError unless a folder's analyses are of this SAE and these tokens."""
    wanted = Record(KIND, {}, _fingerprints(inputs))
    advice = "Give the SAE and the text of these analyses."
    Record.read_same(folder, wanted, advice).warn_of_versions(Path(folder))


def _as_saved(given: Any, saved: dict[str, Any], folder: str | Path) -> Any:
    default, mine = _settings(type(given)()), _settings(given)
    for name, value in saved.items():
        if mine[name] not in (default[name], value):
            raise ValueError(
                f"--{name} was {value!r} for the analyses in {folder}; got "
                f"{mine[name]!r}."
            )
    return replace(given, **saved)


def _settings(options: Any) -> dict[str, Any]:
    """Options on which a result depends, with absolute paths."""
    values = vars(options).items()
    return {n: _absolute(v) for n, v in values if n not in _WITHOUT_EFFECT}


def _absolute(value: Any) -> Any:
    if isinstance(value, list):
        return [_absolute(one) for one in value]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, str) and Path(value).expanduser().exists():
        return str(Path(value).expanduser().resolve())
    return value


def _fingerprints(inputs: Inputs) -> dict[str, str]:
    return {"SAE": sae_hash(inputs.sae), "text": inputs.prompts.fingerprint}
