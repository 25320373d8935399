"""Evaluate an SAE."""

import logging
from dataclasses import dataclass, field

from sae_lens_multilayer.cli.inputs import (
    ModelOptions,
    SAEOptions,
    TextOptions,
    load_inputs,
)
from sae_lens_multilayer.cli.parsing import new_file, parse, write_new
from sae_lens_multilayer.evaluation.evaluation import Ablation
from sae_lens_multilayer.evaluation.evaluation import evaluate as evaluate_sae

logger = logging.getLogger(__name__)


@dataclass
class Options:
    """What is measured."""

    sae: SAEOptions
    model: ModelOptions
    text: TextOptions
    exclude_positions: list[int] = field(default_factory=list)
    """Positions in a prompt that keep their own vectors and are left out of all
    averages: 0 where the vectors of the first position are many times longer than all
    others."""
    keep_positions: list[int] = field(default_factory=list)
    """Positions in a prompt that keep their own vectors and are left out of the metrics
    of reconstruction."""
    ablation: Ablation = "zero"
    """What the ablated runs replace a layer's vectors by."""
    together: bool = False
    """Measure one more run with all layers replaced at once."""
    output_path: str | None = None
    """New CSV file for the table."""


def evaluate(arguments: list[str]) -> None:
    """Splice an SAE into each layer and compare with the clean run."""
    options = parse(evaluate, Options, arguments)
    path = new_file(options.output_path, ".csv")
    inputs = load_inputs(options.sae, options.model, options.text)
    left_out = [*options.exclude_positions, *options.keep_positions]
    if warning := inputs.first_position_warning(left_out):
        logger.warning("%s --exclude_positions 0 excludes it.", warning)
    metrics = evaluate_sae(
        inputs.sae,
        inputs.model,
        inputs.prompts,
        batch_size_prompts=options.text.batch_size_prompts,
        exclude_positions=options.exclude_positions,
        keep_positions=options.keep_positions,
        ablation=options.ablation,
        together="all" if options.together else None,
    )
    table = metrics.to_dataframe()
    print(table.to_string(float_format="{:.4f}".format))
    print(f"\nMean over layers, {inputs.prompts.ids.numel():,} tokens of text:")
    print(metrics.mean().round(4).to_string())
    if metrics.together is not None:
        print("\nAll layers replaced at once:")
        for name, value in metrics.together.items():
            print(f"{name}  {value:.4f}")
    if path is not None:
        write_new(path, table.to_csv())
