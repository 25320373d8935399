"""The published checkpoints: which there are, what their names say, and their ids."""

import difflib
import functools
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import pandas as pd
import yaml

from sae_lens_multilayer.hooks import DEFAULT_HOOK_NAME, resolve_hook_names

_NAME = re.compile(
    r"(?P<prefix>mlsae|sae)-(?P<model>.+?)-(?P<variant>x(?P<R>\d+)-k(?P<k>\d+)"
    r"(?P<lens>-lens)?(?P<tfm>-tfm)?(?:-layers-(?P<layer>\d+))?)"
)


@dataclass(frozen=True)
class PublishedModel:
    """A language model of which there are published SAEs."""

    name: str
    """Its name for Hugging Face and TransformerLens."""
    n_layers: int
    """Number of blocks."""
    d_in: int
    """Width of the residual stream."""


@dataclass(frozen=True)
class PublishedName:
    """What the name of a repository or of its folder says.

    Example:
        >>> name = PublishedName.parse("sae-pythia-70m-deduped-x64-k32-tfm-layers-3")
        >>> name.release, name.variant, name.layer
        ('sae-pythia-70m-deduped', 'x64-k32-tfm-layers-3', 3)
    """

    prefix: str
    """"mlsae", or "sae" for the SAE of one layer."""
    model: str
    """The last part of the model's name."""
    variant: str
    """The rest, from the expansion factor on."""
    expansion_factor: int
    """d_sae / d_in."""
    k: int
    """Latents kept for each vector."""
    has_lens: bool
    """Whether it was trained on vectors that a tuned lens had transformed."""
    has_transformer: bool
    """Whether its file holds the transformer, too."""
    layer: int | None
    """The block of a single-layer SAE."""

    @classmethod
    def parse(cls, name: str) -> "PublishedName | None":
        """Take a name apart; None if it is not of the published form."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        part = match.groupdict()
        return cls(
            prefix=part["prefix"],
            model=part["model"],
            variant=part["variant"],
            expansion_factor=int(part["R"]),
            k=int(part["k"]),
            has_lens=part["lens"] is not None,
            has_transformer=part["tfm"] is not None,
            layer=None if part["layer"] is None else int(part["layer"]),
        )

    @property
    def release(self) -> str:
        """The release that it belongs to: all checkpoints of its kind for its model."""
        return f"{self.prefix}-{self.model}"

    @property
    def repository(self) -> str:
        """The last part of its repository's name."""
        return f"{self.release}-{self.variant}"


def published_model(name: str) -> PublishedModel | None:
    """A model by its name or the last part of it; None if it is not one of ours."""
    for model in _directory()[1]:
        if name in (model.name, _last_part(model.name)):
            return model
    return None


def owner() -> str:
    """The name on the Hugging Face hub under which the checkpoints are."""
    return _directory()[0]


def published_names() -> list[PublishedName]:
    """All checkpoints, in the order of the release file."""
    return list(_directory()[2])


def hook_names(name: PublishedName) -> list[str]:
    """The hooks that a published checkpoint was trained on."""
    layers = None if name.layer is None else [name.layer]
    return resolve_hook_names(DEFAULT_HOOK_NAME, None, layers, _model(name).n_layers)


def sae_ids(name: PublishedName) -> list[str]:
    """The ids of a checkpoint: the whole SAE, then each of its hooks.

    A single-layer SAE has one id.
    """
    if name.layer is not None:
        return [name.variant]
    return [name.variant, *(f"{name.variant}/{hook}" for hook in hook_names(name))]


class SaeIds(dict[str, str]):
    """Ids of a release with where to find them.

    SAELens' error for an unknown id lists the first five of `keys()`. So that these
    are the nearest, they come first once, after an id was not found.
    """

    _not_found: str | None = None

    def __contains__(self, sae_id: object) -> bool:
        found = super().__contains__(sae_id)
        self._not_found = None if found else str(sae_id)
        return found

    def keys(self) -> Any:  # dict's own type of keys has no public name
        sought, self._not_found = self._not_found, None
        if sought is None:
            return super().keys()
        return ({i: self[i] for i in nearest(sought, list(self))} | self).keys()


def nearest(name: str, known: list[str]) -> list[str]:
    """The five of the known names that are most like a name, or the first five."""
    return difflib.get_close_matches(name, known, n=5, cutoff=0.3) or known[:5]


