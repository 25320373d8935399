"""Metrics of reconstruction at each layer, from sums over tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from sae_lens_multilayer.hooks import layer_labels
from sae_lens_multilayer.pictures.description import FVU_LABEL, Picture, layer_panel
from sae_lens_multilayer.ranks import Ranks
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.topk.tile import LayerMoments

_ROUNDING = 1e-12
"""Share of the squared norms below which a variance is only rounding error."""


@dataclass
class LayerSums:
    """Sums over tokens at one layer or at each of several, and the metrics they give.

    `a + b` are the sums over the tokens of both. Vectors are in raw space, or in the
    space of a lens where the training loss is taken there. The training step builds
    them from its own sums, without reconstructions.
    """

    moments: LayerMoments
    """Number of tokens, mean and squared deviations of the vectors."""
    sum_sq_error: Float[Tensor, "*layer"]
    """Sum of squared distances between vectors and reconstructions."""
    n_active: Int[Tensor, "*layer"]
    """Number of active latents, summed over tokens."""
    sum_acts: Float[Tensor, "*layer"]
    """Sum of activations."""
    fire_counts: Int[Tensor, "*layer d_sae"] | None = None
    """Number of tokens at which each latent was active; None: not counted by layer."""

    @classmethod
    def of_layer(
        cls,
        x: Float[Tensor, "token d_in"],
        x_hat: Float[Tensor, "token d_in"],
        latents: Int[Tensor, " act"],
        values: Float[Tensor, " act"],
        d_sae: int,
    ) -> "LayerSums":
        """Sums over the tokens of one layer, in float64 on the CPU."""
        x, x_hat = _double(x), _double(x_hat)
        moments = LayerMoments.of(x)
        fire_counts = latents.bincount(minlength=d_sae).cpu()
        return cls(
            LayerMoments(len(x), moments.mean.cpu(), moments.sum_sq_deviation.cpu()),
            (x_hat - x).square().sum().cpu(),
            fire_counts.sum(),
            _double(values).abs().sum().cpu(),
            fire_counts,
        )

    @property
    def n_tokens(self) -> int:
        """Number of tokens at each layer."""
        return self.moments.n_tokens

    @property
    def fvu(self) -> Float[Tensor, "*layer"]:
        """Squared error over squared deviations from the layer's mean vector."""
        return self.sum_sq_error / self.moments.sum_sq_deviation

    @property
    def fvu_scalar(self) -> Float[Tensor, "*layer"]:
        """Mean squared error over the variance of all entries about one mean."""
        return self.mse / self.moments.variance

    @property
    def mse(self) -> Float[Tensor, "*layer"]:
        """Mean squared error over tokens and dimensions."""
        return self.sum_sq_error / self.moments.n_entries

    @property
    def l0(self) -> Float[Tensor, "*layer"]:
        """Mean number of active latents per vector."""
        return self.n_active.to(self.sum_acts.dtype) / self.n_tokens

    @property
    def l1(self) -> Float[Tensor, "*layer"]:
        """Mean sum of activations per vector."""
        return self.sum_acts / self.n_tokens

    def __add__(self, other: "LayerSums") -> "LayerSums":
        both = None
        if self.fire_counts is not None and other.fire_counts is not None:
            both = self.fire_counts + other.fire_counts
        return LayerSums(
            self.moments + other.moments,
            self.sum_sq_error + other.sum_sq_error,
            self.n_active + other.n_active,
            self.sum_acts + other.sum_acts,
            both,
        )

    def over_ranks(self, ranks: Ranks) -> "LayerSums":
        """Sums over the tokens of all ranks, which have equally many."""
        ranks.sum_(self.sum_sq_error, self.n_active, self.sum_acts)
        moments = self.moments.over_ranks(ranks)
        return LayerSums(moments, self.sum_sq_error, self.n_active, self.sum_acts)


