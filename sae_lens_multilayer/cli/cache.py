"""Stores a cache of activations."""

from dataclasses import dataclass

from simple_parsing import field as option

from sae_lens_multilayer.config_files import config_from_settings, read_settings_file
from sae_lens_multilayer.store.harvest import MultiLayerCacheActivationsRunner

EXAMPLES = """example:
  sae-lens-multilayer cache run.yaml --output vectors"""


@dataclass
class Options:
    """What is cached, and where."""

    config: str = option(positional=True, metavar="config")
    """JSON or YAML file with fields of the config of a training run: its model, layers,
    dataset, `training_tokens` (all of them are cached) and `dtype`."""
    output: str | None = None
    """Folder of the cache; default: the config's `cached_activations_path`. An
    interrupted run is resumed there."""


def run(options: Options) -> None:
    """Run the command."""
    settings = read_settings_file(options.config)
    if options.output is not None:
        settings["cached_activations_path"] = options.output
    cache = MultiLayerCacheActivationsRunner(config_from_settings(settings)).run()
    print(
        f"Written: {cache.path}, {cache.n_tokens:,} tokens. Train with "
        f"--use_cached_activations true --cached_activations_path {cache.path}"
    )
