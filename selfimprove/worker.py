"""A worker of a study: one process that makes one run after another and keeps one engine for all of them.

Started by `study.Worker` as `python -m selfimprove.worker FD PID LOG`.
"""

import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec

from selfimprove import children
from selfimprove import run as running
from selfimprove.errors import UserError
from selfimprove.execution import Executors
from selfimprove.plan import BASE, Step
from selfimprove.recipe import Recipe
from selfimprove.store import Manifest
from selfimprove.study import Ended, Reply, Stage, Task


class Teller:
    """A run.Display that tells the driver."""

    def __init__(self, send: Callable[[Reply], None]) -> None:
        self.send = send
        self.scores: dict[str, float] = {}

    def started(self, step: Step, number: int, total: int) -> None:
        """See run.Display."""
        self.send(Stage(number - 1, total))

    def progress(self, what: str, done: int, total: int) -> None:
        """See run.Display; a study counts stages."""

    def finished(self, step: Step, manifest: Manifest, scores: dict[str, Any] | None) -> None:
        """See run.Display."""
        if scores and step.iteration > BASE:
            self.scores = {mode: score["value"] for mode, score in scores["scores"].items()}

    def stopping(self) -> None:
        """See run.Display; the driver knows."""

    def waiting(self, what: str) -> None:
        """See run.Display; goes to the log."""
        print(f"stopping: {what}", file=sys.stderr)


def make(task: Task, executors: Executors, send: Callable[[Reply], None]) -> Ended:
    """Make a run and say how it ended; the traceback of what is no mistake of the user's goes to the log."""
    began, teller = time.monotonic(), Teller(send)
    try:
        path = Path(task.run)
        chosen = Recipe.model_validate(task.recipe)
        siblings = [Path(sibling) for sibling in task.siblings]
        running.iterate(running.place(path.parent, path.name), chosen, teller, task.command, executors, siblings)
    except KeyboardInterrupt:
        return Ended("stopped")
    except UserError as error:
        executors.close()  # it may be what failed
        return Ended("failed", time.monotonic() - began, error.message)
    except Exception as error:
        traceback.print_exc()
        executors.close()  # whatever it was in the middle of
        return Ended("failed", time.monotonic() - began, f"{type(error).__name__}: {error}".splitlines()[0])
    return Ended("done", time.monotonic() - began, scores=teller.scores)


def main(descriptor: int, driver: int, log: str) -> None:
    """Make runs until the driver (a process id) hangs up or dies."""
    children.tie(driver)
    connection = Connection(descriptor)

    def send(reply: Reply) -> None:
        connection.send_bytes(msgspec.msgpack.encode(reply))

    with Executors(Path(log)) as executors:
        while True:
            try:
                task = msgspec.msgpack.decode(connection.recv_bytes(), type=Task)
            except (EOFError, KeyboardInterrupt):
                return
            send(make(task, executors, send))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
