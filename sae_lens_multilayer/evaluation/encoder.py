"""Reconstructs the vectors of each hook and counts what the SAE did."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor

from sae_lens_multilayer.evaluation.metrics import LayerMetrics, LayerSums
from sae_lens_multilayer.models.shape import check_widths
from sae_lens_multilayer.sae.multi_layer_sae import MultiLayerSAE, MultiLayerTrainingSAE
from sae_lens_multilayer.sae.views import hook_names_of, views

_VECTORS_AT_A_TIME = 4096


class Codec:
    """One SAE for all hooks, or one for each, behind one interface.

    Attributes:
        hook_names: The hooks, in the order of the layer axis.
        saes: The SAE of each hook; that of several hooks is there once for each.
    """

    def __init__(
        self,
        sae: SAE[Any] | Sequence[SAE[Any]],
        hook_names: Sequence[str] | None = None,
    ) -> None:
        """Take the SAEs and start to count.

        Args:
            sae: An SAE trained on several hooks, ours or stock; or one or several SAEs
                of one hook each, such as views or ordinary SAELens SAEs.
            hook_names: Hooks at which one SAE of one hook is used, whichever its own
                is; None: the hooks that the SAEs were trained on.

        Raises:
            ValueError: If there is something else than SAEs, one does not name its
                hook, or two name the same one.
        """
        _check_saes(sae)
        if isinstance(sae, SAE) and hook_names is not None:
            self.hook_names = list(hook_names)
            self.saes = [sae] * len(self.hook_names)
            self._sums = [_no_sums(sae, len(self.hook_names))]
            return
        if isinstance(sae, SAE) and _is_of_one_hook(sae):
            sae = [sae]
        if isinstance(sae, SAE):
            self.hook_names = hook_names_of(sae)
            is_ours = isinstance(sae, (MultiLayerSAE, MultiLayerTrainingSAE))
            self.saes = [sae if is_ours else views(sae)[0]] * len(self.hook_names)
            self._sums = [_no_sums(sae, len(self.hook_names))]
        else:
            self.hook_names = _single_hook_names(sae)
            self.saes = list(sae)
            self._sums = [_no_sums(one, 1) for one in sae]

    @property
    def model_name(self) -> str:
        """The name of the model that the SAEs were trained on."""
        return str(self.saes[0].cfg.metadata.model_name)

    def reconstruct(
        self,
        hook: int,
        x: Float[Tensor, "*batch d_in"],
        counted: Bool[Tensor, "*batch"] | None = None,
    ) -> Float[Tensor, "*batch d_in"]:
        """Reconstruct vectors of a hook, in raw space and their own dtype.

        Args:
            hook: Position on the layer axis.
            counted: Vectors that are added to the metrics, of the same tokens at every
                hook; None: none.

        Raises:
            ValueError: If the vectors are not as wide as the SAE's `d_in`.
        """
        sae = self.saes[hook]
        check_widths({self.hook_names[hook]: x.shape[-1]}, sae.cfg.d_in)
        flat = x.flatten(0, -2).to(sae.device)
        if counted is None:
            counted = torch.zeros(x.shape[:-1], dtype=torch.bool)
        counted = counted.flatten().to(flat.device)
        sums, layer = self._sums_of(hook)
        if layer == 0:
            sums.n_tokens += int(counted.sum())
        blocks = zip(
            flat.split(_VECTORS_AT_A_TIME),
            counted.split(_VECTORS_AT_A_TIME),
            strict=True,
        )
        parts = [self._block(hook, rows, keep) for rows, keep in blocks]
        return torch.cat(parts).view(x.shape).to(x.device, x.dtype)

    def _block(
        self, hook: int, x: Float[Tensor, "act d_in"], keep: Bool[Tensor, " act"]
    ) -> Float[Tensor, "act d_in"]:
        sums, layer = self._sums_of(hook)
        x_hat, n_active, sum_acts = _encode_decode(self.saes[hook], layer, x, keep)
        if keep.any():
            sums.add_layer(layer, x[keep], x_hat[keep], n_active, sum_acts)
        return x_hat

    def compute(self) -> LayerMetrics:
        """The metrics of all vectors that were counted.

        Raises:
            ValueError: As `LayerSums.compute`.
        """
        if len(self._sums) == 1:
            return self._sums[0].compute(self.hook_names)
        return LayerMetrics.concatenate(
            [
                sums.compute([name])
                for sums, name in zip(self._sums, self.hook_names, strict=True)
            ]
        )

    def _sums_of(self, hook: int) -> tuple[LayerSums, int]:
        return (self._sums[0], hook) if len(self._sums) == 1 else (self._sums[hook], 0)


def _encode_decode(
    sae: SAE[Any], layer: int, x: Float[Tensor, "act d_in"], keep: Bool[Tensor, " act"]
) -> tuple[Float[Tensor, "act d_in"], Int[Tensor, " d_sae"], Float[Tensor, ""]]:
    """Reconstructions, and how often each latent is active and how much all are.

    Args:
        layer: Position of the vectors' hook on the layer axis of the SAE.
    """
    if isinstance(sae, (MultiLayerSAE, MultiLayerTrainingSAE)):
        acts = sae.encode_topk(x, layer)
        values = acts.values[keep]
        fired = acts.indices[keep][values > 0]
        n_active = fired.bincount(minlength=sae.cfg.d_sae)
        return sae.decode_topk(acts, layer), n_active, values.sum()
    dense = sae.encode(x)
    values = dense[keep]
    return sae.decode(dense), (values != 0).sum(0), values.abs().sum()


def _no_sums(sae: SAE[Any], n_layers: int) -> LayerSums:
    return LayerSums.zeros(n_layers, sae.cfg.d_in, sae.cfg.d_sae)


def _check_saes(sae: object) -> None:
    several = list(sae) if isinstance(sae, Sequence) else [sae]
    other = [one for one in several if not isinstance(one, SAE)]
    if other:
        raise ValueError(
            "`sae` must be an SAE or a list of SAEs of one hook each; got "
            f"{sae if isinstance(sae, str) else type(other[0]).__name__!r}. "
            "`SAE.load_from_disk(folder)` loads one."
        )


def _is_of_one_hook(sae: SAE[Any]) -> bool:
    metadata = sae.cfg.metadata
    return not metadata.hook_names and metadata.hook_name is not None


def _single_hook_names(saes: Sequence[SAE[Any]]) -> list[str]:
    names = [sae.cfg.metadata.hook_name for sae in saes]
    if not names or None in names or len(set(names)) != len(names):
        raise ValueError(
            "Each of several SAEs must name its own hook in `cfg.metadata.hook_name`, "
            "and an SAE of several hooks is given by itself, not in a list; got "
            f"{names}."
        )
    return names
