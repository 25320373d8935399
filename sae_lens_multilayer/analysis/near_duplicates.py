"""Does the SAE learn the same direction again for other layers?"""

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_multilayer.analysis.distributions import LayerDistributions
from sae_lens_multilayer.analysis.geometry import cos_sim_chunks
from sae_lens_multilayer.analysis.results import Result

_MOST_PAIRS = 10_000_000
_PAIRS_AT_A_TIME = 2**16


@dataclass
class Redundancy(Result):
    """Pairs of latents with nearly the same decoder direction, and their layers.

    The overlap of two latents' distributions over layers is
    `sum_l min(P(l | i), P(l | j))`: 1 if they are equal, 0 if they share no layer. A
    pair is disjoint if its overlap is at most `max_overlap`. An SAE that learns the
    same direction again for each layer has many pairs, more of them disjoint than pairs
    of latents drawn at random (the null).
    """

    min_cos_sim: float
    max_overlap: float
    n_active: int
    """Latents that were active; pairs are of these."""
    pairs: Int[Tensor, "pair 2"]
    """Pairs i < j with a cosine similarity of at least `min_cos_sim`."""
    cos_sim: Float[Tensor, " pair"]
    overlap: Float[Tensor, " pair"]
    null_overlap: Float[Tensor, " null"]
    """Overlaps of pairs of different active latents drawn at random."""

    @property
    def n_disjoint(self) -> int:
        """Pairs with the same direction and other layers."""
        return int((self.overlap <= self.max_overlap).sum())

    @property
    def disjoint_fraction(self) -> float:
        """Fraction of the pairs that are disjoint; NaN if there are none."""
        return (self.overlap <= self.max_overlap).double().mean().item()

    @property
    def null_disjoint_fraction(self) -> float:
        """The same for random pairs."""
        return (self.null_overlap <= self.max_overlap).double().mean().item()

    @property
    def n_latents_repeated(self) -> int:
        """Latents with a disjoint near-duplicate."""
        return self.pairs[self.overlap <= self.max_overlap].unique().numel()

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each pair, the most similar first."""
        table = pd.DataFrame(
            {
                "latent": self.pairs[:, 0].numpy(),
                "other": self.pairs[:, 1].numpy(),
                "cos_sim": self.cos_sim.numpy(),
                "overlap": self.overlap.numpy(),
                "disjoint": (self.overlap <= self.max_overlap).numpy(),
            }
        )
        return table.sort_values("cos_sim", ascending=False, kind="stable")


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
    """Count near-duplicate latents that are active at other layers.

    Args:
        W_dec: The SAE's decoder.
        distributions: Its distributions over layers, of many tokens.
        min_cos_sim: Cosine similarity from which two latents are near-duplicates.
        max_overlap: Overlap of their distributions up to which they are disjoint.
        n_null: Random pairs to compare with.
        seed: Of their drawing.

    Raises:
        ValueError: If fewer than two latents were active, the sizes differ, a number is
            out of range, or there are too many pairs to hold.
    """
    _check(W_dec, distributions, min_cos_sim, max_overlap, n_null)
    active = distributions.counts.sum(0).nonzero().squeeze(1)
    if len(active) < 2:
        raise ValueError(
            f"Pairs need two latents that were active; {len(active)} were. Take the "
            "distributions over more tokens."
        )
    found, cos_sim = _near_pairs(W_dec[active.to(W_dec.device)], min_cos_sim)
    generator = torch.Generator().manual_seed(seed)
    probs = distributions.probs.T
    # The second is any latent but the first.
    first = torch.randint(len(active), (n_null,), generator=generator)
    step = torch.randint(1, len(active), (n_null,), generator=generator)
    null = torch.stack([first, (first + step) % len(active)], dim=1)
    return Redundancy(
        float(min_cos_sim),
        float(max_overlap),
        len(active),
        active[found],
        cos_sim,
        _overlap(probs, active[found]),
        _overlap(probs, active[null]),
    )


def _near_pairs(
    W_dec: Float[Tensor, "d_sae d_in"], min_cos_sim: float
) -> tuple[Int[Tensor, "pair 2"], Float[Tensor, " pair"]]:
    pairs = [torch.empty(0, 2, dtype=torch.int64)]
    values = [torch.empty(0, dtype=torch.promote_types(W_dec.dtype, torch.float32))]
    n_pairs = 0
    for start, similarity in cos_sim_chunks(W_dec):
        found = (similarity >= min_cos_sim).triu(start + 1).nonzero()
        values.append(similarity[found[:, 0], found[:, 1]].cpu())
        found[:, 0] += start
        pairs.append(found.cpu())
        n_pairs += len(found)
        if n_pairs > _MOST_PAIRS:
            raise ValueError(
                f"At most {_MOST_PAIRS:,} pairs of near-duplicates can be held; there "
                f"are more with a cosine similarity of {min_cos_sim} or above. Raise "
                "`min_cos_sim`."
            )
    return torch.cat(pairs), torch.cat(values)


def _overlap(
    probs: Float[Tensor, "d_sae layer"], pairs: Int[Tensor, "pair 2"]
) -> Float[Tensor, " pair"]:
    parts = [
        torch.minimum(probs[some[:, 0]], probs[some[:, 1]]).sum(1)
        for some in pairs.split(_PAIRS_AT_A_TIME)
    ]
    # Rounding can go beyond what equal distributions have.
    return torch.cat(parts).clamp(max=1) if parts else probs.new_empty(0)


def _check(
    W_dec: Tensor,
    distributions: LayerDistributions,
    min_cos_sim: float,
    max_overlap: float,
    n_null: int,
) -> None:
    n_latents = distributions.counts.shape[1]
    if len(W_dec) != n_latents:
        raise ValueError(
            "The decoder and the distributions must be of the same SAE; got "
            f"{len(W_dec)} and {n_latents} latents."
        )
    if not -1 <= min_cos_sim <= 1:
        raise ValueError(f"`min_cos_sim` must be in [-1, 1]; got {min_cos_sim}.")
    if not 0 <= max_overlap <= 1:
        raise ValueError(f"`max_overlap` must be in [0, 1]; got {max_overlap}.")
    if n_null < 1:
        raise ValueError(f"`n_null` must be at least 1; got {n_null}.")
