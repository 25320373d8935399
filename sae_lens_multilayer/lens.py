"""One affine translator per layer, its exact inverse, and which layer uses which."""

import json
import pickle
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from tuned_lens import TunedLens
from tuned_lens.load_artifacts import load_lens_artifacts
from tuned_lens.nn.lenses import TunedLensConfig
from typing_extensions import override

from sae_lens_multilayer import hooks
from sae_lens_multilayer.lens_fit import name_of_model, unembedding_hash

Alignment = Literal["tuned_lens", "reference"]
HookFunction = Callable[..., Tensor]

MAX_CONDITION_NUMBER = 1e6
"""Of I + W in the 2-norm. Above it, float32 activations do not survive the inverse."""

_BEFORE_BLOCK = re.compile(r"blocks\.(\d+)\.hook_(?:resid_pre|in)")
_AFTER_BLOCK = re.compile(
    r"blocks\.(\d+)\.hook_(?:resid_post|out)"
    rf"|{hooks.HF_BLOCK}(\d+)"
)


def translator_of(
    hook_name: str, n_layers: int, alignment: Alignment = "tuned_lens"
) -> int | None:
    """Which of tuned-lens' translators belongs to a hook; None: the identity.

    Translator i was trained on the input of block i, so the output of block l uses
    l + 1, and the output of the last block none.

    Args:
        hook_name: The residual stream before or after a block, in TransformerLens'
            or Hugging Face's words (a block of a Hugging Face model is its output).
        n_layers: Number of blocks of the model.
        alignment: "reference" uses translator l for the output of block l, as the
            paper's code did; only for the published `-lens` checkpoints.

    Raises:
        ValueError: If the hook cannot have a lens, or is not in the model.

    Example:
        >>> translator_of("blocks.0.hook_resid_pre", 6)
        0
        >>> translator_of("blocks.0.hook_resid_post", 6)
        1
        >>> translator_of("model.layers.5", 6) is None
        True
    """
    before = _BEFORE_BLOCK.fullmatch(hook_name)
    after = _AFTER_BLOCK.fullmatch(hook_name)
    match = before or after
    if match is None:
        raise ValueError(
            f"{hook_name!r} cannot have a tuned lens: hooks that can are "
            "'blocks.{layer}.hook_resid_pre', 'blocks.{layer}.hook_resid_post', and "
            "a Hugging Face model's blocks, as 'model.layers.{layer}'. Choose those, "
            "or leave out the lens."
        )
    layer = int(next(group for group in match.groups() if group))
    if layer >= n_layers:
        raise ValueError(
            f"The lens is for a model of {n_layers} blocks; {hook_name!r} is not one "
            "of them. Use the lens of this model."
        )
    if before or alignment == "reference":
        return layer
    return layer + 1 if layer + 1 < n_layers else None


@dataclass(frozen=True)
class LensConfig:
    """What a lens is, apart from its tensors."""

    hook_names: list[str]
    """The hooks, in the order of the layer axis."""
    n_layers: int
    """Number of blocks of the model, which is tuned-lens' number of translators."""
    d_in: int
    """Width of the residual stream."""
    alignment: Alignment = "tuned_lens"
    """Which translator a block's output uses; see `translator_of`."""
    base_model_name: str | None = None
    """The model that the lens was trained for, as tuned-lens names it."""
    base_model_revision: str | None = None
    """Its revision."""
    unembed_hash: str | None = None
    """tuned-lens' hash of that model's unembedding."""

    def __post_init__(self) -> None:
        """Check what cannot be right for any model."""
        hooks.check_hook_choice("", self.hook_names, None)
        if self.alignment not in get_args(Alignment):
            raise ValueError(
                f"`alignment` must be one of {get_args(Alignment)}; got "
                f"{self.alignment!r}."
            )
        for name in self.hook_names:
            translator_of(name, self.n_layers, self.alignment)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LensConfig":
        """Undo `to_dict`.

        Raises:
            ValueError: If a key is unknown or missing.
        """
        known = [field.name for field in fields(cls)]
        required = {"hook_names", "n_layers", "d_in"}
        if not required <= set(values) <= set(known):
            raise ValueError(
                f"The settings of a lens must be among {known}, with "
                f"{sorted(required)}; got {sorted(values)}."
            )
        return cls(**values)


