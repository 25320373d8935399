"""Latents that are active for the same vectors."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from sae_lens_multilayer.analysis.batch import TokenBatch
from sae_lens_multilayer.analysis.sampling import uniform_hash
from sae_lens_multilayer.analysis.stream import single_analysis
from sae_lens_multilayer.analysis.tables import make_table
from sae_lens_multilayer.results import Result

_MOST_ACTS = 2**22
"""Activations of the sample that are held: 48 MiB."""
_ELEMENTS = 2**22
"""Counts of pairs held at a time: 32 MiB."""


@dataclass
class CoactiveLatents(Result):
    """The latents that are most often active for the same vectors as each latent.

    `jaccard[j, i] = n(i and j) / n(i or j)`, with the numbers of vectors, each of one
    token at one layer, for which latents are active. They are counted on a random
    sample of the vectors, which is all of them if they have at most 4 million
    activations.
    """

    n_vectors: int
    """Vectors in the sample."""
    n_all_vectors: int
    counts: Int[Tensor, " d_sae"]
    """Vectors of the sample for which each latent is active."""
    latents: Int[Tensor, "d_sae n_top"]
    """The other latents with the largest `jaccard`, the largest first."""
    both: Int[Tensor, "d_sae n_top"]
    """Vectors of the sample for which both latents are active; may be 0."""

    @property
    def jaccard(self) -> Float[Tensor, "d_sae n_top"]:
        """In [0, 1]; 0 for latents that are never active together."""
        either = self.counts.unsqueeze(1) + self.counts[self.latents] - self.both
        return self.both / either.clamp(min=1).double()

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each latent and other latent that are active together."""
        latent, rank = self.both.nonzero(as_tuple=True)
        other = self.latents[latent, rank]
        return make_table(
            {
                "latent": latent,
                "other": other,
                "jaccard": self.jaccard[latent, rank],
                "both": self.both[latent, rank],
                "count": self.counts[latent],
                "count_other": self.counts[other],
            }
        )


class CoactiveSums:
    """Keeps the active latents of a random sample of the vectors.

    The sample depends on the tokens alone, not on batches.
    """

    def __init__(self, sae: SAE[Any], n_top: int = 8) -> None:
        self._d_sae, self._n_top = sae.cfg.d_sae, min(n_top, sae.cfg.d_sae - 1)
        # Vectors whose hash is at most this are in the sample.
        self._share, self._n_seen, self._n_all = 1.0, 0, 0
        self._hashes = torch.empty(0, dtype=torch.float64)
        self._sizes = torch.empty(0, dtype=torch.int64)
        self._latents = torch.empty(0, dtype=torch.int32)

    def update(self, batch: TokenBatch) -> None:
        active = batch.active
        n_layers = active.n_layers
        prompt = (batch.prompt + batch.first_prompt).repeat_interleave(n_layers)
        position = batch.position.repeat_interleave(n_layers)
        layer = torch.arange(n_layers).repeat(active.n_tokens)
        hashes = uniform_hash(prompt, position, layer)
        row, order = (active.token * n_layers + active.layer).cpu().sort(stable=True)
        latents = active.latent.cpu()[order].int()
        sizes = row.bincount(minlength=len(hashes))
        self._n_all += len(hashes)
        self._keep(hashes, sizes, latents)
        while len(self._latents) > _MOST_ACTS:
            self._share /= 2
            held = self._hashes, self._sizes, self._latents
            self._hashes, self._sizes, self._latents = (t[:0] for t in held)
            self._keep(*held)

    def _keep(self, hashes: Tensor, sizes: Tensor, latents: Tensor) -> None:
        """Add those vectors that are in the sample."""
        kept = hashes <= self._share
        latents = latents[kept.repeat_interleave(sizes)]
        self._hashes = torch.cat([self._hashes, hashes[kept]])
        self._sizes = torch.cat([self._sizes, sizes[kept]])
        self._latents = torch.cat([self._latents, latents])

    def compute(self) -> CoactiveLatents:
        counts = self._latents.bincount(minlength=self._d_sae)
        best: list[tuple[Tensor, Tensor]] = []
        for start, both in self._counts_of_pairs(counts):
            own = counts[start : start + len(both)].unsqueeze(1)
            jaccard = (both / (own + counts - both)).nan_to_num_()
            jaccard.diagonal(start).fill_(-1)
            other = jaccard.topk(self._n_top).indices
            best.append((other, both.gather(1, other)))
        latents, both = (torch.cat(parts) for parts in zip(*best, strict=True))
        return CoactiveLatents(
            len(self._sizes), self._n_all, counts, latents, both.long()
        )

    def _counts_of_pairs(
        self, counts: Int[Tensor, " d_sae"]
    ) -> Iterator[tuple[int, Int[Tensor, "some d_sae"]]]:
        """Vectors that some latents share with each latent, after the first of them."""
        vector = torch.arange(len(self._sizes)).repeat_interleave(self._sizes)
        starts = self._sizes.cumsum(0) - self._sizes
        # Activations sorted by latent.
        order = self._latents.sort(stable=True).indices
        ends = counts.cumsum(0)
        n_rows = max(1, _ELEMENTS // self._d_sae)
        for first in range(0, self._d_sae, n_rows):
            n = min(n_rows, self._d_sae - first)
            acts = order[ends[first] - counts[first] : ends[first + n - 1]]
            sizes = self._sizes[vector[acts]]
            # Each activation beside all of its vector.
            within = torch.arange(int(sizes.sum()))
            within -= (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
            others = starts[vector[acts]].repeat_interleave(sizes) + within
            own = (self._latents[acts].long() - first).repeat_interleave(sizes)
            cell = own * self._d_sae + self._latents[others]
            yield first, cell.bincount(minlength=n * self._d_sae).view(n, -1)


coactive_latents = single_analysis(CoactiveSums)
"""The latents that are most often active for the same vectors as each latent."""
