"""Fits a tuned lens."""

from dataclasses import dataclass
from typing import Literal

from sae_lens.saes.sae import SAEMetadata

from sae_lens_multilayer.cli.options import ModelOptions, TextOptions
from sae_lens_multilayer.cli.outputs import new_folder
from sae_lens_multilayer.lens.fit import fit_tuned_lens

EXAMPLES = """example:
  sae-lens-multilayer lens --model_name pythia-70m-deduped \\
      --dataset_path text.jsonl --context_size 2048"""


@dataclass
class Options:
    """How the lens is fitted."""

    model: ModelOptions
    text: TextOptions
    output_path: str = "lens"
    """New folder for the lens, in tuned-lens' format."""
    n_steps: int = 250
    """Optimiser steps."""
    n_prompts_per_step: int | None = None
    """Prompts in a step; None: 2**18 tokens' worth, or all if they are fewer."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """The paper uses sgd."""
    lr: float | None = None
    """Largest learning rate; None: 1.0 for SGD and 1e-3 for Adam."""
    seed: int = 0
    """Seed of the order of the prompts."""


def run(options: Options) -> None:
    """Run the command."""
    output = new_folder(options.output_path)
    options.model.check_device()
    text = options.text.text(SAEMetadata())
    model = options.model.load(SAEMetadata(), hook_names=None)
    fit_tuned_lens(
        model,
        text.prompts(model, options.text.n_tokens).ids,
        n_steps=options.n_steps,
        batch_size_prompts=options.n_prompts_per_step,
        forward_batch_size_prompts=options.text.batch_size_prompts,
        optimizer=options.optimizer,
        lr=options.lr,
        seed=options.seed,
        output_path=output,
    )
    print("Train with --lens and this folder.")
