"""Inference with the multi-layer TopK autoencoder from its k active latents.

Plain PyTorch for any device; `reference.py` is the definition. `W_enc [d_in, d_sae]` is
fastest if `W_enc.T` is contiguous, so that each latent has one row of `d_in` numbers;
any strides give the same result.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_multilayer.topk.products import weighted_row_sum
from sae_lens_multilayer.topk.select import make_encoder
from sae_lens_multilayer.topk.tile import make_tile, wide_dtype

_INFERENCE_ROWS = 4096


@dataclass
class TopKActs:
    """The k activations of each vector, and the statistics that decoding needs."""

    values: Float[Tensor, "*batch k"]
    """Activations, after the ReLU, in no particular order."""
    indices: Int[Tensor, "*batch k"]
    """Their latents, int64."""
    mean: Float[Tensor, "*vectors 1"]
    """Mean of each vector; 0 if inputs are not standardised. `*vectors` is `*batch`, or
    `*batch layer` for a crosscoder."""
    std: Float[Tensor, "*vectors 1"]
    """Standard deviation of each vector; 1 if inputs are not standardised."""

    def __getitem__(self, some: slice) -> "TopKActs":
        """Those of some vectors or tokens, by the first axis of the batch."""
        return type(self)(**{name: value[some] for name, value in vars(self).items()})


@torch.no_grad()
def encode_topk(
    z: Float[Tensor, "*vectors d_in"],
    W_enc: Float[Tensor, "d_enc d_sae"],
    b_dec: Float[Tensor, " d_enc"],
    k: int,
    *,
    standardize_inputs: bool = True,
    certified: bool | None = None,
) -> TopKActs:
    """`ReLU(TopK_k((u - b_dec) W_enc))` as values and indices, without gradients.

    With the weights of a crosscoder, `z` is [*batch, layer, d_in] and a token's vectors
    are encoded together, `d_enc = n_layers * d_in`. Holds at most one block of
    pre-activations. Activations have the wider dtype of `z` and `W_enc`. For
    `certified` see `step.training_step`.
    """
    dtype = wide_dtype(W_enc.dtype)
    flat = z.reshape(-1, z.shape[-1])
    per_act = len(b_dec) // z.shape[-1]
    W_enc_rows, bias = W_enc.T.to(dtype).contiguous(), b_dec.to(dtype)
    n_acts = len(flat) // per_act
    encoder = make_encoder(W_enc_rows, k, n_acts=n_acts, certified=certified)
    parts: list[tuple[Tensor, ...]] = []
    for rows in flat.split(_INFERENCE_ROWS * per_act):
        tile = make_tile(rows.to(dtype), bias, standardize_inputs)
        selection = encoder(tile.v)
        parts.append((selection.values.relu(), selection.indices, tile.mean, tile.std))
    values, indices, mean, std = (torch.cat(p) for p in zip(*parts, strict=True))
    vectors, out = z.shape[:-1], torch.promote_types(z.dtype, W_enc.dtype)
    batch = vectors if per_act == 1 else vectors[:-1]
    return TopKActs(
        values.to(out).view(*batch, k),
        indices.view(*batch, k),
        mean.to(out).view(*vectors, 1),
        std.to(out).view(*vectors, 1),
    )


def decode_topk(
    acts: TopKActs,
    W_dec: Float[Tensor, "d_sae d_enc"],
    b_dec: Float[Tensor, " d_enc"],
) -> Float[Tensor, "*vectors d_in"]:
    """`(a W_dec + b_dec) std + mean`, from the active rows of `W_dec` alone."""
    k = acts.values.shape[-1]
    values, indices = acts.values.reshape(-1, k), acts.indices.reshape(-1, k)
    u_hat = weighted_row_sum(values.to(W_dec.dtype), indices, W_dec) + b_dec
    vectors = acts.mean.shape[:-1]
    per_act = vectors[-1] if len(vectors) == acts.values.ndim else 1
    return u_hat.view(*vectors, len(b_dec) // per_act) * acts.std + acts.mean
