"""The evaluation as a result beside those of the analyses."""

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_multilayer.analysis.results import Result
from sae_lens_multilayer.evaluation.evaluation import SpliceMetrics


@dataclass
class Evaluation(Result):
    """The table of `evaluate`, so that it can be saved and drawn like any analysis."""

    hook_names: list[str]
    n_tokens: int
    """Tokens whose vectors were measured."""
    columns: list[str]
    values: Float[Tensor, "layer column"]

    @classmethod
    def of(cls, metrics: SpliceMetrics) -> "Evaluation":
        """The table of what `evaluate` found."""
        table = metrics.to_dataframe()
        return cls(
            [str(name) for name in table.index],
            metrics.reconstruction.n_tokens,
            [str(name) for name in table.columns],
            torch.tensor(table.to_numpy()),
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each hook, as `SpliceMetrics.to_dataframe`."""
        index = pd.Index(self.hook_names, name="hook_name")
        return pd.DataFrame(
            self.values.numpy(), index=index, columns=pd.Index(self.columns)
        )
