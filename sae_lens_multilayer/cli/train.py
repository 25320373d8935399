"""Trains an SAE: every field of the config is an option."""

import argparse
from dataclasses import field, make_dataclass
from typing import Any

from sae_lens import LoggingConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from sae_lens_multilayer.cli import COMMANDS, PROG
from sae_lens_multilayer.cli.parser import Parser, with_underscores
from sae_lens_multilayer.config import MultiLayerConfig
from sae_lens_multilayer.config_files import (
    config_from_settings,
    mapping,
    read_settings_file,
    sae_config_class,
)
from sae_lens_multilayer.sae.config import ARCHITECTURE
from sae_lens_multilayer.training.runner import MultiLayerSAETrainingRunner

_FOLLOWS = {"device": ("llm_device", "act_store_device"), "lr": ("lr_end",)}
"""Fields of a saved config that are derived from another, and anew if that is given."""

EXAMPLES = """examples:
  sae-lens-multilayer train --config run.yaml --k 64 --output_path output
  torchrun --nproc_per_node 8 -m sae_lens_multilayer train --config run.yaml"""

SUMMARIES = {
    "config": "JSON or YAML file with settings, such as a saved runner_cfg.json.",
    "architecture": f"Kind of SAE, whose settings are options ({ARCHITECTURE}).",
    "help_all": "Show all options, which are the fields of the configs.",
    "help": "Show this help.",
    "model_name": "Name of the model, or its folder.",
    "model_class_name": "HookedTransformer, TransformerBridge, AutoModelForCausalLM.",
    "hook_name": "Template of hook names with {layer} for the block number.",
    "layers": "Block numbers; all blocks if not given.",
    "lens": "Lens to train in the space of: a folder or a name.",
    "dataset_path": "Name on the Hugging Face hub, or a file or folder.",
    "context_size": "Tokens in a prompt (128).",
    "exclude_special_tokens": "Do not train on the tokenizer's special tokens.",
    "use_cached_activations": "Train on a cache that the command `cache` wrote.",
    "cached_activations_path": "Folder of the cache.",
    "training_tokens": "Tokens of text; each gives one vector per layer.",
    "train_batch_size_tokens": "Tokens of text in a batch (4,096).",
    "lr": "Learning rate (1e-4).",
    "device": "Device of the SAE, and of the model unless --llm_device.",
    "seed": "Seed of the weights and the order of the data.",
    "output_path": "New folder for the trained SAE (output).",
    "checkpoint_path": "Folder for checkpoints (checkpoints).",
    "n_checkpoints": "Number of checkpoints (0).",
    "resume_from_checkpoint": 'Folder of a checkpoint, or "latest".',
    "d_in": "Width of the vectors.",
    "d_sae": "Number of latents.",
    "k": "Latents active for each vector.",
    "log_to_wandb": "Log to Weights & Biases (true).",
    "run_name": "Name of the run in the log.",
}
"""Texts for the options that most runs set; `--help` shows these."""


def run(arguments: list[str]) -> None:
    """Run the command."""
    MultiLayerSAETrainingRunner(parse_config(arguments)).run()


def parse_config(arguments: list[str]) -> MultiLayerConfig[Any]:
    """The config of a run; options replace settings of the file `--config`."""
    arguments = [with_underscores(argument) for argument in arguments]
    first = argparse.ArgumentParser(prog=f"{PROG} train", add_help=False)
    _add_first_options(first)
    options, rest = first.parse_known_args(arguments)
    settings = {} if options.config is None else read_settings_file(options.config)
    in_file = mapping(settings, "sae").get("architecture", ARCHITECTURE)
    architecture = options.architecture or in_file
    found: Any = parser_of(architecture).parse_args(rest)
    given: dict[str, Any] = getattr(found, "given", {})
    derived = {
        name for source in _FOLLOWS if source in given for name in _FOLLOWS[source]
    }
    settings = {name: value for name, value in settings.items() if name not in derived}
    for name in ("sae", "logger"):
        given[name] = {**mapping(settings, name), **given.get(name, {})}
    given["sae"]["architecture"] = architecture
    return config_from_settings({**settings, **given})


def _add_first_options(parser: argparse.ArgumentParser) -> None:
    """Add the options on which the others depend."""
    parser.add_argument("--config", metavar="file")
    kinds = sorted(SAE_TRAINING_CLASS_REGISTRY)
    parser.add_argument("--architecture", choices=kinds, metavar="name")


def parser_of(architecture: str) -> Parser:
    """The parser of the settings of a run with an SAE of this architecture."""
    parser = Parser(f"{PROG} train", COMMANDS["train"], EXAMPLES, SUMMARIES)
    _add_first_options(parser)
    only_given: Any = argparse.SUPPRESS  # typed too narrowly
    parser.add_arguments(_options(architecture), dest="given", default=only_given)
    return parser


def _options(architecture: str) -> type:
    """The config's fields with types that a command line can give."""
    sizes = make_dataclass(
        "SAEConfig",
        [("d_in", int, field(default=512)), ("d_sae", int, field(default=64 * 512))],
        bases=(sae_config_class(architecture),),
        namespace={"__doc__": f"The SAE, of the architecture {architecture!r}."},
    )
    # Without a docstring, the help would show all fields in one line.
    logger = make_dataclass(
        "LoggingConfig",
        [],
        bases=(LoggingConfig,),
        namespace={"__doc__": "What is logged to Weights & Biases."},
    )
    return make_dataclass(
        "MultiLayerConfig",
        [
            ("sae", sizes, field(default_factory=sizes)),
            ("logger", logger, field(default_factory=logger)),
            ("lens", str | None, field(default=None)),
        ],
        bases=(MultiLayerConfig,),
        namespace={"__doc__": "The model, the text and the training."},
    )
