"""Train an SAE: every field of the config is an option."""

import argparse
from dataclasses import field, make_dataclass
from typing import Any

from sae_lens import LoggingConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from simple_parsing import ArgumentParser

from sae_lens_multilayer.cli.parsing import PROG, help_of
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
"""Fields that a saved config took from another; they follow it if it is given."""


def train(arguments: list[str]) -> None:
    """Train one SAE on many layers of a model, and save it.

    Options are the fields of `MultiLayerConfig`, of the SAE's config and of SAELens'
    `LoggingConfig`; those that are given win over those of the file `--config`.
    """
    MultiLayerSAETrainingRunner(parse_config(arguments)).run()


def parse_config(arguments: list[str]) -> MultiLayerConfig[Any]:
    """The config of a run from its options.

    Raises:
        ValueError: If a setting is unknown or wrong.
        FileNotFoundError: If the file is not there.
    """
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
    if not isinstance(settings, dict):
        raise ValueError(f"{options.config} must hold names and values.")
    in_file = mapping(settings, "sae").get("architecture", ARCHITECTURE)
    architecture = options.architecture or in_file
    # Both are typed more narrowly than they are: parents may be argparse's.
    parents: Any = [first]
    only_given: Any = argparse.SUPPRESS
    parser = ArgumentParser(
        prog=f"{PROG} train", description=help_of(train), parents=parents
    )
    # Only what is given comes back, so that the rest can come from the file.
    parser.add_arguments(_options(architecture), dest="given", default=only_given)
    found: Any = parser.parse_args(rest)
    given: dict[str, Any] = getattr(found, "given", {})
    for name, from_it in _FOLLOWS.items():
        if name in given:
            settings = {k: v for k, v in settings.items() if k not in from_it}
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
    # Without a docstring, a dataclass has all of its fields in one line as its own.
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
