"""Start the program in a session of its own, and end everything that it started."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.paths import ROOT

TAG = "SELFIMPROVE_CHAOS"  # in the environment of all that the program starts, whatever session it goes to


@dataclass
class Launch:
    """One start of the program under `driver`, in the folder that holds `runs/`.

    Args:
        folder: the working directory.
        run: name of the run.
        arguments: of the command line.
        target: the moment to be told of; see driver.Ledger.
        prefix: a command that starts the program, such as a tracer.
    """

    folder: Path
    run: str
    arguments: list[str]
    target: dict[str, Any] | None = None
    prefix: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tag = uuid.uuid4().hex
        self.ledger = self.folder / f"{self.run}.ledger"
        self.output = self.folder / f"{self.run}.out"
        self._told, theirs = os.pipe()
        plan = {"run": self.run, "ledger": str(self.ledger), "notify": theirs, "target": self.target}
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        quiet = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [*self.prefix, sys.executable, "-m", "tests.chaos.driver", json.dumps(plan), *self.arguments],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=[theirs],
                env={**os.environ, "PYTHONPATH": path, TAG: self.tag, **quiet, **self.environment},
            )
        os.close(theirs)

    def wait(self, seconds: float) -> str:
        """Wait until the target's moment ("moment"), the end ("ended") or the time is up ("time")."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            ready, _, _ = select.select([self._told], [], [], min(left, 0.2))
            if ready:
                if os.read(self._told, 1000):
                    return "moment"
                self.process.wait(60)
                return "ended"
            if self.process.poll() is not None:
                return "ended"
        return "time"

    def everything(self) -> list[psutil.Process]:
        """The program and all that came of it, also what has another session or parent."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(TAG) == self.tag:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def kill(self) -> int:
        """SIGKILL for all of it, until nothing is left; returns how many processes there were."""
        killed = set()
        try:
            children = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.Error:
            children = []
        for pid in [self.process.pid, *(child.pid for child in children)]:
            _signal(pid)
            killed.add(pid)
        self.process.wait()
        while left := self.everything():
            for process in left:
                _signal(process.pid)
                killed.add(process.pid)
            time.sleep(0.01)
        self.close()
        return len(killed)

    def close(self) -> None:
        """Let go of the pipe."""
        os.close(self._told)

    def said(self) -> str:
        """What the program printed."""
        return self.output.read_text(encoding="utf-8", errors="replace")


def _signal(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
