"""Trains an SAE: every field of the config is an option."""

import argparse
from dataclasses import field, make_dataclass
from typing import Any

from sae_lens import LoggingConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from simple_parsing import ArgumentParser

from sae_lens_multilayer.cli import COMMANDS, PROG
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


def run(arguments: list[str]) -> None:
    """Run the command."""
    MultiLayerSAETrainingRunner(parse_config(arguments)).run()


def parse_config(arguments: list[str]) -> MultiLayerConfig[Any]:
    """The config of a run; options replace settings of the file `--config`."""
    first = argparse.ArgumentParser(prog=f"{PROG} train", add_help=False)
    first.add_argument(
        "--config",
        help="JSON or YAML file with fields of the config, such as a runner_cfg.json",
    )
    first.add_argument(
        "--architecture",
        choices=sorted(SAE_TRAINING_CLASS_REGISTRY),
        help=f"the kind of SAE, whose fields are options; {ARCHITECTURE} by default",
    )
    options, rest = first.parse_known_args(arguments)
    settings = {} if options.config is None else read_settings_file(options.config)
    in_file = mapping(settings, "sae").get("architecture", ARCHITECTURE)
    architecture = options.architecture or in_file
    # Typed too narrowly: parents may be argparse's, and the default a constant.
    parents: Any = [first]
    only_given: Any = argparse.SUPPRESS
    parser = ArgumentParser(
        prog=f"{PROG} train", description=COMMANDS["train"], parents=parents
    )
    parser.add_arguments(_options(architecture), dest="given", default=only_given)
    found: Any = parser.parse_args(rest)
    given: dict[str, Any] = getattr(found, "given", {})
    derived = {
        name for source in _FOLLOWS if source in given for name in _FOLLOWS[source]
    }
    settings = {name: value for name, value in settings.items() if name not in derived}
    for name in ("sae", "logger"):
        given[name] = {**mapping(settings, name), **given.get(name, {})}
    given["sae"]["architecture"] = architecture
    return config_from_settings({**settings, **given})


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
            ("tuned_lens", str | None, field(default=None)),
        ],
        bases=(MultiLayerConfig,),
        namespace={"__doc__": "The model, the text and the training."},
    )
