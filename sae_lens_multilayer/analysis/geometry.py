"""Cosine similarities of decoder directions with each other and with tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_multilayer.analysis.tables import make_table
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.pictures.description import Axis, Panel, Picture, histogram
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.topk.tile import wide_dtype

_ELEMENTS = 2**24
"""Cosine similarities held at a time: 64 MiB of float32."""


@dataclass
class DecoderSimilarity(Result):
    """The other latents with the most similar decoder directions, for each latent."""

    cos_sim: Float[Tensor, "d_sae n_top"]
    """`cos(d_i, d_j)` of each latent j with others, in [-1, 1], largest first."""
    latents: Int[Tensor, "d_sae n_top"]
    """These other latents i."""

    @property
    def max_cos_sim(self) -> Float[Tensor, " d_sae"]:
        """`max_(i != j) cos(d_i, d_j)` for each latent j."""
        return self.cos_sim[:, 0]

    @property
    def nearest(self) -> Int[Tensor, " d_sae"]:
        """The latent i of that maximum."""
        return self.latents[:, 0]

    @property
    def mean(self) -> float:
        """Mean of `max_cos_sim` over latents."""
        return self.max_cos_sim.double().mean().item()

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each latent."""
        columns = {"max_cos_sim": self.max_cos_sim, "nearest": self.nearest}
        return make_table(columns, "latent")

    def numbers(self) -> dict[str, float]:
        return {"mean_max_cos_sim": self.mean}

    def pictures(self, **context: Any) -> dict[str, Picture]:
        values = self.max_cos_sim.float().numpy()
        edges = np.arange(np.floor(values.min() * 100), 101) / 100
        panel = Panel(
            Axis("cosine similarity with the nearest other latent"),
            Axis("latents"),
            [histogram("", values, edges)],
            vertical_line=(self.mean, f"mean: {self.mean:.3f}"),
        )
        return {"": Picture(f"Decoder of {len(values):,} latents", [panel])}


@dataclass
class TokenSimilarity(Result):
    """The tokens whose (un)embedding is most similar to each decoder direction."""

    cos_sim: Float[Tensor, "d_sae n_top"]
    """Cosine similarities, largest first."""
    token_ids: Int[Tensor, "d_sae n_top"]
    """The ids of these tokens."""

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each latent and rank."""
        d_sae, n_top = self.cos_sim.shape
        return make_table(
            {
                "latent": torch.arange(d_sae).repeat_interleave(n_top),
                "rank": torch.arange(n_top).repeat(d_sae),
                "token_id": self.token_ids.flatten(),
                "cos_sim": self.cos_sim.flatten(),
            }
        )


@torch.no_grad()
def decoder_similarity(
    W_dec: Float[Tensor, "d_sae d_in"], n_top: int = 8
) -> DecoderSimilarity:
    """The largest cosine similarities of each decoder row with other rows.

    Only some rows of the matrix of similarities are in memory at a time. There are
    `n_top` others for each latent, or all if there are fewer.

    References:
        Sharkey et al. (2022); Lawson et al. (2025), arXiv:2409.04185. The paper's code
        takes the maximum over i < j only.
    """
    best: list[Any] = []
    for start, similarity in cos_sim_chunks(W_dec):
        similarity.diagonal(start).fill_(-torch.inf)
        best.append(similarity.topk(min(n_top, len(W_dec) - 1)))
    return DecoderSimilarity(*_values_and_indices(best))


@torch.no_grad()
def token_similarity(
    W_dec: Float[Tensor, "d_sae d_in"],
    W_tokens: Float[Tensor, "d_vocab d_model"],
    n_top: int = 8,
) -> TokenSimilarity:
    """The tokens with the largest cosine similarity to each decoder direction.

    Args:
        W_dec: Decoder directions, without a final norm.
        W_tokens: See `token_embeddings` and `token_unembeddings`. A vector of 0 has
            similarity 0.
        n_top: Tokens to keep for each latent, at most d_vocab.
    """
    W_tokens = W_tokens.to(W_dec.device)
    best = [s.topk(n_top) for _, s in cos_sim_chunks(W_dec, W_tokens)]
    return TokenSimilarity(*_values_and_indices(best))


def cos_sim_chunks(
    rows: Float[Tensor, "row d"], columns: Float[Tensor, "column d"] | None = None
) -> Iterator[tuple[int, Float[Tensor, "chunk column"]]]:
    """Yield cosine similarities of some rows with all columns (None: the rows), after
    the index of the first of these rows."""
    unit = _unit(rows)
    if bad := int((~unit.isfinite().all(1)).sum()):
        raise ValueError(
            "Decoder rows must be finite and not 0; "
            f"{bad} of {len(rows)} decoder rows are not."
        )
    targets = unit if columns is None else _unit(columns).nan_to_num()
    n_rows = max(1, _ELEMENTS // len(targets))
    starts = range(0, len(unit), n_rows)
    for start in tqdm(starts, desc="Comparing", unit="chunk"):
        # Rounding can exceed 1.
        yield start, (unit[start : start + n_rows] @ targets.T).clamp_(-1, 1)


def _unit(vectors: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    wide = vectors.detach().to(wide_dtype(vectors.dtype))
    return wide / wide.norm(dim=1, keepdim=True)


def _values_and_indices(best: list[Any]) -> list[Tensor]:
    return [torch.cat([chunk[i].cpu() for chunk in best]) for i in range(2)]


def token_embeddings(model: Any) -> Float[Tensor, "d_vocab d_model"]:
    """The embedding of each token, of any kind of model the host can load."""
    return as_model(model).token_embeddings


def token_unembeddings(model: Any) -> Float[Tensor, "d_vocab d_model"]:
    """The direction that each token's logit reads, after the final norm."""
    return as_model(model).token_unembeddings
