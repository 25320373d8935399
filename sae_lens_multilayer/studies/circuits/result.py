"""The circuits of one SAE for one task: nodes in order of effect, and their scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lens_multilayer.pictures.description import (
    Axis,
    Heatmap,
    Panel,
    Picture,
    Series,
    layer_axis,
)
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.studies.circuits.curves import (
    AREAS,
    areas,
    faithfulness,
    resampled_faithfulness,
    size_at,
)
from sae_lens_multilayer.studies.circuits.nodes import ERROR
from sae_lens_multilayer.studies.intervals import QUANTILES, interval

LEVEL = 0.8
"""The faithfulness at which sizes are compared."""


@dataclass
class Circuits(Result):
    """Circuits of growing size of one SAE for one task.

    A circuit of n nodes has the first n nodes by `ranking`. Scores are the metric of
    the task with all nodes outside ablated, nats.
    """

    task: str
    ablation: str
    method: str
    hook_names: list[str]
    classes: list[str]
    k: int
    """Latents per vector with which the SAE was used."""
    shares: list[float]
    """Kept shares of the nodes, up to 1."""
    counts: list[int]
    """Numbers of nodes of further circuits, the same for all SAEs, if there are as many
    nodes."""
    ranking: str
    """Order of the nodes: "absolute" or "signed"; see `circuits`."""
    n_bootstrap: int
    """Samples of prompts for intervals."""
    layer: Int[Tensor, " node"]
    """Index on the layer axis; nodes are in the order of `ranking`."""
    position_class: Int[Tensor, " node"]
    """Index in `classes`."""
    latent: Int[Tensor, " node"]
    """-1: the error."""
    effect: Float[Tensor, " node"]
    """Change of the metric if the node is ablated, mean over prompts, to first order or
    by integrated gradients."""
    scores: Float[Tensor, "share prompt"]
    """m(C) of the circuit with each share; the last one is all nodes."""
    by_count: Float[Tensor, "count prompt"]
    """m(C) of the circuit with each of `counts`."""
    complements: Float[Tensor, "share prompt"]
    """m(M without C); the last one is no node, m(empty)."""
    random: Float[Tensor, "share prompt"]
    """m of as many nodes in random order; NaN if not run."""
    latents_only: Float[Tensor, " prompt"]
    """m with all latents and no error node."""
    errors_only: Float[Tensor, " prompt"]
    """m with all error nodes and no latent."""
    full: Float[Tensor, " prompt"]
    """m(M): the model without edits."""

    @property
    def sizes(self) -> list[int]:
        """Number of nodes of each circuit."""
        return circuit_sizes(self.shares, len(self.effect))

    def faithfulness(
        self, scores: Float[Tensor, "*circuit prompt"] | None = None
    ) -> Float[np.ndarray, "*circuit"]:
        """f of the circuits, or of other scores of this result."""
        found = self.scores if scores is None else scores
        return faithfulness(found.numpy(), *self._ends)

    @property
    def _ends(self) -> tuple[np.ndarray, np.ndarray]:
        return self.full.numpy(), self.complements[-1].numpy()

    def _samples(
        self, scores: Float[Tensor, "circuit prompt"]
    ) -> Float[np.ndarray, "sample circuit"]:
        found = scores.numpy(), *self._ends
        return resampled_faithfulness(*found, self.n_bootstrap, 0)

    def counts_table(self) -> pd.DataFrame:
        """f by number of nodes; `f_low` and `f_high`: 95% intervals over prompts."""
        ends = np.nanquantile(self._samples(self.by_count), QUANTILES, 0)
        low, high = ends.reshape(2, len(self.counts))
        f = self.faithfulness(self.by_count)
        columns = {"n_nodes": self.counts, "f": f, "f_low": low, "f_high": high}
        return pd.DataFrame(columns)

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each share; `low` and `high` are 95% intervals over prompts.

        `completeness` is f(M without C); `error_share` that of error nodes in the sum
        of |effect| of the circuit; `nodes_per_latent` its latent nodes for each
        distinct latent, and `nodes_per_layer_latent` what this would be if each layer
        had its own latents.
        """
        f, low_high = (
            self.faithfulness(),
            np.nanquantile(self._samples(self.scores), QUANTILES, 0),
        )
        columns = {
            "share": self.shares,
            "n_nodes": self.sizes,
            "f": f,
            "f_low": low_high[0],
            "f_high": low_high[1],
            "completeness": self.faithfulness(self.complements),
            "f_random": self.faithfulness(self.random),
        }
        nodes = pd.DataFrame([self._composition(n) for n in self.sizes])
        return pd.concat([pd.DataFrame(columns), nodes], axis=1)

    def _composition(self, n: int) -> dict[str, float]:
        effect, latent = self.effect[:n].abs().double(), self.latent[:n]
        is_error, total = latent == ERROR, float(effect.sum())
        own, layer = latent[~is_error].numpy(), self.layer[:n][~is_error].numpy()
        pairs = len(np.unique(np.stack([layer, own]), axis=1).T) if len(own) else 0
        n_latents = len(np.unique(own))
        return {
            "error_share": float(effect[is_error].sum()) / total if total else np.nan,
            "n_error_nodes": float(is_error.sum()),
            "n_latents": float(n_latents),
            "nodes_per_latent": len(own) / n_latents if n_latents else np.nan,
            "nodes_per_layer_latent": len(own) / pairs if pairs else np.nan,
        }

    @property
    def summary(self) -> pd.Series:
        """The numbers of the curve; `_low` and `_high`: 95% intervals over prompts.

        `size` is the smallest share with f of at least 0.8, between shares linear in
        the logarithm, and `size_nodes` the same as a number of nodes. `error_share` is
        of all nodes; what ends in `_at_size` is of the first circuit that was run with
        such an f.
        """
        table: Any = self.to_dataframe()
        f = self.faithfulness()
        values: dict[str, float] = {
            "m_full": float(self.full.mean()),
            "m_empty": float(self.complements[-1].mean()),
            "n_nodes": float(len(self.effect)),
        }
        samples = self._samples(self.scores)
        samples = samples[np.isfinite(samples).all(1)]
        measures = {name: areas(self.shares, samples)[name] for name in AREAS}
        measures["size"] = np.array(
            [size_at(self.shares, one, LEVEL) for one in samples]
        )
        own = areas(self.shares, f) | {"size": size_at(self.shares, f, LEVEL)}
        for name, found in measures.items():
            values[name] = float(own[name])
            low, high = interval(found)
            values |= {f"{name}_low": low, f"{name}_high": high}
        values["size_nodes"] = values["size"] * len(self.effect)
        random = areas(self.shares, self.faithfulness(self.random))
        values["cpr_log_random"] = float(random["cpr_log"])
        for name in ("latents_only", "errors_only"):
            values[f"f_{name}"] = float(self.faithfulness(getattr(self, name)))
        reached = np.flatnonzero(f >= LEVEL)
        at: Any = table.iloc[int(reached[0])] if len(reached) else {}
        values["error_share"] = float(table.error_share.iloc[-1])
        for name in ("completeness", "error_share", "n_latents", *_PER_LATENT):
            values[f"{name}_at_size"] = float(at[name]) if len(at) else np.nan
        return pd.Series(values, name="value")

    def numbers(self) -> dict[str, float]:
        values: dict[str, float] = self.summary.to_dict()
        return {f"circuit_{name}": values[name] for name in AREAS}

    def pictures(self, **context: Any) -> dict[str, Picture]:
        """f over sizes, and the sum of |effect| by layer and class."""
        table = self.to_dataframe()
        x = table.share.to_numpy()
        series = [
            Series("", x, table.f_low.to_numpy(), "band", top=table.f_high.to_numpy()),
            Series("f(C)", x, table.f.to_numpy(), colour=0),
            Series("f(M without C)", x, table.completeness.to_numpy(), style=1),
            Series("random nodes", x, table.f_random.to_numpy(), style=2),
        ]
        share = Axis("share of the nodes", ticks=self.shares, log=True)
        heat = Heatmap(self.effects_by_layer(), "sum of |effect| (nats)", top=None)
        classes = Axis("positions", self.classes, most_names=len(self.classes))
        panels = [
            Panel(share, Axis("faithfulness", include_zero=True), series),
            Panel(layer_axis(self.hook_names), classes, heatmap=heat),
        ]
        title = f"Circuits for {self.task.replace('_', ' ')} ({self.ablation} ablation)"
        caption = (
            f"{len(self.effect):,} nodes; m(M) {self.full.mean():.2f}, m(empty) "
            f"{self.complements[-1].mean():.2f} nats; f with all latents and no error "
            f"{self.summary.f_latents_only:.2f}."
        )
        return {"": Picture(title, panels, caption)}

    def effects_by_layer(self) -> Float[np.ndarray, "class layer"]:
        """Sum of |effect| of the nodes of each class and layer, nats."""
        sums = np.zeros((len(self.classes), len(self.hook_names)))
        at = self.position_class.numpy(), self.layer.numpy()
        np.add.at(sums, at, self.effect.abs().double().numpy())
        return sums

    def nodes(self, share: float) -> Int[np.ndarray, "node 3"]:
        """Layer, class and latent of the nodes of a circuit."""
        (n,) = circuit_sizes([share], len(self.effect))
        columns = self.layer, self.position_class, self.latent
        return np.stack([one[:n].numpy() for one in columns], 1)


