"""The points of a sweep: settings that vary -> configs of runs, each with a name."""

import hashlib
import itertools
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

EXPANSION_FACTOR = "expansion_factor"
NAME = "name"
SIZES = (EXPANSION_FACTOR, "d_sae", "k")
"""Settings that stand in the table of any sweep."""
_SHORT = {EXPANSION_FACTOR: "R", "k": "k"}
_OUTPUTS = fields_of("outputs")
_LONGEST_NAME = 100
_OF_RUN = [field.name for field in fields(MultiLayerConfig)]

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str
    """The name of its folder."""
    varied: dict[str, Any]
    """The settings in which it differs from the base, and their values."""
    cfg: MultiLayerConfig[Any]


def grid(**values: Any) -> list[dict[str, Any]]:
    """Every combination of the values of some settings, the last one varying fastest.

    Args:
        values: A list of values for each setting.

    Raises:
        ValueError: If a setting has no list of values.

    Example:
        >>> grid(expansion_factor=[4, 8], k=[16])
        [{'expansion_factor': 4, 'k': 16}, {'expansion_factor': 8, 'k': 16}]
    """
    for name, given in values.items():
        if not isinstance(given, (list, tuple, range)) or not given:
            raise ValueError(
                f"`{name}` must have a list of values to take in turn; got {given!r}. "
                "One choice of layers is a list inside that list."
            )
    combinations = itertools.product(*values.values())
    return [dict(zip(values, chosen, strict=True)) for chosen in combinations]


def combine(points: Sequence[Settings], others: Sequence[Settings]) -> list[Settings]:
    """Each point with the settings of each of the others.

    Raises:
        ValueError: If both set the same.
    """
    combined: list[Settings] = []
    for point, other in itertools.product(points, others):
        if both := sorted(point.keys() & other.keys()):
            raise ValueError(f"`points` and `grid` must not both vary {both}.")
        name = {NAME: f"{point[NAME]}_{_name(other)}"} if NAME in point else {}
        combined.append({**point, **other, **name})
    return combined


def make_points(
    base: Settings, points: Sequence[Settings], shape: ModelShape | None = None
) -> list[Point]:
    """The runs of a sweep, with checked configs; no model is loaded.

    Args:
        base: What all have in common: fields of `MultiLayerConfig`, as in the file of
            `train --config`. Fields of the SAE may stand in `sae` or beside the
            others; `expansion_factor` may stand for `d_sae`, and `d_in` is the width
            of the model if left out.
        points: What each sets otherwise, in the same names, and `name`, if the name of
            its folder is not to be made of the settings.
        shape: Of the model, if it is given and not named.

    Raises:
        ValueError: If a setting is unknown or wrong, or two points are the same.
    """
    if not points:
        raise ValueError("A sweep needs at least one point; got none.")
    made: list[Point] = []
    for point in points:
        varied = {name: value for name, value in point.items() if name != NAME}
        _check_places(varied)
        settings, name = _merge(base, varied, shape), _name(point)
        log = {"run_name": name, **mapping(settings, "logger")}
        cfg = config_from_settings({**settings, "logger": log})
        made.append(Point(name, _flat(varied), cfg))
    names = [point.name for point in made]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"The points of a sweep must differ; {repeated} are repeated.")
    return made


def varied_settings(points: Sequence[Point]) -> list[str]:
    """The settings that any of the points sets."""
    return list(dict.fromkeys(name for point in points for name in point.varied))


def setting_of(point: Point, name: str) -> Any:
    """A setting as the point was given it, or else as it is in its config."""
    if name in point.varied:
        return point.varied[name]
    sae: Any = point.cfg.sae
    if name == EXPANSION_FACTOR:
        return sae.d_sae / sae.d_in
    if name == "architecture":
        return sae.architecture()
    return getattr(point.cfg if name in _OF_RUN else sae, name, None)


def _check_places(varied: Settings) -> None:
    if wrong := [name for name in _OUTPUTS if name in varied]:
        raise ValueError(
            f"A point must not set {wrong}: each is saved and resumed in a folder of "
            "its own, under that of the sweep."
        )


