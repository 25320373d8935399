"""One affine translator per layer and its exact inverse, as a module and as hooks."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from tuned_lens import TunedLens
from typing_extensions import override

from sae_lens_multilayer import hooks
from sae_lens_multilayer.lens.config import Alignment, LensConfig, translator_of
from sae_lens_multilayer.lens.tuned_lens_files import check_tensors, read_tuned_lens
from sae_lens_multilayer.models.kinds import as_model

HookFunction = Callable[..., Tensor]

MAX_CONDITION_NUMBER = 1e6
"""Of I + W in the 2-norm. Above it, float32 activations do not survive the inverse."""


class _Factors:
    """LU factors of I + W, shared by all that share the tensor W, until W changes."""

    def __init__(self) -> None:
        self._of = WeakTensorKeyDictionary()

    def of(self, weight: Tensor, what: str) -> tuple[Tensor, Tensor]:
        held = self._of.get(weight)
        # W itself is kept: its version does not count writes through `.data`, and in
        # inference mode it has none.
        if held is None or not _are_same(held[0], weight):
            # Made in inference mode they could not be used by autograd later.
            with torch.inference_mode(False), torch.no_grad():
                held = weight.clone(), *_factorize(weight, what)
            self._of[weight] = held
        return held[1], held[2]


def _are_same(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.device) == (b.dtype, b.device) and torch.equal(a, b)


def _factorize(weight: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """LU factors of I + W, once they are known to be good.

    Args:
        what: The translator, for the message.

    Raises:
        ValueError: If the condition number is above `MAX_CONDITION_NUMBER`.
    """
    # float64, whatever the lens has: the error is the condition number times epsilon.
    dtype = torch.float32 if weight.device.type == "mps" else torch.float64
    identity = torch.eye(len(weight), dtype=dtype, device=weight.device)
    matrix = identity + weight.to(dtype)
    lu, pivots, _ = torch.linalg.lu_factor_ex(matrix)
    inverse = torch.linalg.lu_solve(lu, pivots, identity)
    # A bound from above spares most matrices the singular values, which take longer.
    if not matrix.norm() * inverse.norm() <= MAX_CONDITION_NUMBER:
        _check_condition(matrix, weight.dtype, what)
    return lu, pivots


def _check_condition(matrix: Tensor, dtype: torch.dtype, what: str) -> None:
    condition = math.nan
    if matrix.isfinite().all():
        values = torch.linalg.svdvals(matrix.cpu().double())
        condition = (values[0] / values[-1]).item() if values[-1] > 0 else math.inf
    if not condition <= MAX_CONDITION_NUMBER:
        raise ValueError(
            f"{what} cannot be inverted well: cond(I + W) = {condition:.3g} in "
            f"{dtype}, and at most {MAX_CONDITION_NUMBER:.0e} is allowed. Leave out "
            "this hook, fit another lens, or use a wider dtype if rounding to this one "
            "has done it."
        )


_factors = _Factors()


class _Translator(nn.Module):
    """x + x W^T + b, as `TunedLens.transform_hidden`, and the inverse of that."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, what: str) -> None:
        super().__init__()
        self._what = what
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
        lu, pivots = _factors.of(self.weight, self._what)
        rows = (z.to(lu.dtype) - self.bias.to(lu.dtype)).reshape(-1, z.shape[-1])
        # Solves x (I + W)^T = z - b.
        with torch.autocast(z.device.type, enabled=False):
            x = torch.linalg.lu_solve(lu, pivots, rows, left=False, adjoint=True)
        return x.reshape(z.shape).to(z.dtype)

    def check(self) -> None:
        """Raise ValueError if it cannot be inverted well."""
        _factorize(self.weight, self._what)


