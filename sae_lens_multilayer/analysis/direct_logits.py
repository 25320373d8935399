"""Output tokens that each decoder direction raises and lowers most."""

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_multilayer.analysis.tables import make_table
from sae_lens_multilayer.hooks import layer_labels
from sae_lens_multilayer.lens.carrier import lens_of
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.sae.views import hook_names_of

_ELEMENTS = 2**24
"""Logits held at a time: 64 MiB of float32."""


@dataclass
class OutputTokens(Result):
    """The tokens with the largest and the smallest logits of each decoder direction.

    The logits are those of the direction by itself, scaled to a root mean square of 1,
    after the model's final norm (without its bias) and unembedding, less their mean
    over the vocabulary: the direct effect on the output, up to one positive factor.

    Without a lens the direction is the same at all layers, and there is one row. With
    the SAE's lens there is a row for the direction itself, which is in the space of the
    lens and so what the tuned lens of every layer reads, and one for each layer, with
    the direction in the residual stream, `(I + W_l)^-1 d_j`. The first one is left out
    if the unembedding cannot read that space (whitening).

    References:
        nostalgebraist (2020), "interpreting GPT: the logit lens"; Belrose et al.
        (2023), arXiv:2303.08112, for the tuned lens.
    """

    rows: list[str]
    """"decoder" and labels of layers."""
    top_ids: Int[Tensor, "row d_sae n_top"]
    top_logits: Float[Tensor, "row d_sae n_top"]
    """The largest, the largest first."""
    bottom_ids: Int[Tensor, "row d_sae n_top"]
    bottom_logits: Float[Tensor, "row d_sae n_top"]
    """The smallest, the smallest first."""

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each latent, row of `rows` and rank."""
        n_rows, d_sae, n_top = self.top_ids.shape
        latent = torch.arange(d_sae).repeat_interleave(n_top).repeat(n_rows)
        table = make_table(
            {
                "latent": latent,
                "rank": torch.arange(n_top).repeat(n_rows * d_sae),
                "top_id": self.top_ids.flatten(),
                "top_logit": self.top_logits.flatten(),
                "bottom_id": self.bottom_ids.flatten(),
                "bottom_logit": self.bottom_logits.flatten(),
            }
        )
        names = [name for name in self.rows for _ in range(d_sae * n_top)]
        return table.assign(row=names)


@torch.no_grad()
def output_tokens(sae: SAE[Any], model: Any, n_top: int = 10) -> OutputTokens:
    """The output tokens that each decoder direction raises and lowers most.

    Args:
        sae: Any SAE of the residual stream's width that this package trained.
        model: The model that it was trained on.
        n_top: Tokens to keep at either end, at most d_vocab.
    """
    lens, W_dec = lens_of(sae), sae.W_dec.detach().float()
    rows: list[str] = []
    directions: list[Tensor] = []
    if lens is None or lens.config.maps_to_last_layer:
        rows, directions = ["decoder"], [W_dec]
    if lens is not None:
        labels = layer_labels(hook_names_of(sae))
        rows += labels
        directions += [lens.invert_difference(W_dec, i) for i in range(len(labels))]
    unembed = as_model(model).unembed().to(W_dec.device)
    parts = [_ends(unembed, direction, n_top) for direction in directions]
    return OutputTokens(rows, *(torch.stack(p) for p in zip(*parts, strict=True)))


def _ends(
    unembed: Any, directions: Float[Tensor, "d_sae d_in"], n_top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight = unembed.unembedding.weight
    n_rows = max(1, _ELEMENTS // len(weight))
    kept: list[tuple[Tensor, ...]] = []
    for chunk in tqdm(directions.split(n_rows), desc="Output tokens", unit="chunk"):
        logits = direction_logits(unembed, chunk)
        top, bottom = logits.topk(n_top), logits.topk(n_top, largest=False)
        kept.append((top.indices, top.values, bottom.indices, bottom.values))
    ids, logits, low_ids, low = (torch.cat(p).cpu() for p in zip(*kept, strict=True))
    return ids, logits, low_ids, low


def direction_logits(
    unembed: Any, directions: Float[Tensor, "row d_in"]
) -> Float[Tensor, "row d_vocab"]:
    """The logits of directions of the residual stream; see `OutputTokens`."""
    weight: Tensor = unembed.unembedding.weight
    unit = directions / directions.square().mean(1, keepdim=True).sqrt()
    unit = unit.to(weight.dtype)
    # Of 0, the final norm returns its bias.
    normed = unembed.final_norm(unit) - unembed.final_norm(torch.zeros_like(unit[:1]))
    logits = normed @ weight.T
    return logits - logits.mean(1, keepdim=True)
