"""The model and hooks that a published checkpoint was trained on."""

import logging
from dataclasses import dataclass
from typing import Any

from sae_lens_multilayer import hooks
from sae_lens_multilayer.models.loading import shape_by_name
from sae_lens_multilayer.models.shape import ModelShape
from sae_lens_multilayer.published.releases import PublishedName, published_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """The model and hooks that a checkpoint was trained on."""

    model_name: str | None
    """The language model; None if it is unknown."""
    hook_names: list[str]
    """The hooks; empty if the model is unknown."""
    n_layers: int | None
    """Number of blocks of the model; None if it is unknown."""
    d_in: int | None
    """The model's width; None if only the tensors have it."""
    has_lens: bool
    """Whether the inputs were transformed by the model's tuned lens."""


def find_origin(
    settings: dict[str, Any],
    location: str,
    n_layers: int | None,
    model_name: str | None,
    hook_name: str | None,
) -> Origin:
    """The model and hooks, from the config, the location and the stored tensors.

    Raises:
        ValueError: If TransformerLens does not have the model, or a layer is not one of
            its blocks, or `hook_name` is not one of the hooks.
        FileNotFoundError: If the model's own config is needed and cannot be read.
    """
    name = PublishedName.find_in(location)
    has_lens = bool(settings.get("tuned_lens")) or (name is not None and name.has_lens)
    candidates = [model_name, settings.get("model_name"), name.model if name else None]
    candidates = [c for c in candidates[: 1 if model_name else None] if c]
    published = next(filter(None, map(published_model, candidates)), None)
    d_in = None
    if published is not None:
        model_name, d_in = published.name, published.d_in
        n_layers = n_layers or published.n_layers
    elif candidates:
        model_name = candidates[0]
        if n_layers is None:
            shape = _shape_of(candidates[0])
            n_layers, d_in = shape.n_layers, shape.d_model
    if n_layers is None:
        _report_unknown_model(location, has_lens)
        return Origin(None, [], None, None, has_lens)
    layers = settings.get("layers")
    if layers is None and name is not None and name.layer is not None:
        layers = [name.layer]
    hook_names = hooks.resolve_hook_names(
        hooks.DEFAULT_HOOK_NAME, None, layers, n_layers, str(model_name)
    )
    if hook_name is not None:
        hook_names = [hook_names[hooks.find_hook(hook_names, hook_name)]]
    return Origin(model_name, hook_names, n_layers, d_in, has_lens)


def _report_unknown_model(location: str, has_lens: bool) -> None:
    """Log that the SAE has no hooks, or raise ValueError if it needs a lens."""
    problem = (
        f"The language model of the MLSAE at {location} is unknown, so it has no hooks "
        "and no views, and a tuned lens is not applied. Give the folder the "
        "repository's name, or name the model: converter=partial(mlsae_disk_loader, "
        "model_name=..., tuned_lens=...), or partial(mlsae_huggingface_loader, ...)."
    )
    if has_lens:
        raise ValueError(problem)
    logger.warning("%s", problem)


def _shape_of(model_name: str) -> ModelShape:
    shape = shape_by_name("HookedTransformer", model_name)
    if shape is None:
        raise FileNotFoundError(
            f"The number of layers comes from the config of {model_name!r}, which is "
            "not cached, and the Hugging Face hub cannot be reached."
        )
    return shape


def warn_of_differences(
    location: str, origin: Origin, settings: dict[str, Any], d_in: int, d_sae: int
) -> None:
    """Warn if the sizes are not those of the model or of the published name."""
    found = {"d_in": d_in, "expansion_factor": d_sae / d_in, "k": settings["k"]}
    found["n_layers"] = origin.n_layers
    expected: dict[str, Any] = {"d_in": origin.d_in}
    model = published_model(origin.model_name or "")
    if model is not None:
        expected["n_layers"] = model.n_layers
    name = PublishedName.find_in(location)
    if name is not None:
        expected |= {"expansion_factor": name.expansion_factor, "k": name.k}
    differing = {n: v for n, v in expected.items() if v not in (None, found[n])}
    if differing:
        logger.warning(
            "The MLSAE at %s has %s, but its name or its model %s has %s: its files "
            "may be those of another one.",
            location,
            {n: found[n] for n in differing},
            origin.model_name,
            differing,
        )
