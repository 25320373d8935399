"""Add an analysis of your own: how many active latents do two layers share at a token?

This file contains the result, the accumulator, the plot and the row in the table of
analyses. Run it like the command line, which then includes the analysis:

    python examples/own_analysis.py analyze output --dataset_path held-out.jsonl \
        --analyses shared_latents
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from sae_lens_multilayer import cli
from sae_lens_multilayer.analysis import ANALYSES, Analysis, Result, TokenBatch


@dataclass
class SharedLatents(Result):
    """Pairs of token and latent that are active at both of two layers."""

    n_shared: Float[Tensor, "layer layer"]

    @property
    def next_layer_jaccard(self) -> float:
        """Mean of `jaccard` over pairs of adjacent layers."""
        return self.jaccard.diagonal(1).mean().item()

    @property
    def jaccard(self) -> Float[Tensor, "layer layer"]:
        """Shared pairs over pairs that are active at either layer, in [0, 1]."""
        own = self.n_shared.diagonal()
        return self.n_shared / (own.unsqueeze(1) + own - self.n_shared)

    def to_dataframe(self) -> pd.DataFrame:
        """`jaccard` as a square table."""
        return pd.DataFrame(self.jaccard.numpy())


class SharedLatentCounts:
    """Accumulates `SharedLatents` over tokens."""

    def __init__(self) -> None:
        self._n_shared: Any = 0

    def update(self, batch: TokenBatch) -> None:
        """Add a batch of tokens."""
        active, pairs = batch.active, batch.active.by_token
        at_layer = active.value.new_zeros(active.n_layers, len(pairs.token))
        at_layer[active.layer, pairs.pair] = 1
        self._n_shared += (at_layer @ at_layer.T).cpu()

    def compute(self) -> SharedLatents:
        """The counts over all tokens so far."""
        return SharedLatents(self._n_shared)


def draw(result: SharedLatents, token_texts: Sequence[str]) -> dict[str, Figure]:
    """A heatmap of the Jaccard index of all pairs of layers."""
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(result.jaccard.numpy(), origin="lower", vmin=0, vmax=1)
    axes.set(xlabel="layer", ylabel="layer", title="shared active latents")
    figure.colorbar(image, label="Jaccard index")
    return {"": figure}


SHARED_LATENTS = Analysis(
    accumulator=lambda suite: SharedLatentCounts(),
    numbers=lambda result: {
        "next_layer_jaccard": result.jaccard.diagonal(1).mean().item()
    },
    draw=draw,
)


if __name__ == "__main__":
    ANALYSES["shared_latents"] = SHARED_LATENTS
    cli.main()