_PER_LATENT = "nodes_per_latent", "nodes_per_layer_latent"


def circuit_sizes(shares: Sequence[float], n_nodes: int) -> list[int]:
    """Nodes of circuits with these shares, at least one."""
    return [max(1, round(share * n_nodes)) for share in shares]


def jaccard(
    a: Int[np.ndarray, "node 3"],
    b: Int[np.ndarray, "other 3"],
    latent_of: Int[np.ndarray, " d_sae"] | None = None,
) -> float:
    """Nodes that two circuits share, as a part of those that either has.

    Args:
        latent_of: The latent of `a`'s SAE that each latent of `b`'s stands for; a value
            below -1: none. None: they are the same SAE.
    """
    if latent_of is not None:
        named = np.where(b[:, 2] == ERROR, ERROR, latent_of[b[:, 2]])
        b = np.stack([b[:, 0], b[:, 1], named], 1)
    first, second = ({tuple(row) for row in nodes.tolist()} for nodes in (a, b))
    return len(first & second) / max(1, len(a) + len(b) - len(first & second))


def keep_masks(
    order: Int[Tensor, " node"], sizes: Sequence[int]
) -> Bool[Tensor, "circuit node"]:
    """The first nodes of an order, as many as each size."""
    rank = order.argsort()
    return rank.unsqueeze(0) < rank.new_tensor(list(sizes)).unsqueeze(1)
