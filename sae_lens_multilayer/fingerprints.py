"""Hashes by which a model's weights, a tokenizer and a file's bytes are known again."""

import hashlib
import json
from typing import Any

import torch
import xxhash
from torch import Tensor

SAMPLES_PER_PARAMETER = 1024
"""Entries of each parameter that `weights_hash` looks at, evenly spaced."""


def weights_hash(model: Any) -> str:
    """Identify the weights of a model cheaply: some entries of every parameter.

    It is of the names, shapes, dtypes and up to `SAMPLES_PER_PARAMETER` exact entries
    of all parameters, so other weights (another revision, a fine-tuned model, other
    processing on loading, another dtype) have another hash; a change of few single
    entries may not be seen.

    Args:
        model: Any torch module.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        n = min(len(flat), SAMPLES_PER_PARAMETER)
        places = torch.arange(n) * (len(flat) - 1) // max(1, n - 1)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(_bytes(flat[places.to(flat.device)].cpu()))
    return digest.hexdigest()


def tokenizer_hash(tokenizer: Any) -> str | None:
    """Identify a tokenizer by all that decides its tokens; None if there is none.

    Truncation and padding, which a call of the tokenizer changes, are left out.
    """
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = tokenizer.get_vocab()
    else:
        rules = json.loads(backend.to_str())
        del rules["truncation"], rules["padding"]
    special = {key: str(token) for key, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(
        json.dumps([rules, special], sort_keys=True).encode()
    ).hexdigest()


def checksum(*tensors: Tensor) -> int:
    """A checksum (XXH3, 64 bits, signed) of the bytes of tensors on the CPU."""
    digest = xxhash.xxh3_64()
    for tensor in tensors:
        digest.update(_bytes(tensor))
    value = digest.intdigest()
    return value - 2**64 if value >= 2**63 else value


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
