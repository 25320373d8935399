"""Encodes and reconstructs the vectors of each hook with its SAE, ours or stock."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor
from typing_extensions import TypeIs

from sae_lens_multilayer.evaluation.metrics import LayerMetrics, LayerSums
from sae_lens_multilayer.models.model import check_widths
from sae_lens_multilayer.sae.multi_layer_sae import MultiLayerSAE, MultiLayerTrainingSAE
from sae_lens_multilayer.sae.token_sae import TokenSAE
from sae_lens_multilayer.sae.views import views
from sae_lens_multilayer.topk.sparse import TopKActs

_MAX_ROWS = 4096
_DENSE_ELEMENTS = 2**24
"""Activations of a dense encoder held at a time: 64 MiB of float32."""


@dataclass
class NonzeroActs:
    """The nonzero activations of some vectors, ordered by vector."""

    row: Int[Tensor, " act"]
    """Index of the vector."""
    latent: Int[Tensor, " act"]
    value: Float[Tensor, " act"]


class LayerEncoder:
    """One SAE for all hooks, or one SAE for each, behind one interface.

    Attributes:
        hook_names: The hooks, in the order of the layer axis.
        saes: The SAE of each hook; an SAE of several hooks is repeated.
        is_shared: Whether one SAE is used at all hooks.
    """

    def __init__(
        self,
        sae: SAE[Any] | Sequence[SAE[Any]],
        hook_names: Sequence[str] | None = None,
    ) -> None:
        """Assign an SAE to each hook.

        Args:
            sae: An SAE trained on several hooks, ours or stock; or one or several SAEs
                of one hook each.
            hook_names: Hooks at which the one SAE given is used, instead of its own.
        """
        self.saes: list[Any] = list(sae) if isinstance(sae, Sequence) else [sae]
        names = hook_names
        if isinstance(sae, SAE) and names is None:
            names = sae.cfg.metadata.hook_names
        self.is_shared = bool(names)
        if names:
            self.saes = [_inference_form(self.saes[0])] * len(names)
        else:
            names = [one.cfg.metadata.hook_name for one in self.saes]
            if not names or None in names or len(set(names)) != len(names):
                raise ValueError(
                    "Each SAE in a list must name its own hook in `cfg.metadata."
                    f"hook_name`; got {names}. Give an SAE of several hooks by itself."
                )
        self.hook_names = list(names)

    def own_hook(self, layer: int) -> int:
        """Index of a hook among those of its SAE: an SAE in a list has one only."""
        return layer if self.is_shared else 0

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "token layer d_in"]) -> NonzeroActs:
        """Encode all hooks with their SAE; rows are `token * n_layers + layer`."""
        assert self.is_shared
        sae = self.saes[0]
        if isinstance(sae, TokenSAE):
            of_tokens, layers = sae.encode_topk(x), range(x.shape[1])
            values = torch.stack([sae.acts_at(of_tokens, i) for i in layers], dim=1)
            indices = of_tokens.indices.repeat_interleave(x.shape[1], dim=0)
            return _nonzero_topk(values.flatten(0, 1), indices)
        if is_multi_layer(sae):
            acts = sae.encode_topk(x)
            return _nonzero_topk(acts.values.flatten(0, 1), acts.indices.flatten(0, 1))
        size = rows_at_a_time(sae)
        parts = [_nonzero(sae.encode(rows)) for rows in x.flatten(0, 1).split(size)]
        return NonzeroActs(
            torch.cat([part.row + i * size for i, part in enumerate(parts)]),
            torch.cat([part.latent for part in parts]),
            torch.cat([part.value for part in parts]),
        )

    @torch.no_grad()
    def reconstruct(
        self, layer: int, x: Float[Tensor, "row d_in"]
    ) -> tuple[NonzeroActs, Float[Tensor, "row d_in"]]:
        """Encode and reconstruct raw vectors of the hook at this index."""
        sae = self.saes[layer]
        if is_multi_layer(sae):
            own_layer = self.own_hook(layer)
            acts = sae.encode_topk(x, own_layer)
            x_hat = sae.decode_topk(acts, own_layer)
            return _nonzero_topk(acts.values, acts.indices), x_hat
        dense = sae.encode(x)
        return _nonzero(dense), sae.decode(dense)

    @torch.no_grad()
    def reconstruct_layer(
        self, layer: int, acts: TopKActs
    ) -> tuple[NonzeroActs, Float[Tensor, "row d_in"]]:
        """The same for an SAE that has encoded all layers of the rows' tokens."""
        sae = self.saes[layer]
        at_layer = _nonzero_topk(sae.acts_at(acts, layer), acts.indices)
        return at_layer, sae.decode_layer(acts, layer)


