"""What an SAE needs to work in the space of a tuned lens and to carry it along."""

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from sae_lens import SAE, SAEConfig
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from safetensors.torch import load_file
from torch import Tensor
from typing_extensions import override

from sae_lens_multilayer.lens.config import LensConfig
from sae_lens_multilayer.lens.lens import LayerLens
from sae_lens_multilayer.models.model import Model

LENS_PREFIX = "lens."
"""What stands before the names of a lens' tensors in the state dict of an SAE."""


class LensCarrier(SAE[Any]):
    """An SAE of raw vectors that are taken into a lens' space before it and out after.

    `z = T(x)`, the SAE reconstructs z, and `x_hat = T^-1(z_hat)`, with T of the
    vector's hook. The settings of the lens are `cfg.metadata.tuned_lens` and its
    tensors are in the state dict, so it is saved, loaded and moved with the SAE.
    """

    lens: LayerLens | None
    """The lens, or None. Set it to put one on or to take it off; nothing is left of it
    then. The SAE has a lens of its own, in its dtype and on its device, which shares
    the memory of the one given where these are the same. `cfg` is replaced by one that
    says so, and other SAEs made from it stay as they are."""

    def __init__(self, cfg: SAEConfig, use_error_term: bool = False) -> None:
        """Make the lens that `cfg` states, to load tensors into."""
        super().__init__(cfg, use_error_term)
        stated = cfg.metadata.tuned_lens
        self.lens = (
            None
            if stated is None
            else LayerLens(LensConfig.from_dict(stated), self.dtype, self.device)
        )

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        # A property would not do: Module registers a submodule before it looks for one.
        if name == "lens":
            value = self._own_lens(value)
        super().__setattr__(name, value)

    @override
    def __delattr__(self, name: str) -> None:
        if name == "lens":
            self.lens = None
        else:
            super().__delattr__(name)

    def _own_lens(self, lens: Any) -> LayerLens | None:
        if lens is not None:
            self._check_lens(lens)
        stated = None if lens is None else lens.config.to_dict()
        if stated != self.cfg.metadata.tuned_lens:
            # Another SAE may have been made from the same object.
            self.cfg = copy.deepcopy(self.cfg)
            self.cfg.metadata.__dict__.pop("tuned_lens", None)
            if stated is not None:
                self.cfg.metadata.tuned_lens = stated
        if lens is None:
            return None
        return lens.select(lens.hook_names).to(self.device, self.dtype)

    def _check_lens(self, lens: Any) -> None:
        if not isinstance(lens, LayerLens):
            raise ValueError(
                f"`lens` must be a LayerLens or None; got {type(lens).__name__}. "
                "`LayerLens.from_tuned_lens(lens, sae.cfg.metadata.hook_names)` makes "
                "one of a TunedLens or its folder."
            )
        if lens.config.d_in != self.cfg.d_in:
            raise ValueError(
                f"The lens must be of the SAE's width, d_in = {self.cfg.d_in}; that of "
                f"{lens.config.base_model_name!r} is {lens.config.d_in} wide. Use the "
                "lens of the model that the SAE is for."
            )
        hook_names = self.cfg.metadata.hook_names
        if hook_names and list(hook_names) != lens.hook_names:
            raise ValueError(
                "The hooks of the lens must be those of the SAE, in its order, "
                f"{list(hook_names)}; got {lens.hook_names}. Use `lens.select` or "
                "build the lens for these hooks."
            )

    def into_lens(
        self, x: Float[Tensor, "*batch d_in"], hook: int | str | None = None
    ) -> Float[Tensor, "*batch d_in"]:
        """Take raw vectors into the space that is reconstructed.

        Args:
            hook: As in `LayerLens.transform`; without a lens all hooks are the same.

        Raises:
            ValueError: As `LayerLens.transform`.
        """
        return x if self.lens is None else self.lens.transform(x, hook)

    def out_of_lens(
        self, z: Float[Tensor, "*batch d_in"], hook: int | str | None = None
    ) -> Float[Tensor, "*batch d_in"]:
        """Take reconstructions back to raw space."""
        return z if self.lens is None else self.lens.invert(z, hook)

    @override
    def process_sae_in(
        self, sae_in: Float[Tensor, "*batch d_in"], hook: int | str | None = None
    ) -> Float[Tensor, "*batch d_in"]:
        """What the encoder multiplies; `hook_sae_input` sees raw vectors.

        Args:
            hook: As in `into_lens`.
        """
        x = self.hook_sae_input(self.reshape_fn_in(sae_in.to(self.dtype)))
        return self.run_time_activation_norm_fn_in(self.into_lens(x, hook)) - self.b_dec

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        if self.lens is not None:
            self.lens.check_tensors(_lens_tensors(state_dict))


def lens_of(sae: SAE[Any]) -> LayerLens | None:
    """The lens of an SAE of any class, or None."""
    return sae.lens if isinstance(sae, LensCarrier) else None


def _lens_tensors(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(LENS_PREFIX): tensor
        for name, tensor in state_dict.items()
        if name.startswith(LENS_PREFIX)
    }


def saved_lens(folder: Path) -> LayerLens | None:
    """The lens of a saved SAE, or None.

    Raises:
        ValueError: If its settings are wrong, or its tensors are not theirs or not
            finite.
    """
    cfg: dict[str, Any] = json.loads((folder / SAE_CFG_FILENAME).read_text())
    stated = cfg.get("metadata", {}).get("tuned_lens")
    if stated is None:
        return None
    tensors = _lens_tensors(load_file(folder / SAE_WEIGHTS_FILENAME))
    try:
        lens = LayerLens(LensConfig.from_dict(stated), device="meta")
        lens.check_tensors(tensors)
    except ValueError as error:
        raise ValueError(f"The lens of the SAE in {folder}: {error}") from error
    lens.load_state_dict(tensors, assign=True)
    return lens


def check_lenses(model: Model, saes: Iterable[SAE[Any]], stacklevel: int) -> None:
    """Check that the lenses of these SAEs were made for this model.

    Raises:
        ValueError: If one has another width or depth.
    """
    # Views share the lens of their SAE, and hashing a model takes long.
    lenses = {
        (lens.config.unembed_hash, lens.config.n_layers, lens.config.d_in): lens
        for lens in map(lens_of, saes)
        if lens is not None
    }
    for lens in lenses.values():
        lens.check_model(model, stacklevel)
