"""The processes (ranks) of one training run: sums, messages and errors on all ranks.

torchrun starts the processes. Gradients and sums use NCCL on GPUs and gloo on CPUs,
messages always gloo. A run of one process does not communicate.
"""

import atexit
import json
import os
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from sae_lens.config import HfDataset
from torch import Tensor

_TIMEOUT = timedelta(hours=1)
"""Longest wait for a living rank, such as for rank 0 during an evaluation. The death of
a rank is noticed at once."""


class RankError(RuntimeError):
    """The ranks of a run cannot continue together."""


class AgreedError(RankError):
    """An error raised on all ranks at the same point, because it occurred on one."""


@dataclass(frozen=True)
class Ranks:
    """One process of a run; all call methods that communicate in the same order."""

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes, logs and evaluates."""
        return self.index == 0

    @property
    def is_alone(self) -> bool:
        """Whether there are no other ranks."""
        return self.count == 1

    def sum_(self, *tensors: Tensor) -> None:
        """Replace tensors by their sums over ranks, bit-identical on all ranks."""
        self._reduce("SUM", tensors)

    def mean_(self, *tensors: Tensor) -> None:
        """Replace tensors by their means over ranks."""
        self.sum_(*tensors)
        for tensor in () if self.is_alone else tensors:
            tensor.div_(self.count)

    def max_(self, *tensors: Tensor) -> None:
        """Replace tensors by their elementwise maxima over ranks."""
        self._reduce("MAX", tensors)

    def _reduce(self, operation: str, tensors: Iterable[Tensor]) -> None:
        for tensor in () if self.is_alone else tensors:
            dense = tensor.contiguous()
            with self._connected():
                dist.all_reduce(dense, getattr(dist.ReduceOp, operation))
            if dense is not tensor:
                tensor.copy_(dense)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which have one shape, in the order of ranks."""
        if self.is_alone:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        with self._connected():
            dist.all_gather(parts, tensor.contiguous())
        return parts

    def any(self, flag: bool) -> bool:
        """Whether a flag is set on any rank."""
        if self.is_alone:
            return flag
        flags = torch.tensor(int(flag))
        with self._connected():
            dist.all_reduce(flags, dist.ReduceOp.MAX, _messages())
        return bool(flags)

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """The data of all ranks, in the order of ranks."""
        if self.is_alone:
            return [data]
        sizes = [torch.tensor(0) for _ in range(self.count)]
        with self._connected():
            dist.all_gather(sizes, torch.tensor(len(data)), _messages())
            padded = torch.zeros(max(map(int, sizes)), dtype=torch.uint8)
            padded[: len(data)] = torch.frombuffer(
                bytearray(data) or bytearray(1), dtype=torch.uint8
            )[: len(data)]
            parts = [torch.empty_like(padded) for _ in sizes]
            dist.all_gather(parts, padded, _messages())
        return [
            part[: int(size)].numpy().tobytes()
            for part, size in zip(parts, sizes, strict=True)
        ]

    def of_first(self, value: Any) -> Any:
        """The value of rank 0, which JSON can hold."""
        return json.loads(self.gather_bytes(json.dumps(value).encode())[0])

    @contextmanager
    def together(self) -> Generator[None]:
        """Raise AgreedError on all ranks if the block raises an exception on any.

        The block cannot communicate. With one rank, the exception itself is raised.
        """
        if self.is_alone:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        if not self.any(error is not None):
            return
        message = "" if error is None else f"{type(error).__name__}: {error}"
        messages = self.gather_bytes(message.encode())
        failed = [
            f"Rank {i} has failed: {m.decode()}" for i, m in enumerate(messages) if m
        ]
        raise AgreedError("; ".join(failed)) from error

    def check_same(self, what: str, values: Mapping[str, Any]) -> None:
        """Raise RankError on all ranks if values, which JSON can hold, differ."""
        if self.is_alone:
            return
        gathered = self.gather_bytes(json.dumps(values).encode())
        first, *others = [json.loads(data) for data in gathered]
        for index, other in enumerate(others, start=1):
            names = sorted(first.keys() | other.keys())
            differing = [n for n in names if first.get(n) != other.get(n)]
            if differing:
                raise RankError(
                    f"{what} must be the same on all ranks; ranks 0 and {index} differ "
                    f"in {differing}."
                )

    def own_rows(self, dataset: HfDataset) -> HfDataset:
        """This rank's rows of a dataset: every `count`-th.

        Of a stream, it takes whole files if their number is a multiple of `count`.
        """
        if self.is_alone:
            return dataset
        rows: Any = dataset
        if isinstance(rows, Dataset):
            return rows.shard(self.count, self.index, contiguous=False)
        if rows.n_shards % self.count == 0:
            return split_dataset_by_node(rows, self.index, self.count)
        # `split_dataset_by_node` would skip other rows when resumed in the middle.
        return rows.filter(self._is_own, with_indices=True)

    def _is_own(self, _row: object, row_index: int) -> bool:
        return row_index % self.count == self.index

    @contextmanager
    def _connected(self) -> Generator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RankError(
                f"Rank {self.index} of {self.count} has lost the connection to the "
                f"others: one has ended or cannot be reached ({error})."
            ) from error


ALONE = Ranks()
"""The only rank of a run of one process."""


def ranks_of_environment(device: str) -> Ranks:
    """Connect to the other processes of torchrun, if any; `device` is the SAE's."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(own_device(device))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_TIMEOUT)
    atexit.register(dist.destroy_process_group)
    return Ranks(dist.get_rank(), dist.get_world_size())


def check_one_process(what: str) -> None:
    """Raise ValueError if torchrun has started several processes for `what`."""
    count = os.environ.get("WORLD_SIZE", "1")
    if int(count) > 1:
        raise ValueError(
            f"{what} must run in one process; torchrun has started {count}."
        )


def own_device(device: str) -> str:
    """The device of this rank: with "cuda", the GPU with the index LOCAL_RANK."""
    named = torch.device(device)
    if named.type != "cuda":
        return device
    if named.index not in (None, 0):
        raise ValueError(
            f"With several processes, the device must be 'cuda'; got {device!r}."
        )
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def bits_of(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Sums of the bits of tensors: a checksum computed on their device."""
    return {name: _sums_of_bits(tensor) for name, tensor in tensors.items()}


def _sums_of_bits(tensor: Tensor) -> list[int]:
    rows = tensor.detach().reshape(-1, tensor.shape[-1] if tensor.ndim else 1)
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    of_row = rows.view(words[tensor.itemsize]).sum(1, dtype=torch.int64)
    numbers = torch.arange(1, len(of_row) + 1, device=of_row.device)
    return [int(of_row.sum()), int((of_row * numbers).sum())]


@cache
def _messages() -> Any:
    """The group of all ranks for messages, which uses gloo."""
    if dist.get_backend() == "gloo":
        return dist.group.WORLD
    return dist.new_group(backend="gloo", timeout=_TIMEOUT)
