"""The batches of a run in their order, read ahead if wanted, with the store's place."""

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from jaxtyping import Float, Int
from sae_lens.training.prefetch import PrefetchingIterator
from torch import Tensor
from typing_extensions import override

from sae_lens_multilayer.store.place import Place
from sae_lens_multilayer.store.store import MultiLayerActivationsStore

Batch = Float[Tensor, "token layer d_in"]
Prompts = Int[Tensor, "prompt pos"]


class _Taken(NamedTuple):
    batch: Batch
    prompts: Prompts | None
    place: Place


class RunBatches(Iterator[Batch]):
    """What a training run takes from its store.

    Whether or not a thread reads ahead, batches and prompts for evaluation leave the
    store in the same order, and `place` is where the store stood after the last ones
    that were taken.
    """

    def __init__(
        self,
        store: MultiLayerActivationsStore,
        draw_prompts: Callable[[], Prompts],
        prefetch: int = 0,
    ) -> None:
        """Prepare; the store is read from `start` on.

        Args:
            draw_prompts: Takes the prompts of an evaluation from the store.
            prefetch: Batches to read ahead; 0: none.
        """
        self._store = store
        self._draw_prompts = draw_prompts
        self._prefetch = prefetch
        self._source: Iterator[_Taken] = iter(())
        self.place = self._place_before = store.place
        self.prompts: Prompts | None = None
        """Prompts that come after the last batch and are to be evaluated on."""

    def start(self, n_batches: int, evaluates_after: Callable[[int], bool]) -> None:
        """Begin to read.

        Args:
            n_batches: Batches that the run takes from here on; the model does not run
                for more.
            evaluates_after: Whether an evaluation follows a batch, by its index.
        """
        self._source = self._read(n_batches, evaluates_after)
        if self._prefetch:
            self._source = PrefetchingIterator(self._source, self._prefetch)

    def _read(
        self, n_batches: int, evaluates_after: Callable[[int], bool]
    ) -> Generator[_Taken]:
        for index in range(n_batches):
            batch = next(self._store)
            prompts = self._draw_prompts() if evaluates_after(index) else None
            yield _Taken(batch, prompts, self._store.place)

    @override
    def __next__(self) -> Batch:
        self._place_before = self.place
        batch, self.prompts, self.place = next(self._source)
        return batch

    def put_back(self) -> None:
        """Let `place` be where the store stood before the last batch was asked for."""
        self.place = self._place_before

    def paused(self) -> AbstractContextManager[None]:
        """Keep the thread that reads ahead from running the model meanwhile."""
        if isinstance(self._source, PrefetchingIterator):
            return self._source.paused()
        return nullcontext()

    def close(self) -> None:
        """End the thread that reads ahead."""
        if isinstance(self._source, PrefetchingIterator):
            self._source.close()
