"""The update of the weights, with decoder rows of unit norm."""

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_multilayer.topk import native
from sae_lens_multilayer.topk.patterns import can_multiply
from sae_lens_multilayer.topk.tile import row_chunks

_UNSUPPORTED = ("weight_decay", "amsgrad", "maximize")
"""Options of Adam that the kernel does not have."""


@torch.no_grad()
def update_weights(
    optimizer: torch.optim.Optimizer,
    W_enc: Float[Tensor, "d_enc d_sae"],
    W_dec: Float[Tensor, "d_sae d_enc"],
) -> None:
    """Take a step with decoder rows of unit norm, then set gradients to 0.

    The component of the decoder's gradient along each row is removed before the step,
    and rows are scaled to unit norm after it. With the C++ kernel this is one pass over
    float32 weights, equal to the separate passes up to rounding. The first step, in
    which `optimizer` makes its averages, has separate passes, and so have several
    groups of parameters and other optimizers than `torch.optim.Adam`.

    Args:
        optimizer: Of these two weights, and perhaps of others.
    """
    encoder, decoder = _rows(optimizer, W_enc, True), _rows(optimizer, W_dec, False)
    if encoder is None or decoder is None:
        project_decoder_gradient(W_dec)
        optimizer.step()
        normalize_decoder(W_dec)
        optimizer.zero_grad(set_to_none=False)
        return
    gradients = W_enc.grad, W_dec.grad
    _pass_once(optimizer, W_enc, encoder, unit_norm=False)
    _pass_once(optimizer, W_dec, decoder, unit_norm=True)
    W_enc.grad = W_dec.grad = None  # The rest is updated as usual.
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    W_enc.grad, W_dec.grad = gradients


@torch.no_grad()
def project_decoder_gradient(W_dec: Float[Tensor, "d_sae d_in"]) -> None:
    """Remove from `W_dec.grad` the component along each unit-norm row, in place."""
    if W_dec.grad is None:
        return
    for rows, grad in zip(row_chunks(W_dec), row_chunks(W_dec.grad), strict=True):
        along = torch.linalg.vecdot(grad, rows, dim=1)
        grad.addcmul_(rows, along.unsqueeze(1), value=-1)


@torch.no_grad()
def normalize_decoder(W_dec: Float[Tensor, "d_sae d_in"]) -> None:
    """Scale each row of `W_dec` to unit norm, in place; rows of zeros stay zero."""
    norm = torch.linalg.vector_norm(W_dec, dim=1, keepdim=True)
    W_dec.div_(norm.masked_fill_(norm == 0, 1))


def _rows(
    optimizer: torch.optim.Optimizer, W: Tensor, transposed: bool
) -> list[Tensor] | None:
    """Rows of latents of weights, gradient and averages, if the kernel takes them."""
    # A subclass of Adam may have another update.
    if type(optimizer) is not torch.optim.Adam or len(optimizer.param_groups) > 1:
        return None
    (group,), state = optimizer.param_groups, optimizer.state.get(W)
    if not state or W.grad is None or any(group[name] for name in _UNSUPPORTED):
        return None
    tensors = [W, W.grad, state["exp_avg"], state["exp_avg_sq"]]
    rows = [tensor.T if transposed else tensor for tensor in tensors]
    return rows if can_multiply(*rows) else None


def _pass_once(
    optimizer: torch.optim.Optimizer, W: Tensor, rows: list[Tensor], unit_norm: bool
) -> None:
    """Update W by the kernel, which also clears its gradient."""
    (group,) = optimizer.param_groups
    state, (beta1, beta2) = optimizer.state[W], group["betas"]
    state["step"] += 1
    n_steps = state["step"].item()
    rate = group["lr"] / (1 - beta1**n_steps)
    root = (1 - beta2**n_steps) ** -0.5
    rates = [1 - beta1, beta2, 1 - beta2, rate, root, group["eps"]]
    numbers = torch.tensor(rates, dtype=torch.float32, device="cpu")
    for tensor in rows:
        torch.autograd.graph.increment_version(tensor)
    native.call("adam_step", *rows, *rows[0].shape, numbers, int(unit_norm))
