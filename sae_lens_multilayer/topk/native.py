"""Bindings of the C++ kernels, which are compiled on first use if there is a compiler.

Compiling takes seconds; the library is stored in the user's cache folder, with its
digest. It is loaded only if the digest is right and no other user can change it.
Without it the callers use PyTorch. The environment variable
SAE_LENS_MULTILAYER_NATIVE=0 turns it off.
"""

import ctypes
import errno
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

from sae_lens_multilayer.files import write_whole

logger = logging.getLogger(__name__)

_HEADERS = ("order.h", "rows.h")
_SOURCES = ("kernel.cpp", "products.cpp", "update.cpp")
_FOLDER = Path(__file__).parent
_FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno"]
_VECTOR_FLAGS = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"),
        "-mprefer-vector-width=512",
    ],
}
_COMPILE_TIMEOUT_S = 120


def is_available(x: Tensor) -> bool:
    """Whether the kernel can be used for tensors on the device of `x`."""
    return x.device.type == "cpu" and _kernel() is not None


def round_rows(
    x: Float[Tensor, "row d_in"],
) -> tuple[Float[Tensor, "row d_in"], Float[Tensor, " row"], Float[Tensor, " row"]]:
    """Float32 rows in bfloat16, their norms, and the norms of their rounding errors."""
    check(x, torch.float32, x.is_contiguous())
    rounded = torch.empty_like(x, dtype=torch.bfloat16)
    norms, errors = x.new_empty(len(x)), x.new_empty(len(x))
    call("round_rows", x, *x.shape, rounded, norms, errors)
    return rounded, norms, errors


def largest_positive(
    h: Float[Tensor, "act column"],
    k: int,
    latents: Int[Tensor, " latent"] | None = None,
) -> tuple[Float[Tensor, "act k"], Int[Tensor, "act k"]]:
    """Values and indices of the k largest entries above 0 of each row, by index.

    `h` is float32 with contiguous rows. NaN is largest. If fewer than k entries are
    above 0, the rest are zeros with the indices of other entries. If some `latents` are
    given, indices are those among these columns.
    """
    check(h, torch.float32, h.stride(1) == 1)
    values = h.new_empty(len(h), k)
    indices = h.new_empty(len(h), k, dtype=torch.int64)
    n = h.shape[1] if latents is None else len(latents)
    call("largest_positive", h, len(h), h.stride(0), latents, n, k, values, indices)
    return values, indices


def certified_topk(
    h: Float[Tensor, "act column"],
    errors: Float[Tensor, " act"],
    x: Float[Tensor, "act d_in"],
    rows: Float[Tensor, "latent d_in"],
    k: int,
    latents: Int[Tensor, " latent"] | None = None,
) -> tuple[Float[Tensor, "act k"], Int[Tensor, "act k"], Bool[Tensor, " act"]]:
    """Values and indices of the k largest entries of `x rows^T`, and which are proven.

    An entry of `h` is within its error of the float32 product, so an entry within two
    errors of the k-th largest of `h` may belong to the k largest. The float32 values of
    all these are computed and the k largest returned. Rows with fewer than k entries
    above twice the error, with NaN or infinity, or with more than 4k + 64 candidates
    are not proven and have undefined values.

    Args:
        h: The approximate product, bfloat16 with contiguous rows.
        errors: Bound of the error of `h`, apart from the rounding of `h` itself.
        latents: The columns of `h` that belong to `rows`; None if they are all.
    """
    check(h, torch.bfloat16, h.stride(1) == 1)
    for tensor in (errors, x, rows):
        check(tensor, torch.float32, tensor.is_contiguous())
    values = x.new_empty(len(h), k)
    indices = h.new_empty(len(h), k, dtype=torch.int64)
    proven = h.new_empty(len(h), dtype=torch.bool)
    outputs = values, indices, proven
    of_h = h, len(h), h.stride(0), latents, len(rows)
    call("certified_topk", *of_h, errors, x, rows, x.shape[1], k, *outputs)
    return outputs


