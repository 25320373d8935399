"""The batches of a run in their order, read ahead if wanted, with the store's state."""

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from jaxtyping import Float, Int
from sae_lens.training.prefetch import PrefetchingIterator
from torch import Tensor
from typing_extensions import override

from sae_lens_multilayer.store.state import StoreState
from sae_lens_multilayer.store.store import MultiLayerActivationsStore

Batch = Float[Tensor, "token layer d_in"]
PromptIds = Int[Tensor, "prompt pos"]


class _Read(NamedTuple):
    batch: Batch
    prompts: PromptIds | None
    state: StoreState


class RunBatches(Iterator[Batch]):
    """The batches that a training run takes from its store.

    Whether or not a thread reads ahead, batches and evaluation prompts are read in the
    same order, and `state` is the store's after the last batch that was returned.
    """

    def __init__(
        self,
        store: MultiLayerActivationsStore,
        draw_prompts: Callable[[], PromptIds | None],
        prefetch: int = 0,
    ) -> None:
        """Prepare; the store is read from `start` on, `prefetch` batches ahead."""
        self._store = store
        self._draw_prompts = draw_prompts
        self._prefetch = prefetch
        self._batches: Iterator[_Read] = iter(())
        self.state = self._state_before = store.state
        self.prompts: PromptIds | None = None
        """Prompts of the evaluation that follows the last batch."""

    def start(self, n_batches: int, evaluates_after: Callable[[int], bool]) -> None:
        """Begin to read `n_batches`; evaluations follow some, chosen by index."""
        self._batches = self._read(n_batches, evaluates_after)
        if self._prefetch:
            self._batches = PrefetchingIterator(self._batches, self._prefetch)

    def _read(
        self, n_batches: int, evaluates_after: Callable[[int], bool]
    ) -> Generator[_Read]:
        for index in range(n_batches):
            batch = next(self._store)
            prompts = self._draw_prompts() if evaluates_after(index) else None
            yield _Read(batch, prompts, self._store.state)

    @override
    def __next__(self) -> Batch:
        self._state_before = self.state
        batch, self.prompts, self.state = next(self._batches)
        return batch

    def put_back(self) -> None:
        """Set `state` to the one before the last batch, so a resumed run repeats it."""
        self.state = self._state_before

    def paused(self) -> AbstractContextManager[None]:
        """Stop reading ahead, which runs the model, inside the block."""
        if isinstance(self._batches, PrefetchingIterator):
            return self._batches.paused()
        return nullcontext()

    def close(self) -> None:
        """End the thread that reads ahead."""
        if isinstance(self._batches, PrefetchingIterator):
            self._batches.close()
