"""One invertible affine map per hook, as a module and as hooks of a model."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from tuned_lens import TunedLens
from tuned_lens.nn.lenses import TunedLensConfig

from sae_lens_multilayer import hooks
from sae_lens_multilayer.files import complete_or_absent, read_json, read_tensors
from sae_lens_multilayer.lens.affine import AffineMap
from sae_lens_multilayer.lens.config import Alignment, LensConfig
from sae_lens_multilayer.lens.tuned_lens_files import read_tuned_lens
from sae_lens_multilayer.models.kinds import as_model

HookFunction = Callable[..., Tensor]

SETTINGS_FILENAME, TENSORS_FILENAME = "lens.json", "lens.safetensors"


class LayerLens(nn.Module):
    """One invertible affine map per hook, applied before an SAE and undone after it.

    A hook is given by its name or its index on the layer axis (not its block number).
    The state dict holds `{i}.weight` and `{i}.bias` for each index i whose map is not
    the identity. There are no parameters.
    """

    def __init__(
        self,
        config: LensConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Create a lens of zeros, that is the identity, to load tensors into."""
        super().__init__()
        self.config = config
        zeros = partial(torch.zeros, dtype=dtype, device=device)
        d_in = config.d_in
        for i, name in enumerate(config.hook_names):
            if config.has_map(name):
                self.add_module(str(i), AffineMap(name, zeros(d_in, d_in), zeros(d_in)))

    @classmethod
    def from_tensors(
        cls, config: LensConfig, tensors: Mapping[str, Tensor]
    ) -> "LayerLens":
        """Create a lens from a state dict, without copying it.

        Raises ValueError for a NaN, or an I + W with a condition number above 1e6.
        """
        if not_finite := [n for n, t in tensors.items() if not t.isfinite().all()]:
            raise ValueError(f"{not_finite} of the lens must not hold NaN or infinity.")
        lens = cls(config, device="meta")
        try:
            lens.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise ValueError(
                f"The tensors must be those of a lens of {config}; {error}"
            ) from error
        for affine_map in lens.children():
            assert isinstance(affine_map, AffineMap)
            affine_map.factorize()
        return lens

    @classmethod
    def from_tuned_lens(
        cls,
        source: TunedLens | str | Path,
        hook_names: Sequence[str],
        *,
        alignment: Alignment = "tuned_lens",
        model: Any = None,
        **load_kwargs: Any,
    ) -> "LayerLens":
        """Use the translators of a tuned lens that belong to these hooks.

        Args:
            source: A lens, a folder that tuned-lens saved, or a name in tuned-lens'
                hub space, such as "EleutherAI/pythia-70m-deduped".
            hook_names: The hooks, in the order of the layer axis.
            alignment: See `LensConfig`.
            model: The model to check the lens against; see `check_model`.
            load_kwargs: For `tuned_lens.load_artifacts.load_lens_artifacts`, such as
                `revision` and `cache_dir`.
        """
        tuned_config, tensors = read_tuned_lens(source, **load_kwargs)
        lens = cls.from_translators(tuned_config, tensors, hook_names, alignment)
        if model is not None:
            lens.check_model(model, stacklevel=3)
        return lens

    @classmethod
    def from_translators(
        cls,
        tuned_config: TunedLensConfig,
        tensors: Mapping[str, Tensor],
        hook_names: Sequence[str],
        alignment: Alignment = "tuned_lens",
    ) -> "LayerLens":
        """Copy the tensors `{i}.weight` and `{i}.bias` that belong to these hooks."""
        config = LensConfig.from_tuned_lens(tuned_config, hook_names, alignment)
        if not tuned_config.bias:
            zeros = tensors["0.weight"].new_zeros(config.d_in)
            biases = (f"{i}.bias" for i in range(config.n_layers))
            tensors = {**tensors, **dict.fromkeys(biases, zeros)}
        chosen = {
            # Two hooks may have the same translator; safetensors refuses shared memory.
            f"{i}.{part}": tensors[f"{translator}.{part}"].detach().clone()
            for i, name in enumerate(config.hook_names)
            if (translator := config.translator(name)) is not None
            for part in ("weight", "bias")
        }
        return cls.from_tensors(config, chosen)

    @classmethod
    def from_maps(
        cls,
        config: LensConfig,
        maps: Sequence[Float[Tensor, "d_in d_in"]],
        biases: Sequence[Float[Tensor, " d_in"]],
    ) -> "LayerLens":
        """The lens `z = x A + b` in float32, with a matrix and a bias for each hook."""
        tensors: dict[str, Tensor] = {}
        for i, (a, b) in enumerate(zip(maps, biases, strict=True)):
            # safetensors refuses shared memory, and strides such as those of a.T.
            tensors[f"{i}.weight"] = (
                (a.T - torch.eye(len(a)).to(a)).float().contiguous()
            )
            tensors[f"{i}.bias"] = b.float().clone()
        return cls.from_tensors(config, tensors)

    @classmethod
    def load(cls, folder: str | Path) -> "LayerLens":
        """Load a lens from a folder that `save` wrote."""
        folder = Path(folder).expanduser()
        settings = read_json(folder / SETTINGS_FILENAME)
        tensors = read_tensors(folder / TENSORS_FILENAME)
        return cls.from_tensors(LensConfig(**settings), tensors)

    def save(self, folder: str | Path) -> None:
        """Save to a new folder: `lens.json` and `lens.safetensors`."""
        tensors = {name: t.contiguous() for name, t in self.state_dict().items()}
        with complete_or_absent(Path(folder).expanduser()) as path:
            settings = json.dumps(self.config.to_dict(), indent=2)
            (path / SETTINGS_FILENAME).write_text(settings)
            save_file(tensors, path / TENSORS_FILENAME)

    @property
    def hook_names(self) -> list[str]:
        """`config.hook_names`."""
        return list(self.config.hook_names)

    def transform(
        self, x: Float[Tensor, "*batch d_in"], hook: int | str | None = None
    ) -> Float[Tensor, "*batch d_in"]:
        """Map vectors into the space of the lens: `z = x + x W^T + b`.

        Args:
            hook: The hook of all the vectors; None: [*batch, layer, d_in], all hooks
                of this lens.
        """
        return self._map_vectors(AffineMap.forward, x, hook)

    def invert(
        self, z: Float[Tensor, "*batch d_in"], hook: int | str | None = None
    ) -> Float[Tensor, "*batch d_in"]:
        """Undo `transform`: `(I + W) x = z - b`, solved in float64."""
        return self._map_vectors(AffineMap.invert, z, hook)

    def transform_difference(
        self, dx: Float[Tensor, "*batch d_in"], hook: int | str | None = None
    ) -> Float[Tensor, "*batch d_in"]:
        """The difference of transformed vectors from theirs: `dx + dx W^T`."""
        return self.transform(dx, hook) - self.transform(torch.zeros_like(dx), hook)

    def invert_difference(
        self, dz: Float[Tensor, "*batch d_in"], hook: int | str | None = None
    ) -> Float[Tensor, "*batch d_in"]:
        """The difference of raw vectors from that of transformed ones: `T^-1` without
        bias."""
        return self.invert(dz, hook) - self.invert(torch.zeros_like(dz), hook)

    def hook(self, hook: int | str, inverse: bool = False) -> tuple[str, HookFunction]:
        """A hook name and function for `run_with_hooks`.

        The hook names of a SAETransformerBridge differ: see `Model.own_hook_names`.
        """
        i = self._index(hook)
        change = self.invert if inverse else self.transform

        def hook_function(activations: Tensor, hook: Any = None) -> Tensor:
            del hook  # TransformerLens passes the hook point by this name
            return change(activations, i)

        return self.config.hook_names[i], hook_function

    def select(self, hook_names: Sequence[str]) -> "LayerLens":
        """The lens of some of the hooks, sharing tensors as in `AffineMap.shared`."""
        config = replace(self.config, hook_names=list(hook_names))
        lens = LayerLens(config, device="meta")
        for i, name in enumerate(hook_names):
            affine_map = self._map(name)
            if affine_map is not None:
                lens.add_module(str(i), affine_map.shared())
        return lens

    def is_same(self, other: "LayerLens") -> bool:
        """Whether the other lens, such as an SAE's in its dtype, is this one."""
        theirs = other.state_dict()
        return other.config == self.config and all(
            torch.equal(tensor.to(theirs[name]), theirs[name])
            for name, tensor in self.state_dict().items()
        )

    def check_model(self, model: Any, stacklevel: int = 2) -> None:
        """Check that the lens was made for this model.

        Another width or depth is a ValueError. Another hash of the unembedding is a
        warning: usually the weights were folded or centred on loading.
        """
        model = as_model(model)
        self.config.check_shape(model.shape, model.name)
        expected = self.config.unembed_hash
        if expected is None:
            return
        found = model.unembedding_hash()
        if found != expected:
            warnings.warn(
                "The lens may be for another model: it was made for "
                f"{self.config.base_model_name!r} with unembedding hash {expected}, "
                f"and {model.name!r} has {found}. Load a HookedTransformer with "
                "`from_pretrained_no_processing`.",
                stacklevel=stacklevel,
            )

    def _map(self, hook: int | str) -> AffineMap | None:
        affine_map = self._modules.get(str(self._index(hook)))
        assert affine_map is None or isinstance(affine_map, AffineMap)
        return affine_map

    def _index(self, hook: int | str) -> int:
        names = self.config.hook_names
        if isinstance(hook, str):
            return hooks.find_hook(names, hook)
        if not 0 <= hook < len(names):
            raise ValueError(
                f"The lens has {len(names)} hooks; {hook} is not an index."
            )
        return hook

    def _map_vectors(
        self,
        change: Callable[[AffineMap, Tensor], Tensor],
        x: Tensor,
        hook: int | str | None,
    ) -> Tensor:
        n_hooks = len(self.config.hook_names)
        if hook is None and n_hooks == 1:
            hook = 0
        if hook is not None:
            affine_map = self._map(hook)
            return x if affine_map is None else change(affine_map, x)
        if x.ndim < 2 or x.shape[-2] != n_hooks:
            raise ValueError(
                f"Without `hook`, the lens needs vectors [*batch, layer = {n_hooks}, "
                f"d_in]; got shape {tuple(x.shape)}. For one hook, give `hook`."
            )
        parts = [self._map_vectors(change, x[..., i, :], i) for i in range(n_hooks)]
        return torch.stack(parts, dim=-2)