class ReconstructionSums:
    """Reconstructs vectors batch by batch and adds up the metrics of each layer."""

    def __init__(self, encoder: LayerEncoder) -> None:
        """Start with no tokens."""
        self.encoder = encoder
        self._by_layer: dict[int, LayerSums] = {}
        self._acts: TopKActs | None = None

    def start(self, vectors: Callable[[], Sequence[Tensor]]) -> None:
        """Begin a batch of tokens, given a function that returns its vectors by hook.

        It is called for an SAE that encodes all layers of a token together. Each layer
        is then reconstructed from these vectors.
        """
        sae = self.encoder.saes[0]
        if isinstance(sae, TokenSAE):
            # A model on several devices gives vectors on each.
            x = [v.flatten(0, -2).to(sae.device) for v in vectors()]
            self._acts = sae.encode_topk(torch.stack(x, dim=1))

    def reconstruct(
        self,
        layer: int,
        x: Float[Tensor, "*batch d_in"],
        counted: Bool[Tensor, "*batch"] | None = None,
    ) -> Float[Tensor, "*batch d_in"]:
        """Reconstruct vectors of a hook; those `counted` are added to the metrics."""
        sae = self.encoder.saes[layer]
        check_widths({self.encoder.hook_names[layer]: x.shape[-1]}, sae.cfg.d_in)
        if counted is None:
            counted = torch.zeros(x.shape[:-1], dtype=torch.bool)
        flat = x.flatten(0, -2).to(sae.device)
        counted = counted.flatten().to(sae.device)
        size = rows_at_a_time(sae)
        parts: list[Tensor] = []
        for start in range(0, len(flat), size):
            some = slice(start, start + size)
            acts, x_hat = self._reconstruct(layer, flat, some)
            self._add(layer, flat[some], x_hat, acts, counted[some])
            parts.append(x_hat)
        return torch.cat(parts).view(x.shape).to(x.device, x.dtype)

    def _reconstruct(
        self, layer: int, x: Float[Tensor, "token d_in"], some: slice
    ) -> tuple[NonzeroActs, Float[Tensor, "row d_in"]]:
        if self._acts is None:
            return self.encoder.reconstruct(layer, x[some])
        return self.encoder.reconstruct_layer(layer, self._acts[some])

    def _add(
        self,
        layer: int,
        x: Float[Tensor, "row d_in"],
        x_hat: Float[Tensor, "row d_in"],
        acts: NonzeroActs,
        keep: Bool[Tensor, " row"],
    ) -> None:
        if not keep.any():
            return
        latent, value = acts.latent, acts.value
        if not keep.all():
            x, x_hat, act_is_kept = x[keep], x_hat[keep], keep[acts.row]
            latent, value = latent[act_is_kept], value[act_is_kept]
        d_sae = self.encoder.saes[layer].cfg.d_sae
        sums = LayerSums.of_layer(x, x_hat, latent, value, d_sae)
        before = self._by_layer.get(layer)
        self._by_layer[layer] = sums if before is None else before + sums

    def compute(self) -> LayerMetrics:
        """The metrics of all counted vectors; see `LayerMetrics.of_layers`."""
        if not self._by_layer:
            raise ValueError("Metrics need at least one token; got none.")
        names = self.encoder.hook_names
        layers = [self._by_layer[layer] for layer in range(len(names))]
        return LayerMetrics.of_layers(names, layers, self.encoder.is_shared)


def rows_at_a_time(sae: SAE[Any]) -> int:
    """Number of vectors that are encoded at once."""
    if is_multi_layer(sae) or isinstance(sae, TokenSAE):
        return _MAX_ROWS
    return max(1, min(_MAX_ROWS, _DENSE_ELEMENTS // sae.cfg.d_sae))


def is_multi_layer(sae: SAE[Any]) -> TypeIs[MultiLayerSAE | MultiLayerTrainingSAE]:
    return isinstance(sae, (MultiLayerSAE, MultiLayerTrainingSAE))


def _inference_form(sae: SAE[Any]) -> SAE[Any]:
    is_ours = is_multi_layer(sae) or isinstance(sae, TokenSAE)
    is_stock_of_several = not is_ours and sae.cfg.metadata.hook_names
    # All views of a stock SAE compute the same.
    return views(sae)[0] if is_stock_of_several else sae


def _nonzero(acts: Float[Tensor, "row d_sae"]) -> NonzeroActs:
    row, latent = acts.nonzero(as_tuple=True)
    return NonzeroActs(row, latent, acts[row, latent])


def _nonzero_topk(
    values: Float[Tensor, "row k"], indices: Int[Tensor, "row k"]
) -> NonzeroActs:
    row, rank = values.nonzero(as_tuple=True)
    return NonzeroActs(row, indices[row, rank], values[row, rank])
