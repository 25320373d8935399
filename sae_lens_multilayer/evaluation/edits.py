"""Edits of the residual stream: changes of latents' activations, reconstructions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor

from sae_lens_multilayer.evaluation.encoder import LayerEncoder, is_multi_layer
from sae_lens_multilayer.hooks import find_hook
from sae_lens_multilayer.lens.carrier import lens_of

EditKind = Literal["scale", "add", "set", "reconstruct"]


@dataclass(frozen=True)
class LatentEdit:
    """A change of latents' activations at some layers and positions, in one run.

    The vector changes by `(a' - a) std W_dec[j]` for each latent, with a and a' the
    activation before and after, through the inverse of the lens if the SAE has one.
    What the SAE does not reconstruct stays (the error term). Activations are in the
    SAE's units: of standardised vectors if it standardises its input, so that the same
    value has the same relative effect at every layer. Each layer is encoded in the
    edited run.
    """

    kind: EditKind
    """"scale" by `value`: 0 ablates, 2 doubles; "add" `value`, also where the latent is
    not active; "set" to `value`; or "reconstruct" by the SAE, without error term."""
    layers: Sequence[int | str]
    """Block numbers or hook names."""
    latents: Sequence[int] = ()
    """Edited together; not used by "reconstruct"."""
    value: float = 0.0
    positions: Sequence[int] | slice | Bool[Tensor, "prompt pos"] | None = None
    """Edited positions of each prompt, or a mask; None: all."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(EditKind):
            raise ValueError(
                f"`kind` must be in {get_args(EditKind)}; got {self.kind!r}."
            )
        if not math.isfinite(self.value):
            raise ValueError(
                f"The value of an edit (alpha, or what is added) must be finite; got "
                f"{self.value}."
            )

    def replacements(
        self, encoder: LayerEncoder, counted: Bool[Tensor, "prompt pos"] | None = None
    ) -> "dict[int, LatentReplacement]":
        """The replacement at each edited hook, by its index on the layer axis.

        Args:
            counted: Other positions are not edited.
        """
        hooks = [find_hook(encoder.hook_names, layer) for layer in self.layers]
        d_sae = min(encoder.saes[hook].cfg.d_sae for hook in hooks)
        if unknown := [j for j in self.latents if not 0 <= j < d_sae]:
            raise ValueError(f"Latents must be in [0, {d_sae}); got {unknown}.")
        return {hook: LatentReplacement(self, encoder, hook, counted) for hook in hooks}

    def mask(self, shape: torch.Size) -> Bool[Tensor, "prompt pos"]:
        """Which positions of prompts of this shape are edited."""
        if isinstance(self.positions, Tensor):
            return self.positions.cpu()
        mask = torch.zeros(shape, dtype=torch.bool)
        chosen = slice(None) if self.positions is None else self.positions
        mask[:, chosen if isinstance(chosen, slice) else list(chosen)] = True
        return mask


class LatentReplacement:
    """Replaces the vectors of one hook; counts where the edited latents are active."""

    def __init__(
        self,
        edit: LatentEdit,
        encoder: LayerEncoder,
        hook: int,
        counted: Bool[Tensor, "prompt pos"] | None,
    ) -> None:
        """See `LatentEdit.replacements`."""
        self._edit, self._encoder, self._hook = edit, encoder, hook
        self._counted = counted
        d_sae = encoder.saes[hook].cfg.d_sae
        self.counts = torch.zeros(d_sae, dtype=torch.int64)
        """Positions at which each latent of the SAE was active before the edit."""
        self.n_positions = 0

    @torch.no_grad()
    def __call__(
        self, x: Float[Tensor, "prompt pos d_in"]
    ) -> Float[Tensor, "prompt pos d_in"]:
        mask = self._edit.mask(x.shape[:2])
        if self._counted is not None:
            mask = mask & self._counted
        mask = mask.to(x.device)
        if not mask.any():
            return x
        sae = self._encoder.saes[self._hook]
        rows = x[mask].to(sae.device)
        after = x.clone()
        after[mask] = self._changed(sae, rows).to(x)
        return after

    def _changed(
        self, sae: SAE[Any], x: Float[Tensor, "row d_in"]
    ) -> Float[Tensor, "row d_in"]:
        if self._edit.kind == "reconstruct":
            return self._encoder.reconstruct(self._hook, x)[1]
        if not is_multi_layer(sae):
            return x + self._decoded(sae, x, edited=True) - self._decoded(sae, x)
        own_hook = self._encoder.own_hook(self._hook)
        acts = sae.encode_topk(x, own_hook)
        latents = torch.tensor(self._edit.latents, device=x.device)
        self._count(acts.indices[acts.values > 0], len(x))
        is_latent = acts.indices.unsqueeze(-1) == latents  # [row, k, latent]
        before = (acts.values.unsqueeze(-1) * is_latent).sum(1)
        change = (self._after(before) - before) @ sae.W_dec[latents]
        dx = out_of_lens(sae, change * acts.std, own_hook)
        return x.to(dx.dtype) + dx

    def _after(self, acts: Float[Tensor, "row latent"]) -> Float[Tensor, "row latent"]:
        if self._edit.kind == "scale":
            return self._edit.value * acts
        if self._edit.kind == "add":
            return acts + self._edit.value
        return torch.full_like(acts, self._edit.value)

    def _count(self, active: Int[Tensor, " act"], n_positions: int) -> None:
        self.counts += active.cpu().bincount(minlength=len(self.counts))
        self.n_positions += n_positions

    def _decoded(
        self, sae: SAE[Any], x: Float[Tensor, "row d_in"], edited: bool = False
    ) -> Float[Tensor, "row d_in"]:
        """The reconstruction of a stock SAE; decoding uses statistics of encoding."""
        acts = sae.encode(x)
        if edited:
            self._count((acts > 0).nonzero()[:, 1], len(x))
            latents = list(self._edit.latents)
            acts[:, latents] = self._after(acts[:, latents])
        return sae.decode(acts)


def out_of_lens(
    sae: SAE[Any], change: Float[Tensor, "*batch d_in"], hook: int | str | None
) -> Float[Tensor, "*batch d_in"]:
    """A change of a vector in raw space, from the change in the SAE's space."""
    lens = lens_of(sae)
    return change if lens is None else lens.invert_difference(change, hook)


def latent_vector(
    encoder: LayerEncoder,
    hook: int,
    latent: int | Int[Tensor, " row"],
    length: float | Float[Tensor, "row 1"] = 1.0,
) -> Float[Tensor, "*row d_in"]:
    """The raw vector of a latent at a hook: `T^-1 W_dec[j]` times a length."""
    sae = encoder.saes[hook]
    return out_of_lens(sae, length * sae.W_dec[latent], encoder.own_hook(hook))
