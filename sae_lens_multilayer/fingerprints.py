"""Hashes that identify a tokenizer and the bytes of a file."""

import hashlib
import json
from typing import Any

import torch
import xxhash
from torch import Tensor


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
