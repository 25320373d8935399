"""Add an analysis of your own: how many active latents do two layers share at a token?

Everything about the analysis is in this file: its result with its picture and its
numbers, its accumulator, and its row in the table of analyses. Run it as the command
line, which has the analysis then:

    python examples/own_analysis.py analyze output --dataset_path held-out.jsonl \
        --analyses shared_latents
"""

from dataclasses import dataclass
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from sae_lens_multilayer import cli
from sae_lens_multilayer.analysis import ANALYSES, Analysis, Result, TokenBatch
from sae_lens_multilayer.pictures.description import Axis, Heatmap, Panel, Picture


@dataclass
class SharedLatents(Result):
    """Pairs of token and latent that are active at both of two layers."""

    n_shared: Float[Tensor, "layer layer"]

    @property
    def jaccard(self) -> Float[Tensor, "layer layer"]:
        """Shared pairs over pairs that are active at either layer, in [0, 1]."""
        own = self.n_shared.diagonal()
        return self.n_shared / (own.unsqueeze(1) + own - self.n_shared)

    def to_dataframe(self) -> pd.DataFrame:
        """`jaccard` as a square table."""
        return pd.DataFrame(self.jaccard.numpy())

    def numbers(self) -> dict[str, float]:
        """The mean over neighbouring layers, which a sweep reports for each point."""
        return {"next_layer_jaccard": self.jaccard.diagonal(1).mean().item()}

    def pictures(self, **context: Any) -> dict[str, Picture]:
        """A heatmap of every two layers."""
        layers = Axis("layer", [str(layer) for layer in range(len(self.n_shared))])
        heatmap = Heatmap(self.jaccard.numpy(), "Jaccard index")
        panel = Panel(layers, layers, heatmap=heatmap)
        return {"": Picture("Active latents that two layers share", [panel])}


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


SHARED_LATENTS = Analysis(accumulator=lambda suite: SharedLatentCounts())


if __name__ == "__main__":
    ANALYSES["shared_latents"] = SHARED_LATENTS
    cli.main()
