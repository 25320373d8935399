"""The list of published checkpoints, their names and their ids in SAELens."""

import functools
import itertools
import re
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
    """A language model with published SAEs."""

    name: str
    """Its name for Hugging Face and TransformerLens."""
    n_layers: int
    d_in: int


@dataclass(frozen=True)
class PublishedName:
    """The parts of the name of a repository or of its folder.

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
    has_lens: bool
    has_transformer: bool
    """Whether its file also holds the transformer."""
    layer: int | None
    """The block of a single-layer SAE."""

    @classmethod
    def parse(cls, name: str) -> "PublishedName | None":
        """Split a name into its parts; None if it has another form."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        part = match.groupdict()
        return cls(
            part["prefix"],
            part["model"],
            part["variant"],
            int(part["R"]),
            int(part["k"]),
            part["lens"] is not None,
            part["tfm"] is not None,
            None if part["layer"] is None else int(part["layer"]),
        )

    @classmethod
    def find_in(cls, location: str) -> "PublishedName | None":
        """The last published name in a repository's name or a path."""
        parts = reversed(re.split("/|--", location))
        return next(filter(None, map(cls.parse, parts)), None)

    @property
    def release(self) -> str:
        """Its release: all checkpoints with this prefix for this model."""
        return f"{self.prefix}-{self.model}"

    @property
    def repository(self) -> str:
        """Its repository on the hub, with the owner."""
        return f"{owner()}/{self.release}-{self.variant}"


def directory_entries() -> dict[str, dict[str, Any]]:
    """Fields of SAELens' directory, by release."""
    found: dict[str, dict[str, Any]] = {}
    for name in published_names():
        model, repository = _model_of(name), name.repository
        hook_names = [""]
        if name.layer is None:
            hook_names += resolve_hook_names(
                DEFAULT_HOOK_NAME, None, None, model.n_layers
            )
        for release, repo_id, folder in (
            (name.release, owner(), repository.partition("/")[2]),
            (repository, repository, ""),
        ):
            entry = found.setdefault(
                release,
                {
                    "release": release,
                    "repo_id": repo_id,
                    "model": model.name,
                    "saes_map": {},
                    "expected_l0": {},
                },
            )
            for hook in hook_names:
                sae_id = f"{name.variant}/{hook}".strip("/")
                entry["saes_map"][sae_id] = f"{folder}/{hook}".strip("/")
                entry["expected_l0"][sae_id] = name.k
    return found


def multi_layer_ids() -> set[tuple[str, str]]:
    """Release and id of each SAE of several hooks, which SAELens' tools cannot use."""
    return {
        (release, name.variant)
        for name in published_names()
        if name.layer is None
        for release in (name.release, name.repository)
    }


def releases() -> pd.DataFrame:
    """The published checkpoints for `SAE.from_pretrained`, one in each row.

    Returns:
        `release` and `sae_id` of the whole SAE (`{sae_id}/{hook_name}` is one hook of
        a multi-layer SAE); its `repository` on the hub, also the name of a release;
        the language `model`, its `n_layers`, and the `layer` of a single-layer SAE;
        `d_in`, `d_sae` and `k`; and whether it was trained with a tuned `lens` and
        whether its file holds the `transformer`.

    Example:
        >>> table = releases()
        >>> int(table.query("sae_id == 'x64-k32' and model == 'gpt2'").d_sae.item())
        49152
    """
    rows = [
        {
            "release": name.release,
            "sae_id": name.variant,
            "repository": name.repository,
            "model": model.name,
            "n_layers": model.n_layers,
            "layer": name.layer,
            "d_in": model.d_in,
            "d_sae": name.expansion_factor * model.d_in,
            "k": name.k,
            "lens": name.has_lens,
            "transformer": name.has_transformer,
        }
        for name in published_names()
        for model in [_model_of(name)]
    ]
    return pd.DataFrame(rows).astype({"layer": "Int64"})


def owner() -> str:
    """The owner of the checkpoints on the Hugging Face hub."""
    return _directory()[0]


def published_names() -> list[PublishedName]:
    """All checkpoints, in the order of the release file."""
    return list(_directory()[2])


def published_model(name: str) -> PublishedModel | None:
    """A model by its name or the last part of it; None if it has no published SAEs."""
    return _directory()[1].get(_last_part(name))


def _model_of(name: PublishedName) -> PublishedModel:
    return _directory()[1][name.model]


@functools.cache
def _directory() -> tuple[str, dict[str, PublishedModel], list[PublishedName]]:
    """The release file: the owner, the models by last part, and the checkpoints."""
    text = files(__package__ or "").joinpath("releases.yaml").read_text("utf-8")
    data = yaml.safe_load(text)
    models: dict[str, PublishedModel] = {}
    names: list[PublishedName] = []
    for entry in data["models"]:
        model = PublishedModel(entry["name"], entry["n_layers"], entry["d_in"])
        part = _last_part(model.name)
        models[part] = model
        for c in entry["checkpoints"]:
            is_single = c["prefix"] == "sae"
            layers = [f"-layers-{i}" for i in range(model.n_layers)]
            for R, k, variant, layer in itertools.product(
                c["R"], c["k"], c["variants"], layers if is_single else [""]
            ):
                stem = f"{c['prefix']}-{part}-x{R}-k{k}"
                name = PublishedName.parse(f"{stem}{variant}{layer}")
                assert name is not None
                names.append(name)
    return data["owner"], models, names


def _last_part(model_name: str) -> str:
    return model_name.rpartition("/")[2]
