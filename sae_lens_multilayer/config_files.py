"""Settings of runs from JSON and YAML files."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml
from sae_lens import LoggingConfig, TrainingSAEConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from sae_lens_multilayer.config import MultiLayerConfig
from sae_lens_multilayer.hooks import unknown_name
from sae_lens_multilayer.sae.config import ARCHITECTURE


class _Loader(yaml.SafeLoader):
    """Reads numbers as YAML 1.2: PyYAML reads `1e-4`, without a point, as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_settings_file(path: str | Path) -> dict[str, Any]:
    """Read names and values from a JSON or YAML file, such as a `runner_cfg.json`."""
    path = Path(path).expanduser()
    try:
        text = path.read_text()
        is_json = path.suffix == ".json"
        settings = json.loads(text) if is_json else yaml.load(text, _Loader)  # safe
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold names and values; got {settings!r:.80}.")
    return settings  # pyright: ignore[reportUnknownVariableType]


def config_from_settings(settings: dict[str, Any]) -> MultiLayerConfig[Any]:
    """The config of a new run from plain values; missing ones have their defaults.

    `sae` and `logger` hold the fields of their own configs.
    """
    sae = {"architecture": ARCHITECTURE, **mapping(settings, "sae")}
    logger = mapping(settings, "logger")
    known_of_sae = [f.name for f in fields(sae_config_class(sae["architecture"]))]
    check_known(settings, [field.name for field in fields(MultiLayerConfig)])
    check_known(sae, ["architecture", *known_of_sae])
    check_known(logger, [field.name for field in fields(LoggingConfig)])
    missing = [name for name in ("d_in", "d_sae") if name not in sae]
    if missing:
        raise ValueError(f"The SAE needs `d_in` and `d_sae`; {missing} must be given.")
    cfg = MultiLayerConfig.from_dict({**settings, "sae": sae, "logger": logger})
    if settings.get("checkpoint_path") is not None:
        # `from_dict` keeps it, as of a resumed run; a new run has its own folder in it.
        run_id = cfg.logger.wandb_id or uuid4().hex[:8]
        cfg.checkpoint_path = str(Path(settings["checkpoint_path"]) / run_id)
    return cfg


def check_known(given: Sequence[str] | dict[str, Any], known: Sequence[str]) -> None:
    """Raise ValueError if a name is unknown; lists the nearest ones."""
    for name in given:
        if name not in known:
            raise unknown_name("There is no setting", name, known)


def sae_config_class(architecture: str) -> type[TrainingSAEConfig]:
    """The training config of an architecture."""
    if architecture not in SAE_TRAINING_CLASS_REGISTRY:
        raise ValueError(
            f"`architecture` must be one of {sorted(SAE_TRAINING_CLASS_REGISTRY)}; "
            f"got {architecture!r}."
        )
    return SAE_TRAINING_CLASS_REGISTRY[architecture][1]


def mapping(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The names and values under a name; empty if it is missing."""
    value: Any = settings.get(name, {})
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` must hold names and values; got {value!r}.")
    return value
