"""Where decoder directions point: at each other, and at tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.results import Result

_ELEMENTS = 2**24
"""Cosine similarities held at a time: 64 MiB of float32."""


@dataclass
class DecoderSimilarity(Result):
    """How close each latent's decoder direction is to the nearest other one."""

    max_cos_sim: Float[Tensor, " d_sae"]
    """`max_(i != j) cos(d_i, d_j)` for each latent j, in [-1, 1]."""
    nearest: Int[Tensor, " d_sae"]
    """The latent i of that maximum."""

    @property
    def mean(self) -> float:
        """The mean max cosine similarity."""
        return self.max_cos_sim.double().mean().item()

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each latent."""
        table = pd.DataFrame(
            {"max_cos_sim": self.max_cos_sim.numpy(), "nearest": self.nearest.numpy()}
        )
        return table.rename_axis("latent")


@dataclass
class TokenSimilarity(Result):
    """The tokens whose (un)embedding is most similar to each decoder direction."""

    cos_sim: Float[Tensor, "d_sae n_top"]
    """Cosine similarities, largest first."""
    token_ids: Int[Tensor, "d_sae n_top"]
    """Their tokens."""

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each latent and rank."""
        d_sae, n_top = self.cos_sim.shape
        return pd.DataFrame(
            {
                "latent": torch.arange(d_sae).repeat_interleave(n_top).numpy(),
                "rank": torch.arange(n_top).repeat(d_sae).numpy(),
                "token_id": self.token_ids.flatten().numpy(),
                "cos_sim": self.cos_sim.flatten().numpy(),
            }
        )


@torch.no_grad()
def decoder_similarity(W_dec: Float[Tensor, "d_sae d_in"]) -> DecoderSimilarity:
    """The maximal cosine similarity of each decoder row with any other row.

    Never holds more than a few rows of the matrix of similarities.

    Raises:
        ValueError: If there are fewer than two rows, or a row is 0 or not finite.

    References:
        Sharkey et al. (2022); Lawson et al. (2025), arXiv:2409.04185. The paper's code
        takes the maximum over i < j only.
    """
    if len(W_dec) < 2:
        raise ValueError(
            f"Latents can be compared where there are two or more; got {len(W_dec)}."
        )
    values: list[Tensor] = []
    nearest: list[Tensor] = []
    for start, similarity in cos_sim_chunks(W_dec):
        rows = torch.arange(len(similarity), device=similarity.device)
        similarity[rows, rows + start] = -torch.inf
        best = similarity.max(1)
        values.append(best.values.cpu())
        nearest.append(best.indices.cpu())
    return DecoderSimilarity(torch.cat(values), torch.cat(nearest))


@torch.no_grad()
def token_similarity(
    W_dec: Float[Tensor, "d_sae d_in"],
    W_tokens: Float[Tensor, "d_vocab d_model"],
    n_top: int = 8,
) -> TokenSimilarity:
    """The tokens nearest to each decoder direction, by cosine similarity.

    Args:
        W_dec: Decoder directions; the residual stream's own, without a final norm.
        W_tokens: An embedding or unembedding of each token; see
            `token_embeddings` and `token_unembeddings`.
        n_top: Tokens to keep for each latent.

    Raises:
        ValueError: If the widths differ, `n_top` is out of range, or a decoder row is 0
            or not finite. An embedding of 0 has no direction and similarity 0.
    """
    if W_dec.shape[1] != W_tokens.shape[1]:
        raise ValueError(
            "Decoder and tokens must have the same width; got "
            f"{W_dec.shape[1]} and {W_tokens.shape[1]}."
        )
    if not 1 <= n_top <= len(W_tokens):
        raise ValueError(
            f"`n_top` must be in [1, d_vocab = {len(W_tokens)}]; got {n_top}."
        )
    W_tokens = W_tokens.to(W_dec.device)
    best = [s.topk(n_top) for _, s in cos_sim_chunks(W_dec, W_tokens)]
    return TokenSimilarity(
        torch.cat([b.values.cpu() for b in best]),
        torch.cat([b.indices.cpu() for b in best]),
    )


def cos_sim_chunks(
    rows: Float[Tensor, "row d"], columns: Float[Tensor, "column d"] | None = None
) -> Iterator[tuple[int, Float[Tensor, "chunk column"]]]:
    """Cosine similarities of all rows with all columns, a few rows at a time.

    Args:
        columns: None: the rows themselves.

    Returns:
        The number of the first row, and the similarities from there on.

    Raises:
        ValueError: If a row is 0 or not finite.
    """
    unit = _unit(rows)
    bad = int((~unit.isfinite().all(1)).sum())
    if bad:
        raise ValueError(
            "A direction needs entries that are finite and not all 0; "
            f"{bad} of {len(rows)} decoder rows have not."
        )
    targets = unit if columns is None else _unit(columns).nan_to_num()
    n_rows = max(1, _ELEMENTS // len(targets))
    starts = range(0, len(unit), n_rows)
    for start in tqdm(starts, desc="Comparing", unit="chunk"):
        # Rounding can go beyond the ends.
        yield start, (unit[start : start + n_rows] @ targets.T).clamp_(-1, 1)


def _unit(vectors: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    wide = vectors.detach().to(torch.promote_types(vectors.dtype, torch.float32))
    return wide / wide.norm(dim=1, keepdim=True)


def token_embeddings(model: Any) -> Float[Tensor, "d_vocab d_model"]:
    """The embedding of each token, of any kind of model the host can load."""
    return as_model(model).token_embeddings


def token_unembeddings(model: Any) -> Float[Tensor, "d_vocab d_model"]:
    """The direction that each token's logit reads, after the final norm."""
    return as_model(model).token_unembeddings
