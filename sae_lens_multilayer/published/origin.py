"""What a published checkpoint was trained on: its model, hooks, and whether a lens."""

import logging
import re
from dataclasses import dataclass, replace
from typing import Any

from transformer_lens.loading_from_pretrained import (
    OFFICIAL_MODEL_NAMES,  # pyright: ignore[reportPrivateImportUsage]  (of 2.x, too)
    get_official_model_name,
)

from sae_lens_multilayer import hooks
from sae_lens_multilayer.lens.config import LensConfig
from sae_lens_multilayer.models.loading import shape_by_name
from sae_lens_multilayer.models.shape import ModelShape
from sae_lens_multilayer.published.releases import (
    PublishedName,
    nearest,
    published_model,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """What a checkpoint was trained on."""

    model_name: str | None
    """The language model; None if nothing names it."""
    hook_names: list[str]
    """The hooks; none if the model is not known."""
    n_layers: int | None
    """Number of blocks of the model; None if it is not known."""
    d_in: int | None
    """The model's width, where it is known without the tensors."""
    has_lens: bool
    """Whether the inputs were transformed by the model's tuned lens."""

    def at(self, hook_name: str | None) -> "Origin":
        """The same for one of the hooks; None: for all.

        Raises:
            ValueError: If it is not one of the hooks; lists those.
        """
        if hook_name is None:
            return self
        position = hooks.find_hook(self.hook_names, hook_name)
        return replace(self, hook_names=[self.hook_names[position]])

    def lens_config(self, d_in: int) -> LensConfig:
        """The lens, without what only its own files say of it."""
        assert self.n_layers is not None  # a lens is that of a known model
        return LensConfig(
            self.hook_names, self.n_layers, d_in, "reference", self.model_name
        )


def find_origin(
    settings: dict[str, Any],
    place: str,
    n_layers_stored: int | None,
    model_name: str | None,
) -> Origin:
    """Find out on what a checkpoint was trained.

    Args:
        settings: Its `config.json`, which may name the model and the layers.
        place: Its repository or folder, whose name may be of the published form.
        n_layers_stored: Number of blocks, where the tensors beside it tell.
        model_name: The language model; None: as the settings or the place say.

    Raises:
        ValueError: If TransformerLens does not know the model, or a layer is not one
            of its blocks.
        FileNotFoundError: If the model's own config is needed and cannot be had.
    """
    name = _name_in(place)
    has_lens = bool(settings.get("tuned_lens")) or (name is not None and name.has_lens)
    named = (settings.get("model_name"), name.model if name else None)
    stated = [m for m in ((model_name,) if model_name else named) if m]
    model_name, n_layers, d_in = _model(stated, n_layers_stored)
    if n_layers is None:
        problem = (
            f"Nothing says on which model the MLSAE at {place} was trained, so it "
            "knows no hooks, has no views, and a tuned lens that it may have been "
            "trained with is not applied. Give the folder the repository's name, or "
            "name the model: converter=partial(mlsae_disk_loader, model_name=..., "
            "tuned_lens=...), of a repository partial(mlsae_huggingface_loader, ...)."
        )
        if has_lens:
            raise ValueError(problem)
        logger.warning("%s", problem)
        return Origin(None, [], None, None, has_lens)
    layers = settings.get("layers")
    if layers is None and name is not None and name.layer is not None:
        layers = [name.layer]
    hook_names = hooks.resolve_hook_names(
        hooks.DEFAULT_HOOK_NAME, None, layers, n_layers, str(model_name)
    )
    return Origin(model_name, hook_names, n_layers, d_in, has_lens)


def warn_of_other_sizes(place: str, expansion_factor: float, k: int) -> None:
    """Warn if the name of a repository or folder says other sizes than its files.

    Args:
        place: The repository or folder.
        expansion_factor: d_sae / d_in of the tensors.
        k: Of the config.
    """
    name = _name_in(place)
    if name and (name.expansion_factor, name.k) != (expansion_factor, k):
        logger.warning(
            "The MLSAE at %s has the expansion factor %g and k = %d, and its name says "
            "%d and %d: its files may be those of another one.",
            place,
            expansion_factor,
            k,
            name.expansion_factor,
            name.k,
        )


def _model(
    stated: list[str], n_layers_stored: int | None
) -> tuple[str | None, int | None, int | None]:
    """The model's name, number of blocks and width, as far as they are known."""
    known = next(filter(None, map(published_model, stated)), None)
    if known is not None:
        if n_layers_stored not in (None, known.n_layers):
            logger.warning(
                "%s has %d blocks, and the transformer or lens of the MLSAE has %d, "
                "whose hooks it is given: one of them is of another model.",
                known.name,
                known.n_layers,
                n_layers_stored,
            )
        return known.name, n_layers_stored or known.n_layers, known.d_in
    if not stated:
        return None, n_layers_stored, None
    if n_layers_stored is None:
        shape = _shape_of(stated[0])
        return stated[0], shape.n_layers, shape.d_model
    try:
        get_official_model_name(stated[0])
    except ValueError:
        logger.warning(
            "TransformerLens does not know the model %r, so SAELens' tools cannot load "
            "it by the name in `cfg.metadata.model_name`.",
            stated[0],
        )
    return stated[0], n_layers_stored, None


def _name_in(place: str) -> PublishedName | None:
    """The published name in a repository's name or a path, also of the hub's cache."""
    parts = reversed(re.split("/|--", place))
    return next(filter(None, map(PublishedName.parse, parts)), None)


def _shape_of(model_name: str) -> ModelShape:
    try:
        shape = shape_by_name("HookedTransformer", model_name)
    except ValueError as error:
        raise ValueError(
            f"The MLSAE was trained on {model_name!r}, which is not a model that "
            f"TransformerLens knows; the nearest are "
            f"{nearest(model_name, OFFICIAL_MODEL_NAMES)}. Name another: "
            "converter=partial(mlsae_huggingface_loader, model_name=...), of a folder "
            "partial(mlsae_disk_loader, ...)."
        ) from error
    if shape is None:
        raise FileNotFoundError(
            f"The number of layers comes from the config of {model_name!r}, which is "
            "not cached, and the Hugging Face hub cannot be reached."
        )
    return shape
