"""Ctrl-C: the first is obeyed at the next safe point, the second at once.

An exception raised wherever a signal happens to arrive (an import, a finaliser, a callback of C code) can be swallowed
there; one raised at a point of our choosing cannot. Signals belong to the process, so whoever works in it may ask here:
an engine begins no further row once `asked`, finishes those under way, and then calls `check`.
"""

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

PATIENCE = 30.0  # seconds that what is under way may take before it is said what is waited for


class Interrupts:
    """While entered, turns SIGINT and SIGTERM into a request that `check` obeys.

    Args:
        requested: told when the first one comes.
        waiting: told what is waited for, where finishing takes longer than PATIENCE.
    """

    def __init__(self, requested: Callable[[], None], waiting: Callable[[str], None] = lambda what: None) -> None:
        self._requested = requested
        self.waiting = waiting
        self.pending = False
        self._before: dict[int, signal.Handlers | Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._arrived)
        _entered.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        _entered.remove(self)
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


_entered: list[Interrupts] = []  # what is entered in this process, the innermost last


def asked() -> bool:
    """Whether the user asked this process to stop."""
    return any(one.pending for one in _entered)


def check() -> None:
    """A safe point of whatever is entered.

    Raises:
        KeyboardInterrupt: the user asked to stop.
    """
    if asked():
        raise KeyboardInterrupt


class Stop:
    """The user's wish to stop, passed on once to whoever has work under way.

    Args:
        what: is waited for, said after PATIENCE.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._since: float | None = None
        self._said = False

    def due(self) -> bool:
        """Whether it is to be passed on now; to be called over and over until the work is done."""
        if self._since is None:
            if asked():
                self._since = time.monotonic()
            return self._since is not None
        if not self._said and time.monotonic() - self._since > PATIENCE:
            self._said = True
            for one in _entered:
                one.waiting(self._what)
        return False
