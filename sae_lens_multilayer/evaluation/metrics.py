"""What is measured at each layer, as sums over tokens that any split adds up to."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lens_multilayer.hooks import layer_labels

_ROUNDING = 1e-12
"""Share of the squared norms below which a variance is only the sums' rounding."""


@dataclass
class LayerSums:
    """Sums over tokens of what an SAE did at each layer, in float64 on the CPU.

    All vectors are in raw space. `a + b` is what both lots of tokens give together.
    """

    n_tokens: int
    sum_x: Float[Tensor, "layer d_in"]
    """Sum of the vectors."""
    sum_x_sq: Float[Tensor, " layer"]
    """Sum of squared norms of the vectors."""
    sum_sq_error: Float[Tensor, " layer"]
    """Sum of squared distances between vectors and reconstructions."""
    n_active: Int[Tensor, "layer d_sae"]
    """Number of tokens at which a latent was active."""
    sum_acts: Float[Tensor, " layer"]
    """Sum of activations."""

    @classmethod
    def zeros(cls, n_layers: int, d_in: int, d_sae: int) -> "LayerSums":
        """The sums over no token."""
        return cls(
            n_tokens=0,
            sum_x=torch.zeros(n_layers, d_in, dtype=torch.float64),
            sum_x_sq=torch.zeros(n_layers, dtype=torch.float64),
            sum_sq_error=torch.zeros(n_layers, dtype=torch.float64),
            n_active=torch.zeros(n_layers, d_sae, dtype=torch.int64),
            sum_acts=torch.zeros(n_layers, dtype=torch.float64),
        )

    def add_layer(
        self,
        layer: int,
        x: Float[Tensor, "token d_in"],
        x_hat: Float[Tensor, "token d_in"],
        n_active: Int[Tensor, " d_sae"],
        sum_acts: Float[Tensor, ""],
    ) -> None:
        """Add the tokens of one layer; `n_tokens` is the caller's to count.

        Args:
            layer: Position on the layer axis.
            n_active: Number of these tokens at which each latent was active.
            sum_acts: Sum of all activations.
        """
        x, x_hat = _double(x), _double(x_hat)
        self.sum_x[layer] += x.sum(0).cpu()
        self.sum_x_sq[layer] += x.square().sum().cpu()
        self.sum_sq_error[layer] += (x_hat - x).square().sum().cpu()
        self.sum_acts[layer] += sum_acts.cpu().double()
        self.n_active[layer] += n_active.cpu()

    def __add__(self, other: "LayerSums") -> "LayerSums":
        return LayerSums(
            *(getattr(self, f.name) + getattr(other, f.name) for f in fields(self))
        )

    def compute(self, hook_names: Sequence[str]) -> "LayerMetrics":
        """The metrics of these tokens.

        Raises:
            ValueError: If there is no token, a vector or reconstruction is not finite,
                or the vectors of a layer do not vary, as FVU is not defined then.
        """
        if self.n_tokens == 0:
            raise ValueError("Metrics need at least one token; got none.")
        n, d_in = self.n_tokens, self.sum_x.shape[1]
        finite = (self.sum_x_sq + self.sum_sq_error + self.sum_acts).isfinite()
        if not finite.all():
            raise ValueError(
                "Vectors, reconstructions and activations must be finite; they are not "
                f"at {_where(~finite, hook_names)}."
            )
        deviation = self.sum_x_sq - self.sum_x.square().sum(1) / n
        variance = self.sum_x_sq - self.sum_x.sum(1).square() / (n * d_in)
        constant = deviation <= _ROUNDING * self.sum_x_sq
        if constant.any():
            raise ValueError(
                "The vectors of each layer must vary over tokens to have an FVU; all "
                f"{n} are the same at {_where(constant, hook_names)}. Use more tokens "
                "or leave that hook out."
            )
        dead = self.n_active.sum(0) == 0
        return LayerMetrics(
            hook_names=list(hook_names),
            n_tokens=n,
            fvu=self.sum_sq_error / deviation,
            fvu_scalar=self.sum_sq_error / variance * (n * d_in - 1) / (n * d_in),
            mse=self.sum_sq_error / (n * d_in),
            l0=self.n_active.sum(1).double() / n,
            l1=self.sum_acts / n,
            silent_fraction=(self.n_active == 0).double().mean(1),
            dead_fraction=dead.double().mean().expand(len(hook_names)),
        )


def _double(x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_in"]:
    # Apple's GPUs have no float64.
    return (x.cpu() if x.is_mps else x).double()


def _where(layers: Bool[Tensor, " layer"], hook_names: Sequence[str]) -> list[str]:
    return [name for name, meant in zip(hook_names, layers, strict=True) if meant]


@dataclass
class LayerMetrics:
    """How well an SAE reconstructs each layer, without running the model on.

    Each tensor has one entry for each hook, in the order of `hook_names`.
    """

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

    @staticmethod
    def concatenate(parts: Sequence["LayerMetrics"]) -> "LayerMetrics":
        """Put the layers of several SAEs, measured on the same tokens, together."""
        tensors = [f.name for f in fields(LayerMetrics)][2:]
        return LayerMetrics(
            [name for part in parts for name in part.hook_names],
            parts[0].n_tokens,
            *(torch.cat([getattr(part, name) for part in parts]) for name in tensors),
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each hook, in order; the index is the hook name."""
        columns = [f.name for f in fields(self)][2:]
        return pd.DataFrame(
            {name: getattr(self, name).numpy() for name in columns},
            index=pd.Index(self.hook_names, name="hook_name"),
        )

    def mean(self) -> pd.Series:
        """The mean over layers of every column."""
        return self.to_dataframe().mean()

    def to_log_dict(self) -> dict[str, float]:
        """Flat keys for loggers: `layer_3/fvu` and so on."""
        return log_dict(self.to_dataframe())


def log_dict(table: pd.DataFrame) -> dict[str, float]:
    """A table with one row for each hook as flat keys, `layer_{l}/{column}`."""
    labels = layer_labels([str(name) for name in table.index])
    return {
        f"{label}/{column}": float(value)
        for label, (_, row) in zip(labels, table.iterrows(), strict=True)
        for column, value in row.items()
    }
