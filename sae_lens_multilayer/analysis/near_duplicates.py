"""Finds latents with nearly the same direction, and compares their layers."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lens_multilayer.analysis.distributions import LayerDistributions
from sae_lens_multilayer.analysis.geometry import cos_sim_chunks
from sae_lens_multilayer.analysis.tables import make_table
from sae_lens_multilayer.pictures.description import Axis, Panel, Picture, histogram
from sae_lens_multilayer.results import Result

_MOST_PAIRS = 10_000_000
_PAIRS_AT_A_TIME = 2**16


@dataclass
class Redundancy(Result):
    """Pairs of latents with nearly the same decoder direction, and their layers.

    The overlap of two latents' distributions over layers is
    `sum_l min(P(l | i), P(l | j))`: 1 if they are equal, 0 if they share no layer. A
    pair is disjoint if its overlap is at most `max_overlap`. An SAE that learns a
    direction once per layer has many pairs, and more of them are disjoint than of
    random pairs of latents (the null).
    """

    min_cos_sim: float
    max_overlap: float
    n_active: int
    """Number of latents that are active at any token; only these form pairs."""
    pairs: Int[Tensor, "pair 2"]
    """Pairs i < j with a cosine similarity of at least `min_cos_sim`."""
    cos_sim: Float[Tensor, " pair"]
    overlap: Float[Tensor, " pair"]
    null_overlap: Float[Tensor, " null"]
    """Overlaps of random pairs of different active latents."""

    @property
    def is_disjoint(self) -> Bool[Tensor, " pair"]:
        """Whether each pair is disjoint."""
        return self.overlap <= self.max_overlap

    @property
    def disjoint_fraction(self) -> float:
        """Fraction of the pairs that are disjoint; NaN if there are no pairs."""
        return self.is_disjoint.double().mean().item()

    @property
    def null_disjoint_fraction(self) -> float:
        """Fraction of the random pairs that are disjoint."""
        return (self.null_overlap <= self.max_overlap).double().mean().item()

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each pair, the most similar first."""
        table = make_table(
            {
                "latent": self.pairs[:, 0],
                "other": self.pairs[:, 1],
                "cos_sim": self.cos_sim,
                "overlap": self.overlap,
                "disjoint": self.is_disjoint,
            }
        )
        return table.sort_values("cos_sim", ascending=False, kind="stable")

    def pictures(self, **context: Any) -> dict[str, Picture]:
        n_null = f"{len(self.null_overlap):,} random pairs"
        edges = np.linspace(0, 1, 41)
        series = [
            histogram(f"{pairs}: {disjoint:.1%} disjoint", overlap.numpy(), edges, True)
            for pairs, disjoint, overlap in [
                ("near-duplicates", self.disjoint_fraction, self.overlap),
                (n_null, self.null_disjoint_fraction, self.null_overlap),
            ]
            if len(overlap)
        ]
        panel = Panel(
            Axis("overlap of their distributions over layers (1: the same layers)"),
            Axis("fraction of pairs"),
            series,
            vertical_line=(self.max_overlap, f"disjoint: at most {self.max_overlap:g}"),
        )
        caption = (
            f"{len(self.pairs):,} near-duplicates (cosine similarity "
            f"≥ {self.min_cos_sim:g}) among {self.n_active:,} active latents."
        )
        title = "Is a direction learnt again for other layers?"
        return {"": Picture(title, [panel], caption)}


@torch.no_grad()
def redundancy(
    W_dec: Float[Tensor, "d_sae d_in"],
    distributions: LayerDistributions,
    *,
    min_cos_sim: float = 0.7,
    max_overlap: float = 0.1,
    n_null: int = 100_000,
    seed: int = 0,
) -> Redundancy:
    """Find near-duplicate latents, and compare the layers at which they are active.

    Args:
        W_dec: The SAE's decoder.
        distributions: Its distributions over layers, from many tokens.
        min_cos_sim: Cosine similarity from which two latents are near-duplicates.
        max_overlap: Overlap up to which a pair is disjoint, in [0, 1].
        n_null: Number of random pairs.
        seed: For drawing the random pairs.
    """
    n_latents = distributions.counts.shape[1]
    if len(W_dec) != n_latents:
        raise ValueError(
            "`W_dec` and `distributions` must be of the same SAE; got "
            f"{len(W_dec)} and {n_latents} latents."
        )
    active = distributions.counts.sum(0).nonzero().squeeze(1)
    if len(active) < 2:
        raise ValueError(
            f"Pairs need at least two active latents; got {len(active)}. Use more "
            "tokens for `distributions`."
        )
    found, cos_sim = _near_pairs(W_dec[active.to(W_dec.device)], min_cos_sim)
    null = _random_pairs(len(active), n_null, seed)
    probs, n = distributions.probs.T, len(active)
    overlaps = (_overlap(probs, active[pairs]) for pairs in (found, null))
    return Redundancy(min_cos_sim, max_overlap, n, active[found], cos_sim, *overlaps)


def _near_pairs(
    W_dec: Float[Tensor, "d_sae d_in"], min_cos_sim: float
) -> tuple[Int[Tensor, "pair 2"], Float[Tensor, " pair"]]:
    pairs: list[Tensor] = []
    values: list[Tensor] = []
    for start, similarity in cos_sim_chunks(W_dec):
        found = (similarity >= min_cos_sim).triu(start + 1).nonzero()
        values.append(similarity[found[:, 0], found[:, 1]].cpu())
        found[:, 0] += start
        pairs.append(found.cpu())
        if sum(map(len, pairs)) > _MOST_PAIRS:
            raise ValueError(
                f"More than {_MOST_PAIRS:,} pairs have a cosine similarity of at least "
                f"`min_cos_sim` = {min_cos_sim}; increase it."
            )
    return torch.cat(pairs), torch.cat(values)


def _random_pairs(n: int, n_pairs: int, seed: int) -> Int[Tensor, "pair 2"]:
    """Pairs of different indices below n."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(n, (n_pairs,), generator=generator)
    step = torch.randint(1, n, (n_pairs,), generator=generator)
    return torch.stack([first, (first + step) % n], dim=1)


def _overlap(
    probs: Float[Tensor, "d_sae layer"], pairs: Int[Tensor, "pair 2"]
) -> Float[Tensor, " pair"]:
    parts = [
        torch.minimum(probs[some[:, 0]], probs[some[:, 1]]).sum(1)
        for some in pairs.split(_PAIRS_AT_A_TIME)
    ]
    # Rounding can exceed 1.
    return torch.cat(parts).clamp(max=1)
