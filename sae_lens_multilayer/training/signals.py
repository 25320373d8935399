"""SIGINT and SIGTERM during a run: end after a whole step, never within a save."""

import logging
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)


@contextmanager
def handled_by(handler: Callable[[int, Any], None]) -> Generator[None]:
    """Handle SIGINT and SIGTERM by `handler` within the block.

    Outside of the main thread, which alone may set handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            # None stands for a handler that was not set from Python.
            signal.signal(number, signal.SIG_DFL if previous is None else previous)


def restore_defaults() -> None:
    """Let the next SIGINT or SIGTERM end the process at once."""
    # Not the earlier handlers: SAELens leaves one behind whose exception, raised within
    # a step, would look like a request to save.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def held_signals() -> Generator[None]:
    """Deliver SIGINT and SIGTERM that arrive within the block at its end."""
    arrived: list[int] = []

    def hold(number: int, _frame: Any) -> None:
        logger.warning("Waiting for the save that is under way.")
        arrived.append(number)

    try:
        with handled_by(hold):
            yield
    finally:
        for number in arrived:
            signal.raise_signal(number)