def check(x: Tensor, dtype: torch.dtype, is_contiguous: bool) -> None:
    """Raise ValueError if the kernel cannot read `x`."""
    if x.dtype != dtype or x.device.type != "cpu" or not is_contiguous:
        raise ValueError(
            f"The kernel needs contiguous {dtype} on the CPU; got {x.dtype} on "
            f"{x.device} with shape {tuple(x.shape)} and strides {x.stride()}."
        )


def call(name: str, *arguments: Tensor | int | None) -> None:
    """Call a function of the kernel with `torch.get_num_threads` threads."""
    kernel = _kernel()
    assert kernel is not None  # Callers check `is_available` first.
    _run(kernel, name, *arguments)


def _run(kernel: ctypes.CDLL, name: str, *arguments: Tensor | int | None) -> None:
    converted = [
        ctypes.c_int64(a)
        if isinstance(a, int)
        else ctypes.c_void_p(None if a is None else a.data_ptr())
        for a in arguments
    ]
    getattr(kernel, name)(*converted, ctypes.c_int(torch.get_num_threads()))


@cache
def _kernel() -> ctypes.CDLL | None:
    if os.environ.get("SAE_LENS_MULTILAYER_NATIVE") == "0":
        return None
    compiler = _compiler()
    if compiler is None:
        logger.info("No C++ compiler found; using PyTorch, which is slower.")
        return None
    try:
        library = _compiled(compiler)
        try:
            kernel = ctypes.CDLL(str(library))
        except OSError:
            library.unlink()  # It was compiled on another system: compile it here.
            kernel = ctypes.CDLL(str(_compiled(compiler)))
        _check_result(kernel)
        return kernel
    # `Path.home` raises RuntimeError if there is no home folder; a library without the
    # functions raises AttributeError.
    except (OSError, RuntimeError, AttributeError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or ""
        logger.warning(
            "Could not compile and load the C++ kernel; using PyTorch, which is "
            "slower: %s\n%s",
            error,
            output,
        )
        return None


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def _check_result(kernel: ctypes.CDLL) -> None:
    """Raise RuntimeError if the kernel computes a small case wrong."""
    h = torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.float32, device="cpu")
    values, indices = torch.zeros_like(h), torch.zeros_like(h, dtype=torch.int64)
    _run(kernel, "largest_positive", h, 1, 3, None, 3, 1, values, indices)
    if (values[0, 0], indices[0, 0]) != (3, 1):
        raise RuntimeError(f"its largest entry of {h} is {values[0, 0]}")
    starts = torch.arange(2, device="cpu")
    entry = torch.zeros(1, dtype=torch.int32, device="cpu")
    product = torch.zeros(1, dtype=torch.float32, device="cpu")
    _run(kernel, "add_product", starts, entry, entry, 1, 1, values, values, 1, product)
    if product != 9:
        raise RuntimeError(f"its product of 3 and 3 is {product.item()}")


def _compiled(compiler: str) -> Path:
    """Path of the compiled kernel, from the cache if source and flags are the same."""
    vectors = _VECTOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), [])
    command = [*compiler.split(), *_FLAGS, *vectors]
    sources = b"".join((_FOLDER / n).read_bytes() for n in _HEADERS + _SOURCES)
    key = _sha256(" ".join(command).encode() + sources)
    cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    library = cache_dir / "sae_lens_multilayer" / f"topk-{key[:16]}.so"
    library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _check_private(library.parent)
    digest = library.with_suffix(".sha256")
    if library.exists() and digest.exists():
        _check_private(library)
        if digest.read_bytes() == _sha256(library.read_bytes()).encode():
            return library
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        # Each process compiles in its own folder; the last one replaces the files.
        built = Path(folder) / library.name
        subprocess.run(
            [*command, *(str(_FOLDER / n) for n in _SOURCES), "-o", str(built)],
            check=True,
            capture_output=True,
            text=True,
            timeout=_COMPILE_TIMEOUT_S,
        )
        built.chmod(0o700)
        write_whole(digest, _sha256(built.read_bytes()))
        built.replace(library)
    return library


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _check_private(path: Path) -> None:
    """Raise PermissionError if another user can change `path`, as ssh does."""
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        problem = "must be owned and writable by this user only (chmod go-w, or delete)"
        raise PermissionError(errno.EPERM, problem, str(path))
