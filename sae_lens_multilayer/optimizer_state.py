"""The state of an optimiser as tensors with names, as safetensors files need it."""

from collections.abc import Mapping

import torch
from torch import Tensor

_PREFIX = "optimizer"


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Its moments and counters, without learning rates and other settings."""
    return {
        f"{_PREFIX}.{index}.{name}": tensor
        for index, state in optimizer.state_dict()["state"].items()
        for name, tensor in state.items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Load the result of `optimizer_tensors`; other names are skipped."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(f"{_PREFIX}."):
            _, index, key = name.split(".")
            # The fused update needs moments laid out in memory as their parameter is.
            like = params[int(index)]
            if tensor.shape == like.shape:
                tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
            state.setdefault(int(index), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
