"""How far a verification is: bytes with their rate, then artifacts; on a terminal only."""

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TransferSpeedColumn


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
