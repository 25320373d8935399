"""The multi-layer SAE: one TopK SAE for the residual-stream vectors of all layers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor
from typing_extensions import override

from sae_lens_multilayer.published.loader import own_or_mlsae_disk_loader
from sae_lens_multilayer.sae.config import (
    MultiLayerSAEConfig,
    MultiLayerTrainingSAEConfig,
)
from sae_lens_multilayer.sae.sparse_training import SparseTrainingSAE
from sae_lens_multilayer.sae.topk_weights import T_CONFIG, TopKWeights
from sae_lens_multilayer.sae.views import view, views
from sae_lens_multilayer.topk import reference, sparse


class _MultiLayerWeights(TopKWeights[T_CONFIG]):
    """Base of the inference and the training class: weights, encoding, views."""

    @override
    def encode(
        self, x: Float[Tensor, "*batch d_in"], hook: int | str | None = None
    ) -> Float[Tensor, "*batch d_sae"]:
        """Dense activations of all latents; `encode_topk` is the sparse version.

        Args:
            x: Vectors in raw space. Without a lens, the batch axes may mix layers. With
                a lens and without `hook`, the shape is [*batch, layer, d_in].
            hook: With a lens, the hook of all the vectors: its name or its index on the
                layer axis (not its block number).
        """
        return self.encode_with_hidden_pre(x, hook)[0]

    @override
    def decode(
        self, feature_acts: Float[Tensor, "*batch d_sae"], hook: int | str | None = None
    ) -> Float[Tensor, "*batch d_in"]:
        """Reconstruct the vectors that were last encoded, in raw space.

        As in SAELens, this uses and deletes the mean and standard deviation stored by
        the last `encode`, which had the same `hook`.
        """
        recons = self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)
        return self.out_of_lens(self.run_time_activation_norm_fn_out(recons), hook)

    @torch.no_grad()
    def encode_topk(
        self, x: Float[Tensor, "*batch d_in"], hook: int | str | None = None
    ) -> sparse.TopKActs:
        """The k largest latents of each vector, after ReLU; see `encode`."""
        return sparse.encode_topk(
            self.into_lens(x.to(self.dtype), hook),
            self.W_enc,
            self.b_dec,
            self.cfg.k,
            standardize_inputs=self.standardizes,
        )

    @torch.no_grad()
    def decode_topk(
        self, acts: sparse.TopKActs, hook: int | str | None = None
    ) -> Float[Tensor, "*batch d_in"]:
        """Reconstruct vectors in raw space; `hook` is that given to `encode_topk`."""
        z_hat = sparse.decode_topk(acts, self.W_dec, self.b_dec)
        return self.out_of_lens(z_hat, hook)

    def view(self, layer_or_hook_name: int | str) -> SAE[Any]:
        """An ordinary SAE for one hook, sharing this SAE's memory; see `view`."""
        return view(self, layer_or_hook_name)

    def views(self) -> list[SAE[Any]]:
        """The views of all hooks, in the order of the layer axis."""
        return views(self)


class MultiLayerSAE(_MultiLayerWeights[MultiLayerSAEConfig]):
    """One TopK SAE whose weights are tied across the layers of a transformer.

    `u = (z - mean) / (std + 1e-5); a = ReLU(TopK((u - b_dec) W_enc));
    z_hat = (a W_dec + b_dec) * std + mean`, for a vector x of any hooked layer. With a
    tuned lens z = T(x) and x_hat = T^-1(z_hat) with T of that layer, else z is x.

    References:
        Lawson et al. (2025), arXiv:2409.04185, section 3.
    """

    @override
    @classmethod
    def load_from_disk(
        cls,
        path: str | Path,
        device: str = "cpu",
        dtype: str | None = None,
        converter: Callable[..., Any] = own_or_mlsae_disk_loader,
        fold_W_dec_norm: bool = False,
    ) -> "MultiLayerSAE":
        """Load a folder that SAELens saved, or the published files of an MLSAE."""
        return super().load_from_disk(path, device, dtype, converter, fold_W_dec_norm)


class MultiLayerTrainingSAE(
    _MultiLayerWeights[MultiLayerTrainingSAEConfig],
    SparseTrainingSAE[MultiLayerTrainingSAEConfig],
):
    """The multi-layer SAE in training; see `SparseTrainingSAE`."""

    dense_loss = staticmethod(reference.training_loss)
