"""How far a verification or a transfer is: bytes with their rate, then artifacts; on a terminal only."""

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class Checking:
    """A line that follows `verification.verify`."""

    def __init__(self, console: Console) -> None:
        shown: dict[str, Any] = {"console": console, "transient": True, "disable": not console.is_terminal}
        bytes_ = (TextColumn("hashing"), BarColumn(bar_width=24), DownloadColumn(), TransferSpeedColumn())
        stages = (TextColumn("checking rows and figures"), BarColumn(bar_width=24), MofNCompleteColumn())
        self._bars = {"hashing": Progress(*bytes_, **shown), "checking": Progress(*stages, **shown)}
        self._now = ""

    def __enter__(self) -> "Checking":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._now:
            self._bars[self._now].stop()

    def progress(self, what: str, done: int, total: int) -> None:
        """Part of the verification is done."""
        if what != self._now:
            if self._now:
                self._bars[self._now].stop()
            self._now = what
            self._bars[what].start()
            self._bars[what].add_task("", total=total)
        bar = self._bars[what]
        bar.update(bar.task_ids[0], completed=done, total=total)


class Moving:
    """A line that follows files into a store or out of it: bytes, rate and the time left."""

    def __init__(self, console: Console, what: str) -> None:
        columns = (TextColumn(what), BarColumn(bar_width=24), DownloadColumn(), TransferSpeedColumn())
        self._bar = Progress(
            *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> "Moving":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def progress(self, done: int, total: int) -> None:
        """So many bytes are there."""
        self._bar.update(self._task, completed=done, total=total)
