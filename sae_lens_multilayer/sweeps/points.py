"""The points of a sweep: settings that vary -> configs of runs, each with a name."""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import quote

from sae_lens_multilayer.config import MultiLayerConfig, fields_of
from sae_lens_multilayer.config_files import (
    check_known,
    config_from_settings,
    mapping,
    sae_config_class,
)
from sae_lens_multilayer.models import loading
from sae_lens_multilayer.models.model import ModelShape
from sae_lens_multilayer.sae.config import ARCHITECTURE

SIZES = ("expansion_factor", "d_sae", "k")
"""Settings that are columns of every sweep's table."""
_SHORT = {"expansion_factor": "R", "k": "k"}
_OUTPUTS = fields_of("outputs")
_LONGEST_NAME = 100
_OF_RUN = [field.name for field in fields(MultiLayerConfig)]

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str
    """Name of its folder."""
    varied: dict[str, Any]
    """The settings in which it differs from the base, and their values."""
    cfg: MultiLayerConfig[Any]

    @property
    def model_key(self) -> str:
        """The same for all points that can share a loaded model."""
        names = fields_of("model", "model run")
        return json.dumps([getattr(self.cfg, name) for name in names])

    def setting(self, name: str) -> Any:
        """A setting as given to the point, or else as in its config."""
        if name in self.varied:
            return self.varied[name]
        sae: Any = self.cfg.sae
        if name == "expansion_factor":
            return sae.d_sae / sae.d_in
        if name == "architecture":
            return sae.architecture()
        return getattr(self.cfg if name in _OF_RUN else sae, name, None)


def grid(**values: Any) -> list[dict[str, Any]]:
    """Every combination of lists of values of settings, the last one varying fastest.

    Example:
        >>> grid(expansion_factor=[4, 8], k=[16])
        [{'expansion_factor': 4, 'k': 16}, {'expansion_factor': 8, 'k': 16}]
    """
    for name, given in values.items():
        if not isinstance(given, (list, tuple, range)) or not given:
            raise ValueError(f"`{name}` must be a list of values; got {given!r}.")
    combinations = itertools.product(*values.values())
    return [dict(zip(values, chosen, strict=True)) for chosen in combinations]


def combine(points: Sequence[Settings], others: Sequence[Settings]) -> list[Settings]:
    """Each point combined with each of the others; no setting may be in both."""
    combined: list[Settings] = []
    for point, other in itertools.product(points, others):
        if both := sorted(point.keys() & other.keys()):
            raise ValueError(f"`points` and `grid` must not both vary {both}.")
        one = {**point, **other}
        if "name" in point and other:
            one["name"] = f"{point['name']}_{point_name(other)}"
        combined.append(one)
    return combined


def make_points(
    base: Settings, points: Sequence[Settings], shape: ModelShape | None = None
) -> list[Point]:
    """The validated runs of a sweep (see there); `shape`: that of a given model."""
    made: list[Point] = []
    for point in points:
        varied = {name: value for name, value in point.items() if name != "name"}
        settings, name = _merge(base, varied, shape), point_name(point)
        log = {"run_name": name, **mapping(settings, "logger")}
        cfg = config_from_settings({**settings, "logger": log})
        made.append(Point(name, _flat(varied), cfg))
    names = [point.name for point in made]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"A sweep needs one or more points that differ; got {names}.")
    return made


def varied_settings(points: Sequence[Point]) -> list[str]:
    """The settings that any of the points sets."""
    return list(dict.fromkeys(name for point in points for name in point.varied))


def _merge(
    base: Settings, varied: Settings, shape: ModelShape | None
) -> dict[str, Any]:
    """The settings of a run, with those of its SAE in `sae`."""
    # Output paths in the base, such as those of a saved run's config, are not used.
    of_run, of_sae = _split({n: v for n, v in base.items() if n not in _OUTPUTS})
    changed_run, changed_sae = _split(varied)
    if changed_sae.keys() & {"expansion_factor", "d_sae"}:
        for name in ("expansion_factor", "d_sae"):
            of_sae.pop(name, None)
    of_run, of_sae = {**of_run, **changed_run}, {**of_sae, **changed_sae}
    sae_class = sae_config_class(of_sae.get("architecture", ARCHITECTURE))
    known = [*_OF_RUN, *(f.name for f in fields(sae_class))]
    check_known(of_sae, [*known, "architecture", "expansion_factor"])
    if "d_in" not in of_sae:
        found = shape or _named_shape(of_run)
        of_sae |= {} if found is None else {"d_in": found.d_model}
    return {**of_run, "sae": _with_d_sae(of_sae)}


def _split(settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a run without its SAE, and those of the SAE."""
    beside = {n: v for n, v in settings.items() if n not in _OF_RUN}
    of_run = {n: v for n, v in settings.items() if n in _OF_RUN and n != "sae"}
    return of_run, {**mapping(settings, "sae"), **beside}


def _flat(varied: Settings) -> dict[str, Any]:
    """The settings in their order, those in `sae` beside the others."""
    flat: dict[str, Any] = {}
    for name, value in varied.items():
        flat |= value if name == "sae" else {name: value}
    return flat


def _named_shape(of_run: Settings) -> ModelShape | None:
    class_name, name, kwargs = (
        of_run.get(name, getattr(MultiLayerConfig, name, None))
        for name in ("model_class_name", "model_name", "model_from_pretrained_kwargs")
    )
    return loading.shape_by_name(str(class_name), str(name), kwargs)


def _with_d_sae(of_sae: dict[str, Any]) -> dict[str, Any]:
    if "expansion_factor" not in of_sae:
        return of_sae
    if "d_sae" in of_sae:
        raise ValueError("Give `expansion_factor` or `d_sae`, not both.")
    rest = {n: v for n, v in of_sae.items() if n != "expansion_factor"}
    factor, d_in = of_sae["expansion_factor"], of_sae.get("d_in")
    if d_in is None:
        return rest  # missing sizes are reported together
    d_sae = factor * d_in if isinstance(factor, (int, float)) else math.nan
    if not d_sae > 0 or d_sae != int(d_sae):
        raise ValueError(
            f"`expansion_factor` times {d_in} must be a whole number; got {factor!r}."
        )
    return {**rest, "d_sae": int(d_sae)}


def point_name(point: Settings) -> str:
    """A folder name that depends on the settings only."""
    if "name" in point:
        name = str(point["name"])
        if not re.fullmatch(r"[A-Za-z0-9][\w.%-]*", name):
            raise ValueError(f"`name` must be letters, digits, '.-_'; got {name!r}.")
    else:
        parts = [
            f"{_SHORT[n]}{_text(v)}" if n in _SHORT else f"{n}-{_text(v, n)}"
            for n, v in _flat(point).items()
        ]
        name = "_".join(parts) or "base"
    if len(name) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: _LONGEST_NAME - 9]}-{digest}"


def _text(value: Any, name: str = "") -> str:
    if name == "layers" and value is None:
        return "all"
    if isinstance(value, (list, tuple, range)):
        return "-".join(map(_text, value))
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return quote(str(value), safe="")
