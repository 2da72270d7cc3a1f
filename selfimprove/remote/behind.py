"""Pushes that go on behind a run's stages, so that no device waits for a network."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from selfimprove.errors import UserError
from selfimprove.interrupts import Stop
from selfimprove.remote.mirror import Mirror
from selfimprove.remote.moving import Progress, Stopped

AWAITED = "what is published is put into the store"


class Behind:
    """A queue of published stages, pushed one after the other in a thread of its own.

    What a push meets is raised before the next stage, or after it. At the end, however that comes, what is queued is
    finished; only a second Ctrl-C ends it, and the next resume pushes the rest.

    Args:
        kept: where to; None = nothing is pushed.
        progress: told of bytes while the end is waited for.
        failed: told why, where a push is found to have failed at the end.
    """

    def __init__(self, kept: Mirror | None, progress: Progress, failed: Callable[[str], None]) -> None:
        self._kept, self._progress, self._failed = kept, progress, failed
        self._pool = ThreadPoolExecutor(1)
        self._queue: list[Future[None]] = []
        self._moved = (0, 1)
        self._ended = threading.Event()

    def __enter__(self) -> "Behind":
        return self

    def push(self, directory: str) -> None:
        """Let a stage that was just published be pushed.

        Raises:
            UserError: an earlier one could not be.
        """
        self.check()
        if self._kept:
            self._queue.append(self._pool.submit(self._push, self._kept, directory))

    def check(self) -> None:
        """Raise what a push has met so far.

        Raises:
            UserError: one could not be pushed.
        """
        for one in self._queue:
            if one.done() and not one.cancelled():
                one.result()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        pending, stop = set(self._queue), Stop(AWAITED)
        try:
            while pending:
                pending = wait(pending, timeout=0.2)[1]
                stop.due()
                if pending:
                    self._progress(*self._moved)
        finally:
            self._ended.set()
            self._pool.shutdown(wait=True, cancel_futures=True)
        try:
            self.check()
        except UserError as found:
            if kind is None:
                self._failed(found.message)
                raise

    def _push(self, kept: Mirror, directory: str) -> None:
        if self._ended.is_set():
            return
        try:
            kept.push(directory, self._told)
        except BaseException:
            self._ended.set()  # what comes after it would meet the same
            raise

    def _told(self, done: int, total: int) -> None:
        if self._ended.is_set():
            raise Stopped
        self._moved = (done, total)
