"""Evaluates an SAE."""

from dataclasses import dataclass, field

from sae_lens_multilayer.cli.options import (
    Inputs,
    ModelOptions,
    SAEOptions,
    TextOptions,
)
from sae_lens_multilayer.cli.outputs import new_file, write_new
from sae_lens_multilayer.cli.tables import print_numbers, print_table
from sae_lens_multilayer.evaluation.evaluation import Ablation, evaluate
from sae_lens_multilayer.hooks import layer_labels

_SHOWN = ["fvu", "mse", "l0", "silent_fraction", "delta_ce", "kl_div", "ce_loss_score"]

EXAMPLES = """examples:
  sae-lens-multilayer evaluate output --dataset_path held-out.jsonl
  sae-lens-multilayer evaluate mlsae-pythia-70m-deduped --sae_id x64-k32 \\
      --dataset_path held-out.jsonl --output_path evaluation.csv"""


@dataclass
class Options:
    """What is measured."""

    sae: SAEOptions
    model: ModelOptions
    text: TextOptions
    exclude_positions: list[int] = field(default_factory=list)
    """Positions in a prompt that keep their own vectors and are excluded from all
    averages: 0 if the vectors of the first position are many times longer than all
    others."""
    keep_positions: list[int] = field(default_factory=list)
    """Positions in a prompt that keep their own vectors and are excluded from the
    metrics of reconstruction."""
    ablation: Ablation = "zero"
    """Replacement of a layer's vectors in the ablated runs."""
    together: bool = False
    """Measure one more run with all layers replaced at once."""
    output_path: str | None = None
    """New CSV file for the table."""


def run(options: Options) -> None:
    """Run the command."""
    file = None if options.output_path is None else new_file(options.output_path)
    inputs = Inputs.load(options)
    inputs.warn_of_first_position([*options.exclude_positions, *options.keep_positions])
    metrics = evaluate(
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
    by_layer = table[_SHOWN].set_axis(layer_labels(metrics.hook_names))
    print_table(by_layer)
    print(f"\nMean over layers, {inputs.prompts.ids.numel():,} tokens of text:")
    print_numbers(metrics.mean())
    if metrics.together is not None:
        print("\nAll layers replaced at once:")
        print_numbers(metrics.together)
    if file is None:
        print("\nNot saved: --output_path writes the table with all columns.")
    else:
        write_new(file, table.to_csv())
