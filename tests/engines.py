"""The two ways to compute: the C++ kernel and PyTorch."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from sae_lens_multilayer.topk import native

requires_kernel = pytest.mark.skipif(
    not native.is_available(torch.empty(0)), reason="there is no C++ compiler"
)
ENGINES = [pytest.param(True, id="kernel", marks=requires_kernel), False]


@contextmanager
def engine(is_native: bool, n_threads: int = 1) -> Iterator[None]:
    """Use the C++ kernel or PyTorch, with a number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        with pytest.MonkeyPatch.context() as patch:
            if not is_native:
                patch.setattr(native, "is_available", lambda x: False)
            yield
    finally:
        torch.set_num_threads(before)