@dataclass(frozen=True)
class Release:
    """What `SAE.from_pretrained` takes as a release, with its SAEs."""

    name: str
    """All checkpoints of one kind for one model, or a repository, which has the same
    ids."""
    place: str
    """Their owner on the hub, or the repository."""
    model_name: str
    """The language model."""
    paths: SaeIds
    """What follows `place`, by id: a repository, a hook, or both."""
    expected_l0: dict[str, float]
    """k, by id."""


def published_releases() -> list[Release]:
    """The releases of all models and of all repositories."""
    found: dict[str, Release] = {}
    for name in published_names():
        _add(found, name, name.release, owner(), name.repository)
        repository = f"{owner()}/{name.repository}"
        _add(found, name, repository, repository, "")
    return list(found.values())


def _add(
    found: dict[str, Release], name: PublishedName, release: str, place: str, stem: str
) -> None:
    if release not in found:
        model_name = _model(name).name
        found[release] = Release(release, place, model_name, SaeIds(), {})
    for sae_id in sae_ids(name):
        hook = sae_id.partition("/")[2]
        path = "/".join(part for part in (stem, hook) if part)
        found[release].paths[sae_id] = path
        found[release].expected_l0[sae_id] = name.k


def multi_layer_ids() -> set[tuple[str, str]]:
    """Release and id of each SAE of several hooks, which is not for SAELens' tools."""
    return {
        (release, name.variant)
        for name in published_names()
        if name.layer is None
        for release in (name.release, f"{owner()}/{name.repository}")
    }


def releases() -> pd.DataFrame:
    """The published checkpoints that `SAE.from_pretrained` knows, one in each row.

    Returns:
        `release` and `sae_id` of the whole SAE (`{sae_id}/{hook_name}` is one hook of
        a multi-layer SAE); its `repository` on the hub, which is a release, too; the
        language `model`, its `n_layers`, and the `layer` of a single-layer SAE; `d_in`,
        `d_sae` and `k`; and whether it was trained with a tuned `lens` and whether
        its file holds the `transformer`.

    Example:
        >>> table = releases()
        >>> int(table.query("sae_id == 'x64-k32' and model == 'gpt2'").d_sae.item())
        49152
    """
    rows = [_row(name) for name in published_names()]
    return pd.DataFrame(rows).astype({"layer": "Int64"})


def _model(name: PublishedName) -> PublishedModel:
    model = published_model(name.model)
    assert model is not None
    return model


def _row(name: PublishedName) -> dict[str, Any]:
    model = _model(name)
    return {
        "release": name.release,
        "sae_id": name.variant,
        "repository": f"{owner()}/{name.repository}",
        "model": model.name,
        "n_layers": model.n_layers,
        "layer": name.layer,
        "d_in": model.d_in,
        "d_sae": name.expansion_factor * model.d_in,
        "k": name.k,
        "lens": name.has_lens,
        "transformer": name.has_transformer,
    }


@functools.cache
def _directory() -> tuple[str, list[PublishedModel], list[PublishedName]]:
    text = files(__package__ or "").joinpath("releases.yaml").read_text("utf-8")
    data = yaml.safe_load(text)
    entries: list[dict[str, Any]] = data["models"]
    models = [PublishedModel(e["name"], e["n_layers"], e["d_in"]) for e in entries]
    names = [
        name
        for model, entry in zip(models, entries, strict=True)
        for name in _names(model, entry["checkpoints"])
    ]
    return data["owner"], models, names


def _names(
    model: PublishedModel, checkpoints: list[dict[str, Any]]
) -> Iterator[PublishedName]:
    for c in checkpoints:
        of_one_layer = c["prefix"] == "sae"
        endings = (
            [f"-layers-{layer}" for layer in range(model.n_layers)]
            if of_one_layer
            else [""]
        )
        for R, k, variant, ending in itertools.product(
            c["R"], c["k"], c["variants"], endings
        ):
            stem = f"{c['prefix']}-{_last_part(model.name)}"
            name = PublishedName.parse(f"{stem}-x{R}-k{k}{variant}{ending}")
            assert name is not None
            yield name


def _last_part(model_name: str) -> str:
    return model_name.rpartition("/")[2]
