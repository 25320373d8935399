"""Fits a lens of any kind."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from simple_parsing import field as option

from sae_lens_multilayer.cli.outputs import new_file, new_folder
from sae_lens_multilayer.config import MultiLayerConfig
from sae_lens_multilayer.config_files import config_from_settings, read_settings_file
from sae_lens_multilayer.files import save_somewhere
from sae_lens_multilayer.lens.config import LensKind
from sae_lens_multilayer.lens.fit import fit_tuned_lens
from sae_lens_multilayer.lens.jacobian import fit_jacobian_lens
from sae_lens_multilayer.lens.progress import remove_finished
from sae_lens_multilayer.models import loading
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.text.prompts import Text
from sae_lens_multilayer.training.fit_lens import fit_lens

EXAMPLES = """examples:
  sae-lens-multilayer lens run.yaml --output_path lens
  sae-lens-multilayer lens run.yaml --kind whitening --output_path white
  sae-lens-multilayer lens run.yaml --kind jacobian --n_tokens 8192 \\
      --output_path jacobian.pt"""


@dataclass
class Options:
    """What is fitted, and where it is saved."""

    config: str = option(positional=True, metavar="config")
    """JSON or YAML file with fields of the config of a training run: its model, layers
    and dataset, or its cache of activations."""
    kind: LensKind = "tuned"
    """tuned, jacobian: of a model and a text; procrustes, least_squares, whitening: in
    closed form, of the vectors of the run or of its cache."""
    output_path: str = "lens"
    """New folder for the lens; for a Jacobian lens, a new file."""
    n_tokens: int = 65_536
    """Tokens of text to fit on."""
    shrinkage: float = 0.0
    """Closed form: covariances C become (1 - s) C + s tr(C) / d_in I."""
    skip_first_positions: int = 16
    """Jacobian lens: positions left out at the start of each prompt."""
    n_steps: int = 250
    """Tuned lens: optimiser steps."""
    n_prompts_per_step: int | None = None
    """Tuned lens: prompts in a step; None: 2**18 tokens' worth, or all if fewer."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Tuned lens: the paper uses sgd."""
    lr: float | None = None
    """Tuned lens: largest learning rate; None: 1.0 for SGD and 1e-3 for Adam."""
    seed: int = 0
    """Tuned lens: seed of the order of the prompts."""


def run(options: Options) -> None:
    """Run the command."""
    remove_finished(Path(options.output_path).expanduser())
    new = new_file if options.kind == "jacobian" else new_folder
    output = new(options.output_path)
    cfg = config_from_settings(read_settings_file(options.config))
    if options.kind in ("tuned", "jacobian"):
        _fit_on_text(cfg, options, output)
    else:
        lens = fit_lens(
            cfg, options.kind, options.n_tokens, shrinkage=options.shrinkage
        )
        output = save_somewhere(output, lens.save)
    print(f"Written: {output}. Train with --lens {output}")


def _fit_on_text(cfg: MultiLayerConfig[Any], options: Options, output: Path) -> None:
    model = loading.load_by_name(*cfg.named_model, cfg.llm_device)
    prompts = Text.from_config(cfg).prompts(model, options.n_tokens)
    if options.kind == "jacobian":
        # A layer that the run leaves out may have a matrix that cannot be inverted.
        n_layers = as_model(model).shape.n_layers
        fit_jacobian_lens(
            model,
            prompts,
            cfg.resolve_hook_names(n_layers),
            skip_first_positions=options.skip_first_positions,
            output_path=output,
        )
        return
    fit_tuned_lens(
        model,
        prompts.ids,
        n_steps=options.n_steps,
        batch_size_prompts=options.n_prompts_per_step,
        forward_batch_size_prompts=cfg.store_batch_size_prompts,
        optimizer=options.optimizer,
        lr=options.lr,
        seed=options.seed,
        output_path=output,
    )