class LayerLens(nn.Module):
    """One invertible affine map per hook, applied before an SAE and undone after it.

    A hook is given by its position on the layer axis (not its block number) or by its
    name. As a module it travels with an SAE: `state_dict` holds `{i}.weight` and
    `{i}.bias` for each position i that has a translator, and `.to` moves it. It has no
    parameters.
    """

    def __init__(
        self,
        config: LensConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Make a lens that is the identity, to load tensors into."""
        super().__init__()
        self.config = config
        zeros = partial(torch.zeros, dtype=dtype, device=device)
        for i, translator in enumerate(self._translator_numbers()):
            if translator is not None:
                self._set(i, zeros(config.d_in, config.d_in), zeros(config.d_in))

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
        stated, tensors = read_tuned_lens(source, load_kwargs)
        config = LensConfig.from_tuned_lens(stated, hook_names, alignment)
        if model is not None:
            cls(config, device="meta").check_model(model, stacklevel=3)
        return cls.from_translators(config, tensors)

    @classmethod
    def from_translators(
        cls, config: LensConfig, tensors: Mapping[str, Tensor]
    ) -> "LayerLens":
        """Take the translators that the hooks use from those of all blocks.

        Args:
            tensors: `{i}.weight` and `{i}.bias` of each translator in use, as in the
                files of tuned-lens; there may be others.

        Raises:
            ValueError: If a tensor is missing, of another shape or not finite, or I + W
                has a condition number above 1e6.
        """
        lens = cls(config, device="meta")
        numbers = lens._translator_numbers()
        used = {i: t for i, t in enumerate(numbers) if t is not None}
        # A copy each: two hooks may have the same translator.
        own = {
            f"{i}.{name}": tensors[f"{translator}.{name}"].detach().clone()
            for i, translator in used.items()
            for name in ("weight", "bias")
            if f"{translator}.{name}" in tensors
        }
        lens.check_tensors(own)
        lens.load_state_dict(own, assign=True)
        for translator in lens.children():
            assert isinstance(translator, _Translator)
            translator.check()
        return lens

    @property
    def hook_names(self) -> list[str]:
        """The hooks, in the order of the layer axis."""
        return list(self.config.hook_names)

    def transform(
        self, x: Float[Tensor, "*batch d_in"], hook: int | str | None = None
    ) -> Float[Tensor, "*batch d_in"]:
        """Into the space of the lens; `x` itself where the hook has no translator.

        Computed in the wider of the two dtypes and given back in that of `x`.

        Args:
            hook: The hook of all the vectors; None: the only one, or if there are
                several, `x` is [*batch, layer, d_in] with vectors of all of them.

        Raises:
            ValueError: If there is no such hook, or no axis of all hooks.
        """
        return self._each(_Translator.__call__, x, hook)

    def invert(
        self, z: Float[Tensor, "*batch d_in"], hook: int | str | None = None
    ) -> Float[Tensor, "*batch d_in"]:
        """Back from the space of the lens: solves `(I + W) x = z - b` in float64.

        Args:
            hook: As in `transform`.

        Raises:
            ValueError: As `transform`, or if I + W has a condition number above 1e6.
        """
        return self._each(_Translator.invert, z, hook)

    def hook(self, hook: int | str, inverse: bool = False) -> tuple[str, HookFunction]:
        """A hook name and function for `run_with_hooks`.

        The two directions in sequence leave the model as it was. A
        SAETransformerBridge has names of its own: see `Model.own_hook_names`.

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
        config = replace(self.config, hook_names=list(hook_names))
        lens = LayerLens(config, device="meta")
        for new, old in enumerate(positions):
            translator = self._translator(old)
            if translator is not None:
                lens._set(new, translator.weight, translator.bias)
        return lens

    def check_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless this could be a state dict of this lens.

        That is if a tensor is missing, unknown, of another shape or not finite.
        """
        check_tensors(tensors, {k: v.shape for k, v in self.state_dict().items()})

    def check_model(self, model: Any, stacklevel: int = 2) -> None:
        """Check that the lens was made for this model.

        An unembedding that hashes otherwise is a warning. Weights that were folded or
        centred on loading mostly do, and their residual stream is another.

        Raises:
            ValueError: If it is of another width or depth.
        """
        model = as_model(model)
        self.config.check_shape(model.shape, model.name)
        stated = self.config.unembed_hash
        if stated is None:
            return
        found = model.unembedding_hash()
        if found != stated:
            warnings.warn(
                "The tuned lens may be for another model: it was made for "
                f"{self.config.base_model_name!r} with unembedding hash {stated}, and "
                f"{model.name!r} has {found}. A HookedTransformer must be loaded with "
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
        number, name = self._translator_numbers()[i], self.config.hook_names[i]
        what = f"Translator {number} of the lens, for {name!r},"
        self.add_module(str(i), _Translator(weight, bias, what))

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

    def _each(
        self,
        change: Callable[[_Translator, Tensor], Tensor],
        x: Tensor,
        hook: int | str | None,
    ) -> Tensor:
        n_hooks = len(self.config.hook_names)
        if hook is None and n_hooks == 1:
            hook = 0
        if hook is not None:
            translator = self._translator(hook)
            return x if translator is None else change(translator, x)
        if x.ndim < 2 or x.shape[-2] != n_hooks:
            raise ValueError(
                f"The lens has {n_hooks} hooks and needs vectors of all of them, "
                f"[*batch, layer = {n_hooks}, d_in]; got shape {tuple(x.shape)}. For "
                "vectors of one hook give its position or name as `hook`, or use the "
                "SAE's view of it."
            )
        parts = [self._each(change, x[..., i, :], i) for i in range(n_hooks)]
        return torch.stack(parts, dim=-2)
