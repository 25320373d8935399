"""The C++ of `kernel.cpp`: compiled where there is a compiler, otherwise not used.

PyTorch computes the same where it is missing; see `select.py`. It is compiled when it
is first needed, which takes seconds, and kept in the user's cache folder. The
environment variable SAE_LENS_MULTILAYER_NATIVE=0 turns it off.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("kernel.cpp")
_FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp"]
_VECTOR_FLAGS = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"),
        "-mprefer-vector-width=512",
    ],
}
_COMPILE_TIMEOUT_S = 120


def is_available(x: Tensor) -> bool:
    """Whether the kernel can be used for tensors that are where `x` is."""
    return x.device.type == "cpu" and _kernel() is not None


def round_rows(
    x: Float[Tensor, "row d_in"],
) -> tuple[Float[Tensor, "row d_in"], Float[Tensor, " row"], Float[Tensor, " row"]]:
    """Rows in bfloat16, their norms before, and the norms of what rounding took away.

    Args:
        x: Float32, contiguous.
    """
    _check(x, torch.float32, x.is_contiguous())
    rounded = torch.empty_like(x, dtype=torch.bfloat16)
    norms, errors = x.new_empty(len(x)), x.new_empty(len(x))
    _call("round_rows", x, *x.shape, rounded, norms, errors)
    return rounded, norms, errors


def largest_positive(
    h: Float[Tensor, "act latent"], k: int
) -> tuple[Float[Tensor, "act k"], Int[Tensor, "act k"]]:
    """The k largest entries above 0 of each row, exactly, in no particular order.

    Args:
        h: Float32, with contiguous rows; NaN is largest.

    Returns:
        Values and places. Where fewer than k are above 0, zeros and places of others
        fill up.
    """
    _check(h, torch.float32, h.stride(1) == 1)
    values = h.new_empty(len(h), k)
    places = torch.empty(len(h), k, dtype=torch.int64)
    _call("largest_positive", h, *_shape(h), k, values, places)
    return values, places


def certified_topk(
    h: Float[Tensor, "act latent"],
    errors: Float[Tensor, " act"],
    x: Float[Tensor, "act d_in"],
    rows: Float[Tensor, "latent d_in"],
    k: int,
) -> tuple[Float[Tensor, "act k"], Int[Tensor, "act k"], Bool[Tensor, " act"]]:
    """The k largest entries of `x rows^T`, all of them above 0, from approximate ones.

    k approximate entries reach some bound. A k-th largest entry differs from its
    approximation by at most the error, and so does any entry that exceeds it: all of
    those have an approximation within two errors of the bound. Their float32 values are
    computed and the k largest taken.

    Args:
        h: The approximate product, in bfloat16, with contiguous rows.
        errors: How far an entry of `h` can be from that of the float32 product, apart
            from the rounding of `h` itself.

    Returns:
        Values, places, and which rows these are proven for; the others hold nothing.
        Without proof are rows with fewer than k entries above twice the error, with NaN
        or infinity, or with more than 4k + 64 entries to look at.
    """
    _check(h, torch.bfloat16, h.stride(1) == 1)
    for tensor in (errors, x, rows):
        _check(tensor, torch.float32, tensor.is_contiguous())
    values = x.new_empty(len(h), k)
    places = torch.empty(len(h), k, dtype=torch.int64)
    proven = torch.empty(len(h), dtype=torch.bool)
    sizes = x.shape[1], k
    _call(
        "certified_topk", h, *_shape(h), errors, x, rows, *sizes, values, places, proven
    )
    return values, places, proven


def _check(x: Tensor, dtype: torch.dtype, is_contiguous: bool) -> None:
    if x.dtype != dtype or x.device.type != "cpu" or not is_contiguous:
        raise ValueError(
            f"The kernel needs contiguous {dtype} on the CPU; got {x.dtype} on "
            f"{x.device} with shape {tuple(x.shape)} and strides {x.stride()}."
        )


def _shape(h: Tensor) -> tuple[int, int, int]:
    return len(h), h.stride(0), h.shape[1]


def _call(name: str, *arguments: Tensor | int) -> None:
    kernel = _kernel()
    assert kernel is not None  # `is_available` was asked
    converted = [
        ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int64(a)
        for a in arguments
    ]
    getattr(kernel, name)(*converted, ctypes.c_int(torch.get_num_threads()))


@cache
def _kernel() -> ctypes.CDLL | None:
    if os.environ.get("SAE_LENS_MULTILAYER_NATIVE") == "0":
        return None
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        logger.info("No C++ compiler was found: PyTorch selects the largest latents.")
        return None
    try:
        library = _compiled(compiler)
        try:
            return ctypes.CDLL(str(library))
        except OSError:
            library.unlink()  # it is torn, and will be compiled anew
            return ctypes.CDLL(str(_compiled(compiler)))
    # A RuntimeError says that there is no home folder.
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or ""
        logger.warning(
            "The C++ kernel could not be compiled and loaded, and PyTorch is used "
            "instead, which is slower: %s\n%s",
            error,
            output,
        )
        return None


def _compiled(compiler: str) -> Path:
    """The compiled kernel, from the cache if this source was compiled before."""
    vectors = _VECTOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), [])
    command = [*compiler.split(), *_FLAGS, *vectors]
    key = hashlib.sha256(" ".join(command).encode() + _SOURCE.read_bytes()).hexdigest()
    cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    library = cache_dir / "sae_lens_multilayer" / f"topk-{key[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            # Another process may do the same now: each has its own, the last one stays.
            built = Path(folder) / library.name
            subprocess.run(
                [*command, str(_SOURCE), "-o", str(built)],
                check=True,
                capture_output=True,
                text=True,
                timeout=_COMPILE_TIMEOUT_S,
            )
            built.replace(library)
    return library