class _Factors:
    """LU factors of I + W, shared by all that share the tensor W, until W changes."""

    def __init__(self) -> None:
        self._of = WeakTensorKeyDictionary()

    def of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        version = 0 if weight.is_inference() else weight._version
        held = self._of.get(weight)
        if held is None or held[0] != version:
            # Made in inference mode they could not be used by autograd later.
            with torch.inference_mode(False), torch.no_grad():
                held = version, *_factorize(weight)
            self._of[weight] = held
        return held[1], held[2]


def _factorize(weight: Tensor) -> tuple[Tensor, Tensor]:
    # float64, whatever the lens has: the error is the condition number times epsilon.
    dtype = torch.float32 if weight.device.type == "mps" else torch.float64
    lu, pivots, _ = torch.linalg.lu_factor_ex(_plus_identity(weight.to(dtype)))
    if not (lu.isfinite().all() and lu.diagonal().all()):
        raise ValueError(
            "A translator of the lens has no inverse: I + W is singular or not finite. "
            "Was the lens loaded?"
        )
    return lu, pivots


def _plus_identity(weight: Tensor) -> Tensor:
    return weight + torch.eye(len(weight), dtype=weight.dtype, device=weight.device)


_factors = _Factors()


class _Translator(nn.Module):
    """x + x W^T + b, as `TunedLens.transform_hidden`, and the inverse of that."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        # Buffers: nothing trains them.
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    @override
    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        # In bfloat16 it would no longer be what `invert` undoes.
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(dtype)
            z = wide + F.linear(wide, self.weight.to(dtype), self.bias.to(dtype))
        return z.to(x.dtype)

    def invert(self, z: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        lu, pivots = _factors.of(self.weight)
        rows = (z.to(lu.dtype) - self.bias.to(lu.dtype)).reshape(-1, z.shape[-1])
        # Solves x (I + W)^T = z - b.
        with torch.autocast(z.device.type, enabled=False):
            x = torch.linalg.lu_solve(lu, pivots, rows, left=False, adjoint=True)
        return x.reshape(z.shape).to(z.dtype)


class LayerLens(nn.Module):
    """One invertible affine map per hook, applied before an SAE and undone after it.

    Its hooks are given by their position on the layer axis or by their name. As a
    module it travels with an SAE: `state_dict` holds `{i}.weight` and `{i}.bias` for
    each position i that has a translator, and `.to` moves it. It has no parameters.
    """

    def __init__(self, config: LensConfig, dtype: torch.dtype = torch.float32) -> None:
        """Make a lens that is the identity, to load tensors into."""
        super().__init__()
        self.config = config
        d_in = config.d_in
        for i, translator in enumerate(self._translator_numbers()):
            if translator is not None:
                weight = torch.zeros(d_in, d_in, dtype=dtype)
                self._set(i, weight, torch.zeros(d_in, dtype=dtype))

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
        """Take the translators of a tuned lens that these hooks use; the rest is left.

        Args:
            source: A lens, a folder that tuned-lens saved, or a name in tuned-lens'
                hub space, as "EleutherAI/pythia-70m-deduped".
            hook_names: The hooks, in the order of the layer axis.
            alignment: See `translator_of`.
            model: The model it is meant for, to check that it fits; see `check_model`.
            load_kwargs: For `tuned_lens.load_artifacts.load_lens_artifacts`:
                `revision`, `cache_dir`, `repo_id`, `repo_type`.

        Raises:
            ValueError: If there is no such lens, it is not a linear one, its tensors
                do not have the shapes that it states, one is not finite, I + W of a
                translator in use has a condition number above 1e6, or a hook cannot
                have a lens.
        """
        stated, tensors = _read(source, load_kwargs)
        config = LensConfig(
            hook_names=list(hook_names),
            n_layers=stated.num_hidden_layers,
            d_in=stated.d_model,
            alignment=alignment,
            base_model_name=stated.base_model_name_or_path,
            base_model_revision=stated.base_model_revision,
            unembed_hash=stated.unembed_hash,
        )
        lens = cls(config)
        if model is not None:
            lens.check_model(model, stacklevel=3)
        for i, translator in enumerate(lens._translator_numbers()):
            if translator is not None:
                weight, bias = (
                    # A copy each: two hooks may have the same translator.
                    tensors[f"{translator}.{name}"].detach().clone()
                    for name in ("weight", "bias")
                )
                _check_condition(weight, translator, hook_names[i])
                lens._set(i, weight, bias)
        return lens

    @classmethod
    def from_state_dict(
        cls, config: LensConfig, tensors: Mapping[str, Tensor], prefix: str = "lens."
    ) -> "LayerLens":
        """Undo `lens.config` and `lens.state_dict(prefix=...)`, keeping the dtype.

        Args:
            tensors: May hold others, whose names do not start with `prefix`.

        Raises:
            ValueError: If a tensor is missing, unknown, of another shape or not finite.
        """
        lens = cls(config)
        own = {
            name.removeprefix(prefix): tensor.detach().clone()
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        _check_tensors(own, {k: v.shape for k, v in lens.state_dict().items()})
        lens.load_state_dict(own, assign=True)
        return lens

    @property
    def hook_names(self) -> list[str]:
        """The hooks, in the order of the layer axis."""
        return list(self.config.hook_names)

    def transform(
        self, x: Float[Tensor, "*batch d_in"], hook: int | str
    ) -> Float[Tensor, "*batch d_in"]:
        """Into the space of the lens; `x` itself where the hook has no translator.

        Computed in the wider of the two dtypes and given back in that of `x`.
        """
        translator = self._translator(hook)
        return x if translator is None else translator(x)

    def invert(
        self, z: Float[Tensor, "*batch d_in"], hook: int | str
    ) -> Float[Tensor, "*batch d_in"]:
        """Back from the space of the lens: solves `(I + W) x = z - b` in float64."""
        translator = self._translator(hook)
        return z if translator is None else translator.invert(z)

    def transform_layers(
        self, x: Float[Tensor, "*batch layer d_in"]
    ) -> Float[Tensor, "*batch layer d_in"]:
        """`transform` for vectors of all hooks."""
        return self._each(self.transform, x)

    def invert_layers(
        self, z: Float[Tensor, "*batch layer d_in"]
    ) -> Float[Tensor, "*batch layer d_in"]:
        """`invert` for vectors of all hooks."""
        return self._each(self.invert, z)

    def hook(self, hook: int | str, inverse: bool = False) -> tuple[str, HookFunction]:
        """A hook name and function for `run_with_hooks`.

        The two directions in sequence leave the model as it was. A
        SAETransformerBridge has names of its own: see `hooks.model_hook_names`.

        Args:
            hook: Position on the layer axis, or hook name.
            inverse: Give the function that takes the transform back.
        """
        i = self._position(hook)
        change = self.invert if inverse else self.transform

        def hook_function(activations: Tensor, hook: Any = None) -> Tensor:
            del hook  # TransformerLens passes the hook point by this name
            return change(activations, i)

        return self.config.hook_names[i], hook_function

    def select(self, hook_names: Sequence[str]) -> "LayerLens":
        """The lens of some of the hooks, which shares their tensors.

        Converting one of the two leaves the other as it is.
        """
        positions = [self._position(name) for name in hook_names]
        lens = LayerLens(replace(self.config, hook_names=list(hook_names)))
        for new, old in enumerate(positions):
            translator = self._translator(old)
            if translator is not None:
                lens._set(new, translator.weight, translator.bias)
        return lens

    def check_shape(self, shape: hooks.ModelShape, model_name: str) -> None:
        """Raise ValueError if the lens is of another width or depth than the model."""
        own = (self.config.n_layers, self.config.d_in)
        if own != (shape.n_layers, shape.d_model):
            raise ValueError(
                f"The lens of {self.config.base_model_name!r} is for {own[0]} blocks "
                f"of width {own[1]}; {model_name!r} has {shape.n_layers} of width "
                f"{shape.d_model}. Use the lens of this model or fit one with "
                "`fit_tuned_lens`."
            )

    def check_model(self, model: Any, stacklevel: int = 2) -> None:
        """Check that the lens was made for this model.

        An unembedding that hashes otherwise is a warning. Weights that were folded or
        centred on loading mostly do, and their residual stream is another.

        Raises:
            ValueError: If it is of another width or depth.
        """
        name = name_of_model(model)
        self.check_shape(hooks.shape_of_model(model), name)
        found, stated = unembedding_hash(model), self.config.unembed_hash
        if stated is not None and found != stated:
            warnings.warn(
                "The tuned lens may be for another model: it was made for "
                f"{self.config.base_model_name!r} with unembedding hash {stated}, and "
                f"{name!r} has {found}. A HookedTransformer must be loaded with "
                "`from_pretrained_no_processing`.",
                stacklevel=stacklevel,
            )

    @override
    def extra_repr(self) -> str:
        plain = [name for name in self.hook_names if self._translator(name) is None]
        return (
            f"{self.config.base_model_name!r}, alignment={self.config.alignment!r}, "
            f"hooks={self.hook_names}, identity at {plain}"
        )

    def _translator_numbers(self) -> list[int | None]:
        c = self.config
        return [translator_of(n, c.n_layers, c.alignment) for n in c.hook_names]

    def _set(self, i: int, weight: Tensor, bias: Tensor) -> None:
        self.add_module(str(i), _Translator(weight, bias))

    def _translator(self, hook: int | str) -> _Translator | None:
        translator = self._modules.get(str(self._position(hook)))
        assert translator is None or isinstance(translator, _Translator)
        return translator

    def _position(self, hook: int | str) -> int:
        names = self.config.hook_names
        if isinstance(hook, str):
            return hooks.find_hook(names, hook)
        if not 0 <= hook < len(names):
            raise ValueError(
                f"The lens has {len(names)} hooks; position {hook} on the layer axis "
                f"is not in [0, {len(names)})."
            )
        return hook

    def _each(self, change: Callable[[Tensor, int], Tensor], x: Tensor) -> Tensor:
        n_hooks = len(self.config.hook_names)
        if x.shape[-2] != n_hooks:
            raise ValueError(
                f"The layer axis must hold the lens' {n_hooks} hooks; got shape "
                f"{tuple(x.shape)}."
            )
        return torch.stack([change(x[..., i, :], i) for i in range(n_hooks)], dim=-2)


def _read(
    source: TunedLens | str | Path, load_kwargs: Mapping[str, Any]
) -> tuple[TunedLensConfig, dict[str, Tensor]]:
    """The settings and the checked tensors of a lens of tuned-lens."""
    if isinstance(source, TunedLens):
        config, tensors = source.config, source.layer_translators.state_dict()
    else:
        config, tensors = _read_files(source, load_kwargs)
    if config.lens_type != TunedLensConfig.lens_type:
        raise ValueError(
            f"`lens_type` must be {TunedLensConfig.lens_type!r}; got "
            f"{config.lens_type!r}."
        )
    d_in, numbers = config.d_model, range(config.num_hidden_layers)
    shapes = {f"{i}.weight": torch.Size([d_in, d_in]) for i in numbers}
    if config.bias:
        shapes.update({f"{i}.bias": torch.Size([d_in]) for i in numbers})
    _check_tensors(tensors, shapes)
    if not config.bias:
        zeros = {f"{i}.bias": tensors[f"{i}.weight"].new_zeros(d_in) for i in numbers}
        tensors = {**tensors, **zeros}
    return config, tensors


def _read_files(
    source: str | Path, load_kwargs: Mapping[str, Any]
) -> tuple[TunedLensConfig, dict[str, Tensor]]:
    try:
        config_path, tensors_path = load_lens_artifacts(str(source), **load_kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"There is no tuned lens {str(source)!r}: it must be a folder with "
            "config.json and params.pt, or a name in tuned-lens' hub space that is "
            f"cached or can be reached ({type(error).__name__}: {error})."
        ) from error
    try:
        config = TunedLensConfig.from_dict(json.loads(config_path.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config_path} is not of a tuned lens: {error}") from error
    try:
        # Nothing but tensors: a pickle can run any code.
        tensors = torch.load(tensors_path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{tensors_path} must hold tensors only, as tuned-lens saves them: {error}"
        ) from error
    return config, tensors


def _check_tensors(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
) -> None:
    if set(tensors) != set(shapes):
        raise ValueError(
            f"The lens must hold the tensors {sorted(shapes)}; missing: "
            f"{sorted(set(shapes) - set(tensors))}, unknown: "
            f"{sorted(set(tensors) - set(shapes))}. Is it for a model of another depth?"
        )
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise ValueError(
                f"{name!r} of the lens must have the shape {tuple(shapes[name])}; got "
                f"{tuple(tensor.shape)}. Is it for a model of another width?"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{name!r} of the lens holds NaN or infinite values.")


def _check_condition(weight: Tensor, translator: int, hook_name: str) -> None:
    values = torch.linalg.svdvals(_plus_identity(weight.cpu().double()))
    condition = (values[0] / values[-1]).item()
    if not condition <= MAX_CONDITION_NUMBER:
        raise ValueError(
            f"Translator {translator} of the lens, for {hook_name!r}, cannot be "
            f"inverted well: cond(I + W) = {condition:.3g}, and at most "
            f"{MAX_CONDITION_NUMBER:.0e} is allowed. Leave out this hook or fit "
            "another lens."
        )
