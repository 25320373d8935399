"""Harvest a cache of activations."""

from dataclasses import dataclass

from simple_parsing import field as option

from sae_lens_multilayer.cli.parsing import parse
from sae_lens_multilayer.config_files import config_from_settings, read_settings_file
from sae_lens_multilayer.store.harvest import MultiLayerCacheActivationsRunner


@dataclass
class Options:
    """What is cached, and where."""

    config: str = option(positional=True, metavar="config")
    """JSON or YAML file with fields of the config of a training run: its model, layers,
    dataset, `training_tokens` (all of them are cached) and `dtype`."""
    output: str | None = None
    """Folder of the cache; left out: the config's `cached_activations_path`. Where a
    harvest was interrupted there, it goes on."""


def cache(arguments: list[str]) -> None:
    """Harvest the activations of a run's text to disk, to train on them many times."""
    options = parse(cache, Options, arguments)
    settings = read_settings_file(options.config)
    if not isinstance(settings, dict):
        raise ValueError(f"{options.config} must hold names and values.")
    if options.output is not None:
        settings = {**settings, "cached_activations_path": options.output}
    harvested = MultiLayerCacheActivationsRunner(config_from_settings(settings)).run()
    print(
        f"Written: {harvested.path}, {harvested.n_tokens:,} tokens. Train with "
        f"--use_cached_activations true --cached_activations_path {harvested.path}"
    )
