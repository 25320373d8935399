"""The vectors of several hooks from one run of a model."""

from collections.abc import Iterable, Sequence
from typing import Any

from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from sae_lens_multilayer import hooks
from sae_lens_multilayer.lens.carrier import lens_of
from sae_lens_multilayer.store.store import one_vector_per_position


def check_model(model: Any, hook_names: Sequence[str], d_in: int | None) -> None:
    """Check that a model can give the vectors that are to be measured.

    Args:
        d_in: The width of vectors that is needed; None: any.

    Raises:
        ValueError: If SAEs are attached to the model, or its width is another one.
    """
    attached = getattr(model, "acts_to_saes", None)
    if attached:
        raise ValueError(
            "The model must have no SAEs attached, as its own run is what is measured "
            f"and compared with; it has them at {list(attached)}. Detach them with "
            "`model.reset_saes()`."
        )
    if d_in is not None:
        hooks.check_width(hook_names, d_in, hooks.shape_of_model(model))


def check_lenses(model: Any, saes: Iterable[SAE[Any]], stacklevel: int) -> None:
    """Check that the lenses of these SAEs were made for this model.

    Raises:
        ValueError: If one is of another width or depth.
    """
    # The lenses of several views are parts of one, and hashing a model takes long.
    lenses = {
        (lens.config.unembed_hash, lens.config.n_layers, lens.config.d_in): lens
        for lens in map(lens_of, saes)
        if lens is not None
    }
    for lens in lenses.values():
        lens.check_model(model, stacklevel)


def hook_vectors(
    model: Any,
    own_names: Sequence[str],
    head_indices: Sequence[int | None],
    tokens: Int[Tensor, "prompt pos"],
) -> list[Float[Tensor, "prompt pos d_vector"]]:
    """The vectors of each hook, from a run that stops after the last one.

    Args:
        own_names: The model's own names of the hooks (`hooks.model_hook_names`).
        head_indices: The attention head that is meant at each hook; None: all.
    """
    _, cache = model.run_with_cache(
        tokens.to(hooks.device_of_model(model)),
        names_filter=list(own_names),
        stop_at_layer=hooks.stop_at_layer(own_names),
        prepend_bos=False,
    )
    return [
        one_vector_per_position(cache[name], head_index)
        for name, head_index in zip(own_names, head_indices, strict=True)
    ]