def _merge(
    base: Settings, varied: Settings, shape: ModelShape | None
) -> dict[str, Any]:
    """The settings of a run, with those of its SAE in `sae`."""
    # What the base says of places, as a saved run's config does, is not of a point.
    of_run, of_sae = _split({n: v for n, v in base.items() if n not in _OUTPUTS})
    changed_run, changed_sae = _split(varied)
    if changed_sae.keys() & {EXPANSION_FACTOR, "d_sae"}:
        of_sae = {
            n: v for n, v in of_sae.items() if n not in (EXPANSION_FACTOR, "d_sae")
        }
    of_run, of_sae = {**of_run, **changed_run}, {**of_sae, **changed_sae}
    _check_names(of_run, of_sae)
    if "d_in" not in of_sae:
        found = _shape_of(of_run) if shape is None else shape
        of_sae |= {} if found is None else {"d_in": found.d_model}
    return {**of_run, "sae": _with_d_sae(of_sae)}


def _split(settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a run without its SAE, and those of the SAE."""
    beside = {n: v for n, v in settings.items() if n not in _OF_RUN}
    of_run = {n: v for n, v in settings.items() if n in _OF_RUN and n != "sae"}
    inside = mapping(dict(settings), "sae")
    if both := sorted(beside.keys() & inside.keys()):
        raise ValueError(f"{both} must stand in `sae` or beside it, not in both.")
    return of_run, {**inside, **beside}


def _flat(varied: Settings) -> dict[str, Any]:
    """The settings in their order, those in `sae` beside the others."""
    flat: dict[str, Any] = {}
    for name, value in varied.items():
        flat |= value if name == "sae" else {name: value}
    return flat


def _check_names(of_run: Settings, of_sae: Settings) -> None:
    architecture = of_sae.get("architecture", ARCHITECTURE)
    known = [field.name for field in fields(sae_config_class(architecture))]
    check_known([*of_sae], [*_OF_RUN, *known, "architecture", EXPANSION_FACTOR])


def _shape_of(of_run: Settings) -> ModelShape | None:
    def setting(name: str) -> Any:
        return of_run.get(name, getattr(MultiLayerConfig, name, None))

    return loading.shape_by_name(
        setting("model_class_name"),
        setting("model_name"),
        of_run.get("model_from_pretrained_kwargs"),
    )


def _with_d_sae(of_sae: dict[str, Any]) -> dict[str, Any]:
    if EXPANSION_FACTOR not in of_sae:
        return of_sae
    if "d_sae" in of_sae:
        raise ValueError(
            f"Give `{EXPANSION_FACTOR}` or `d_sae`, not both; got "
            f"{of_sae[EXPANSION_FACTOR]} and {of_sae['d_sae']}."
        )
    of_sae = dict(of_sae)
    factor, d_in = of_sae.pop(EXPANSION_FACTOR), of_sae.get("d_in")
    if d_in is None:
        return of_sae  # missing sizes are one error for all
    d_sae = factor * d_in if isinstance(factor, (int, float)) else math.nan
    if not d_sae > 0 or d_sae != int(d_sae):
        raise ValueError(
            f"`{EXPANSION_FACTOR}` must give a whole number of latents, with `d_in` = "
            f"{d_in}; got {factor!r}."
        )
    return {**of_sae, "d_sae": int(d_sae)}


def _name(point: Settings) -> str:
    """A name that the same settings always have, and that a folder can have."""
    if NAME not in point:
        parts = [_part(name, value) for name, value in _flat(point).items()]
        return _short_enough("_".join(parts) or "base")
    if not re.fullmatch(r"[A-Za-z0-9][\w.%-]*", str(point[NAME])):
        raise ValueError(
            f"`{NAME}` must be of letters, digits, '.', '-' and '_'; got "
            f"{point[NAME]!r}."
        )
    return _short_enough(str(point[NAME]))


def _part(name: str, value: Any) -> str:
    if name == "layers" and value is None:
        return "layers-all"
    return (
        f"{_SHORT[name]}{_text(value)}" if name in _SHORT else f"{name}-{_text(value)}"
    )


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple, range)):
        return "-".join(map(_text, value))
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return quote(str(value), safe="")


def _short_enough(name: str) -> str:
    if len(name) <= _LONGEST_NAME:
        return name
    return (
        f"{name[: _LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    )
