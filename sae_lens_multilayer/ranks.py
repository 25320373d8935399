"""The processes of one training run: what they add up, and what they agree on.

All that knows of `torch.distributed` is here. torchrun starts the processes, called
ranks; gradients and sums go through NCCL on GPUs and gloo on CPUs, messages always
through gloo. Nothing is pickled. A run of one process communicates with nobody.
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
"""How long ranks wait for one that lives; one that is dead is noticed at once. Others
wait so long for the evaluation of the first."""


class RankError(RuntimeError):
    """The ranks of a run cannot go on together."""


class AgreedError(RankError):
    """A rank has failed where all of them have taken notice: all stand at one place."""


@dataclass(frozen=True)
class Ranks:
    """One process of a run, among all of them; alone by default.

    Methods that talk to the others must be called by all ranks in the same order.
    """

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes, logs and evaluates."""
        return self.index == 0

    @property
    def is_alone(self) -> bool:
        """Whether there are no others."""
        return self.count == 1

    def sum_(self, *tensors: Tensor) -> None:
        """Replace tensors by their sums over ranks, the same bits on each."""
        self._reduce("SUM", tensors)

    def mean_(self, *tensors: Tensor) -> None:
        """Replace tensors by their means over ranks."""
        self.sum_(*tensors)
        for tensor in () if self.is_alone else tensors:
            tensor.div_(self.count)

    def max_(self, *tensors: Tensor) -> None:
        """Replace tensors by their largest entries over ranks."""
        self._reduce("MAX", tensors)

    def _reduce(self, operation: str, tensors: Iterable[Tensor]) -> None:
        for tensor in () if self.is_alone else tensors:
            dense = tensor.contiguous()
            with self._connected():
                dist.all_reduce(dense, getattr(dist.ReduceOp, operation))
            if dense is not tensor:
                tensor.copy_(dense)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, of one shape, in the order of ranks."""
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
        """What all ranks say, in the order of ranks."""
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
        """What the first rank has; of values that JSON can hold."""
        return json.loads(self.gather_bytes(json.dumps(value).encode())[0])

    @contextmanager
    def together(self) -> Generator[None]:
        """Let all ranks fail where one does; the block must not talk to the others.

        Raises:
            AgreedError: On all ranks, if the block raised an exception on any; one that
                is alone raises its own.
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
        said = "" if error is None else f"{type(error).__name__}: {error}"
        messages = self.gather_bytes(said.encode())
        failed = {i: message.decode() for i, message in enumerate(messages) if message}
        raise AgreedError(
            "; ".join(f"Rank {i} has failed: {said}" for i, said in failed.items())
        ) from error

    def check_same(self, what: str, facts: Mapping[str, Any]) -> None:
        """Check that facts, which JSON can hold, are the same on all ranks.

        Raises:
            RankError: If not, on all ranks; names the facts.
        """
        if self.is_alone:
            return
        said = self.gather_bytes(json.dumps(facts).encode())
        first, *others = [json.loads(data) for data in said]
        for index, other in enumerate(others, start=1):
            names = sorted(first.keys() | other.keys())
            differing = [n for n in names if first.get(n) != other.get(n)]
            if differing:
                raise RankError(
                    f"{what} must be the same on all ranks; ranks 0 and {index} differ "
                    f"in {differing}."
                )

    def own_rows(self, dataset: HfDataset) -> HfDataset:
        """This rank's rows of a dataset: every row is one rank's.

        Of rows by number each rank takes every `count`-th one. Of a stream it takes
        files, if their number is a multiple of `count`, else it reads all rows and
        keeps every `count`-th.
        """
        if self.is_alone:
            return dataset
        rows: Any = dataset
        if isinstance(rows, Dataset):
            return rows.shard(self.count, self.index, contiguous=False)
        if rows.n_shards % self.count == 0:
            return split_dataset_by_node(rows, self.index, self.count)
        # datasets' own way would skip other rows when it is begun in the middle.
        return rows.filter(self._is_own, with_indices=True)

    def _is_own(self, _row: object, number: int) -> bool:
        return number % self.count == self.index

    @contextmanager
    def _connected(self) -> Generator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RankError(
                f"Rank {self.index} of {self.count} has lost the others, one of which "
                "has ended or cannot be reached. The run ends; its newest complete "
                f"checkpoint is as it was ({error})."
            ) from error


ALONE = Ranks()
"""The only process of a run."""


def ranks_of_environment(device: str) -> Ranks:
    """This process among those that torchrun has started, once they are connected.

    Args:
        device: Where the SAE is trained.
    """
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
    """Raise ValueError if torchrun has started this process among others.

    Args:
        what: The work that only training shares out.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if int(count) > 1:
        raise ValueError(
            f"{what} must run in one process; torchrun has started {count}. Start it "
            "without torchrun."
        )


def own_device(device: str) -> str:
    """The GPU of this rank among those of its machine, if a device is a GPU.

    Raises:
        ValueError: If the device is another GPU than the first.
    """
    named = torch.device(device)
    if named.type != "cuda":
        return device
    if named.index not in (None, 0):
        raise ValueError(
            "Of several processes each has the GPU of its number (LOCAL_RANK); give "
            f"'cuda' as device instead of {device!r}."
        )
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def bits_of(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Sums of the bits of tensors, which tell tensors apart without being moved."""
    return {name: _sums_of_bits(tensor) for name, tensor in tensors.items()}


def _sums_of_bits(tensor: Tensor) -> list[int]:
    rows = tensor.detach().reshape(-1, tensor.shape[-1] if tensor.ndim else 1)
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    of_row = rows.view(words[tensor.itemsize]).sum(1, dtype=torch.int64)
    numbers = torch.arange(1, len(of_row) + 1, device=of_row.device)
    return [int(of_row.sum()), int((of_row * numbers).sum())]


@cache
def _messages() -> Any:
    """The processes, connected by gloo."""
    if dist.get_backend() == "gloo":
        return dist.group.WORLD
    return dist.new_group(backend="gloo", timeout=_TIMEOUT)