def _double(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    # Apple's GPUs have no float64.
    return (x.cpu() if x.is_mps else x).double()


@dataclass
class LayerMetrics:
    """How well an SAE reconstructs each of its hooks, in their order."""

    hook_names: list[str]
    n_tokens: int
    fvu: Float[Tensor, " layer"]
    """Fraction of variance unexplained, around the layer's mean vector: 1 minus
    SAELens' explained variance. 0 is exact."""
    fvu_scalar: Float[Tensor, " layer"]
    """Mean squared error over the variance of all entries about one mean: the paper's
    FVU, and the training loss."""
    mse: Float[Tensor, " layer"]
    """Mean over tokens and dimensions of the squared error."""
    l0: Float[Tensor, " layer"]
    """Mean number of active latents per vector."""
    l1: Float[Tensor, " layer"]
    """Mean sum of activations per vector."""
    silent_fraction: Float[Tensor, " layer"]
    """Fraction of latents that were not active at this layer on these tokens."""
    dead_fraction: Float[Tensor, " layer"]
    """Fraction of latents that were not active at any layer of their SAE on these
    tokens: the same at all layers of one SAE."""

    @classmethod
    def of_layers(
        cls, hook_names: Sequence[str], layers: Sequence[LayerSums], shared_sae: bool
    ) -> "LayerMetrics":
        """The metrics of each layer from its sums over the same tokens.

        ValueError if a vector or reconstruction is not finite, or a layer's vectors do
        not vary. `shared_sae` is whether one SAE is used at all layers.
        """
        _check_defined(hook_names, layers)
        counts = (layer.fire_counts for layer in layers)
        silent = [count == 0 for count in counts if count is not None]
        dead = [torch.stack(silent).all(0)] * len(silent) if shared_sae else silent
        names = ("fvu", "fvu_scalar", "mse", "l0", "l1")
        return cls(
            list(hook_names),
            layers[0].n_tokens,
            *(torch.stack([getattr(layer, n) for layer in layers]) for n in names),
            silent_fraction=torch.stack(
                [latents.double().mean() for latents in silent]
            ),
            dead_fraction=torch.stack([latents.double().mean() for latents in dead]),
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each hook, in order; the index is the hook name."""
        columns = [f.name for f in fields(LayerMetrics)][2:]
        return pd.DataFrame(
            {name: getattr(self, name).numpy() for name in columns},
            index=pd.Index(self.hook_names, name="hook_name"),
        )

    def pictures(self, **context: Any) -> dict[str, Picture]:
        """As in `Result`."""
        series = {
            "around the mean vector (fvu)": self.fvu.numpy(),
            "about one mean (fvu_scalar)": self.fvu_scalar.numpy(),
        }
        panel = layer_panel(self.hook_names, FVU_LABEL, series)
        title = f"Reconstruction on {self.n_tokens:,} held-out tokens"
        return {"": Picture(title, [panel])}

    def mean(self) -> pd.Series:
        """The mean over layers of every column."""
        return self.to_dataframe().mean()

    def to_log_dict(self) -> dict[str, float]:
        """Flat keys for loggers: `layer_3/fvu` and so on."""
        labels = layer_labels(self.hook_names)
        return {
            f"{label}/{column}": float(value)
            for label, (_, row) in zip(
                labels, self.to_dataframe().iterrows(), strict=True
            )
            for column, value in row.items()
        }


@dataclass
class SpliceMetrics(LayerMetrics, Result):
    """How well an SAE reconstructs each layer, and the model's loss with it, in nats.

    Each hook is spliced by itself.
    """

    ce_loss_clean: float
    """Mean cross-entropy over predicted tokens, model untouched."""
    ce_loss_spliced: Float[Tensor, " layer"]
    """The same with the layer's vectors replaced by their reconstructions."""
    kl_div: Float[Tensor, " layer"]
    """Mean over positions of KL(clean ‖ spliced), as in SAELens."""
    kl_div_reverse: Float[Tensor, " layer"]
    """Mean over positions of KL(spliced ‖ clean), as in the paper's code (which sums it
    over the positions of a prompt)."""
    ce_loss_ablated: Float[Tensor, " layer"]
    """Mean cross-entropy with the layer ablated at every position."""
    together: dict[str, float] | None = None
    """`ce_loss_spliced`, `delta_ce`, `kl_div` and `kl_div_reverse` of one run with
    several layers replaced; None if not requested. Each is reconstructed from the
    vectors that the earlier replacements led to, by an SAE that encodes all layers of a
    token together from the clean ones."""

    @override
    def to_dataframe(self) -> pd.DataFrame:
        """One row for each hook, in order; the index is the hook name."""
        delta_ce = self.ce_loss_spliced - self.ce_loss_clean
        lost = self.ce_loss_ablated - self.ce_loss_spliced
        splices = {
            "ce_loss_clean": torch.full_like(delta_ce, self.ce_loss_clean),
            "ce_loss_spliced": self.ce_loss_spliced,
            "delta_ce": delta_ce,
            "kl_div": self.kl_div,
            "kl_div_reverse": self.kl_div_reverse,
            "ce_loss_ablated": self.ce_loss_ablated,
            "ce_loss_score": lost / (self.ce_loss_ablated - self.ce_loss_clean),
        }
        reconstruction = super().to_dataframe()
        columns = {name: values.numpy() for name, values in splices.items()}
        return pd.DataFrame(columns, index=reconstruction.index).join(reconstruction)


def _check_defined(hook_names: Sequence[str], layers: Sequence[LayerSums]) -> None:
    for name, layer in zip(hook_names, layers, strict=True):
        deviation = layer.moments.sum_sq_deviation
        of_mean = layer.n_tokens * layer.moments.mean.square().sum()
        if not (layer.sum_sq_error + layer.sum_acts + deviation).isfinite():
            problem = "must be finite"
        elif deviation <= _ROUNDING * of_mean:
            problem = "must vary over tokens to have an FVU"
        else:
            continue
        raise ValueError(f"Vectors and reconstructions {problem}; see {name!r}.")
