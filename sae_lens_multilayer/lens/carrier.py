"""The base class of SAEs that can work in the space of a lens and store it."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE, SAEConfig
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from safetensors import safe_open
from torch import Tensor
from typing_extensions import override

from sae_lens_multilayer.files import read_json
from sae_lens_multilayer.lens.config import LensConfig
from sae_lens_multilayer.lens.lens import LayerLens
from sae_lens_multilayer.models.model import Model
from sae_lens_multilayer.topk.tile import wide_dtype

LENS_PREFIX = "lens."
"""Prefix of the names of a lens' tensors in the state dict of an SAE."""
BYTES_SUFFIXES = {
    ".float32_bytes": torch.float32,
    ".float64_bytes": torch.float64,
}
"""Suffixes of these names in the file of an SAE, which has the tensors' bytes."""


class LensCarrier(SAE[Any]):
    """An SAE whose input is mapped into a lens' space and whose output is mapped back.

    `z = T(x)`, the SAE reconstructs z, and `x_hat = T^-1(z_hat)`, with T the map of the
    vector's hook. The settings of the lens are `cfg.metadata.lens` and its
    tensors are in the state dict, so it is saved, loaded and moved with the SAE.
    """

    lens: LayerLens | None
    """The lens, or None, on the SAE's device and in its dtype, or float32 if that is
    narrower. Setting it also replaces `cfg`, which other SAEs may use, and copies only
    tensors that must be converted."""

    def __init__(self, cfg: SAEConfig, use_error_term: bool = False) -> None:
        """Create the lens that `cfg` describes, to load tensors into."""
        super().__init__(cfg, use_error_term)
        settings = cfg.metadata.lens
        self.lens = None
        if settings is not None:
            self.lens = LayerLens(
                LensConfig(**settings), wide_dtype(self.dtype), self.device
            )

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        # Not a property: Module registers a submodule before it looks for one.
        if name == "lens":
            value = self._own_lens(value)
        super().__setattr__(name, value)

    def _own_lens(self, lens: LayerLens | None) -> LayerLens | None:
        if lens is not None:
            hook_names = self.cfg.metadata.hook_names or lens.hook_names
            lens.config.check_sae(self.cfg.d_in, hook_names)
        settings = None if lens is None else lens.config.to_dict()
        if settings != self.cfg.metadata.lens:
            # Another SAE may use the same config object.
            self.cfg = copy.deepcopy(self.cfg)
            self.cfg.metadata.__dict__.pop("lens", None)
            if settings is not None:
                self.cfg.metadata.lens = settings
        if lens is None:
            return None
        return lens.select(lens.hook_names).to(self.device, wide_dtype(self.dtype))

    def into_lens(
        self, x: Float[Tensor, "*batch d_in"], hook: int | str | None = None
    ) -> Float[Tensor, "*batch d_in"]:
        """Map raw vectors into the space that is reconstructed; see `LayerLens`."""
        return x if self.lens is None else self.lens.transform(x, hook)

    def out_of_lens(
        self, z: Float[Tensor, "*batch d_in"], hook: int | str | None = None
    ) -> Float[Tensor, "*batch d_in"]:
        """Map reconstructions back to raw space."""
        return z if self.lens is None else self.lens.invert(z, hook)

    @override
    def process_sae_in(
        self, sae_in: Float[Tensor, "*batch d_in"], hook: int | str | None = None
    ) -> Float[Tensor, "*batch d_in"]:
        """The encoder's input; the hook `hook_sae_input` has raw vectors."""
        x = self.hook_sae_input(self.reshape_fn_in(sae_in.to(self.dtype)))
        return self.run_time_activation_norm_fn_in(self.into_lens(x, hook)) - self.b_dec

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        # SAELens converts all tensors to the dtype asked for on loading, in which W may
        # not be accurate. Bytes, numbers below 256, are the same in any dtype.
        suffixes = {dtype: suffix for suffix, dtype in BYTES_SUFFIXES.items()}
        for name in [n for n in state_dict if n.startswith(LENS_PREFIX)]:
            tensor = state_dict.pop(name).contiguous()
            state_dict[name + suffixes[tensor.dtype]] = tensor.view(torch.uint8)

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        names = [name for name in state_dict if name.startswith(LENS_PREFIX)]
        state_dict.update(_from_bytes({name: state_dict.pop(name) for name in names}))


def _from_bytes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors, from their bytes in any dtype if their names have a suffix for this."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, dot, suffix = name.rpartition(".")
        dtype = BYTES_SUFFIXES.get(dot + suffix)
        is_bytes = dtype is not None
        found[stem if is_bytes else name] = (
            tensor.to(torch.uint8).view(dtype) if is_bytes else tensor
        )
    return found


def lens_of(sae: SAE[Any]) -> LayerLens | None:
    """The lens of an SAE of any class, or None."""
    return sae.lens if isinstance(sae, LensCarrier) else None


def saved_lens(folder: Path) -> LayerLens | None:
    """The lens of a saved SAE, or None, read without the SAE's own weights."""
    settings = read_json(folder / SAE_CFG_FILENAME).get("metadata", {})
    if settings.get("lens") is None:
        return None
    with safe_open(folder / SAE_WEIGHTS_FILENAME, "pt") as file:
        tensors = {
            name.removeprefix(LENS_PREFIX): file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118  (not iterable)
            if name.startswith(LENS_PREFIX)
        }
    return LayerLens.from_tensors(LensConfig(**settings["lens"]), _from_bytes(tensors))


def check_lenses(model: Model, saes: Iterable[SAE[Any]], stacklevel: int) -> None:
    """`LayerLens.check_model` for the lenses of several SAEs."""
    # Views share the lens of their SAE, and hashing a model takes long.
    lenses = {
        (lens.config.unembed_hash, lens.config.n_layers, lens.config.d_in): lens
        for lens in map(lens_of, saes)
        if lens is not None
    }
    for lens in lenses.values():
        lens.check_model(model, stacklevel)
