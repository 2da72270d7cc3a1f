"""The program under a microphone: `python -m tests.chaos.driver PLAN ARGUMENTS...` runs the command line as it is.

Every moment at which a kill could tear something (a file opened for writing, a rename, an fsync, an answer kept, a
link, a process started) is written to a ledger that outlives a SIGKILL. At the moment that the plan names, the driver
says so on a pipe and, where the plan wants the kill exactly there, waits for it. The package itself has no hook:
Python's audit events tell of files, and `Answering.put`, `Journal.put` and `os.fsync` are wrapped here.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

STARTING = "starting"  # what comes before the first stage


class Ledger:
    """Append-only lines [moment, stage, detail]; one write each, so that a killed writer leaves whole lines."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._file = os.open(plan["ledger"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._notify: int = plan["notify"]
        self._target: dict[str, Any] | None = plan["target"]
        self._count = 0
        self.stage = STARTING

    def moment(self, name: str, detail: str = "") -> None:
        """Note a moment that is about to come, and stop there where the plan says so."""
        os.write(self._file, json.dumps([name, self.stage, detail]).encode() + b"\n")
        target = self._target
        if target is None:
            return
        if self.stage == target["stage"] and name == target["moment"]:
            self._count += 1
            if self._count < target["count"]:
                return
        elif self.stage not in target["later"]:  # the moment did not come: stop at the first one of the next stage
            return
        self._target = None
        os.write(self._notify, json.dumps([name, self.stage]).encode())
        if target["exact"]:
            time.sleep(60)


def listen(ledger: Ledger, run: str) -> None:
    """Turn what the process does below the run's directory into moments."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        match event, arguments:
            case ("subprocess.Popen", (_, command, *_)) if "selfimprove.engine.host" in str(command):
                ledger.moment("engine start")
            case ("open", (str() | os.PathLike() as path, _, int(flags))) if flags & (os.O_WRONLY | os.O_RDWR):
                if run in (name := os.fspath(path)):
                    ledger.moment(opened(name, flags), name)
            case ("os.rename", (str() | os.PathLike() as source, *_)) if run in (name := os.fspath(source)):
                ledger.moment("publish" if name.endswith(".partial") else "rename", name)
            case ("os.symlink", (_, target, *_)) if run in str(target):
                ledger.moment("link", str(target))
            case ("os.mkdir", (str() | os.PathLike() as path, *_)) if run in (name := os.fspath(path)):
                ledger.moment("mkdir", name)
            case ("shutil.rmtree", (path, *_)) if run in str(path):
                ledger.moment("clean up", str(path))
            case ("sqlite3.connect", (path, *_)) if run in str(path):
                ledger.moment("open journal", str(path))

    sys.addaudithook(hook)


def opened(name: str, flags: int) -> str:
    """What a file opened for writing is."""
    if name.endswith("/metrics.jsonl") and flags & os.O_APPEND:
        return "step"  # the line of an optimiser step, which is done
    for end, moment in (("manifest.json.tmp", "manifest"), ("state.json.tmp", "state"), (".lock", "lock")):
        if name.endswith(end):
            return moment
    return "write"


def wrap(ledger: Ledger) -> None:
    """Answering.put, Journal.put and put_paid, fsync, and the stage that the state names."""
    from selfimprove.execution.shard import Answering
    from selfimprove.judges.journal import Journal
    from selfimprove.store import Run

    put, put_paid, fsync, write_state = Journal.put, Journal.put_paid, os.fsync, Run.write_state
    answer = Answering.put

    def noted_answer(self: Answering, number: int, found: Any) -> None:
        key = f"{self._shard.id}/{number}"
        ledger.moment("repeated put" if number in self.known else "put", key)
        answer(self, number, found)
        ledger.moment("kept", key)

    def noted_put(self: Journal, key: str, value: bytes) -> None:
        ledger.moment("repeated put" if self.get([key]) else "put", key)
        put(self, key, value)
        ledger.moment("kept", key)

    def noted_put_paid(self: Journal, answers: Any, account: str, usd: float, **counts: int) -> None:
        for key in answers:
            ledger.moment("repeated put" if self.get([key]) else "put", key)
        put_paid(self, answers, account, usd, **counts)
        for key in answers:
            ledger.moment("kept", key)

    def noted_fsync(descriptor: Any) -> None:
        ledger.moment("fsync")
        fsync(descriptor)

    def noted_state(self: Run, state: str, iteration: int = 0, stage: str = "", error: str = "") -> None:
        ledger.stage = f"iter-{iteration:03d}/{stage}" if stage else "ending"
        write_state(self, state, iteration, stage, error)

    Answering.put = noted_answer  # type: ignore[method-assign]
    Journal.put, Journal.put_paid = noted_put, noted_put_paid  # type: ignore[method-assign]
    os.fsync, Run.write_state = noted_fsync, noted_state  # type: ignore[method-assign, assignment]


def main() -> None:
    """Run the command line."""
    plan = json.loads(sys.argv[1])
    sys.argv = ["selfimprove", *sys.argv[2:]]
    ledger = Ledger(plan)
    listen(ledger, f"{Path('runs', plan['run'])}/")
    wrap(ledger)
    from selfimprove import cli

    cli.main()


if __name__ == "__main__":
    main()
