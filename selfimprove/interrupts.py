"""Ctrl-C: the first is obeyed at the next safe point, the second at once.

An exception raised wherever a signal happens to arrive (an import, a finaliser, a callback of C code) can be swallowed
there; one raised at a point of our choosing cannot.
"""

import signal
import threading
from collections.abc import Callable
from types import FrameType


class Interrupts:
    """While entered, turns SIGINT and SIGTERM into a request that `check` obeys.

    Args:
        requested: told when the first one comes.
    """

    def __init__(self, requested: Callable[[], None]) -> None:
        self._requested = requested
        self.pending = False
        self._before: dict[int, signal.Handlers | Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._arrived)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """A safe point.

        Raises:
            KeyboardInterrupt: a signal came since the last one.
        """
        if self.pending:
            raise KeyboardInterrupt

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self.pending:
            raise KeyboardInterrupt
        self.pending = True
        self._requested()
