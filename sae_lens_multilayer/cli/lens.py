"""Fit a tuned lens."""

from dataclasses import dataclass
from typing import Literal

from sae_lens.saes.sae import SAEMetadata

from sae_lens_multilayer import hooks
from sae_lens_multilayer.cli.inputs import (
    ModelOptions,
    TextOptions,
    load_model,
    text_of,
)
from sae_lens_multilayer.cli.parsing import new_folder, parse
from sae_lens_multilayer.lens.fit import fit_tuned_lens
from sae_lens_multilayer.text.text import check_n_tokens


@dataclass
class Options:
    """How the lens is fitted."""

    model: ModelOptions
    text: TextOptions
    output_path: str = "lens"
    """New folder for the lens, in tuned-lens' format."""
    hook_name: str = hooks.DEFAULT_HOOK_NAME
    """Template of the hook after a block; for AutoModelForCausalLM such as
    model.layers.{layer}"""
    n_steps: int = 250
    """Optimiser steps."""
    n_prompts_per_step: int | None = None
    """Prompts in a step; None: 2**18 tokens' worth, or all if they are fewer."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """The paper's is sgd."""
    lr: float | None = None
    """Largest learning rate; None: 1.0 for SGD and 1e-3 for Adam."""
    seed: int = 0
    """Of the order of the prompts."""


def lens(arguments: list[str]) -> None:
    """Fit a tuned lens to a model, to train an SAE with."""
    options = parse(lens, Options, arguments)
    output = new_folder(options.output_path)
    check_n_tokens(options.text.n_tokens)
    text = text_of(SAEMetadata(), options.text)
    model = load_model(SAEMetadata(), options.model, hook_name=options.hook_name)
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
    print(f"Written: {output}. Train with --tuned_lens.")
