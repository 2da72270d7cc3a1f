"""Runs in which many rows are asked, by processes of their own, and what they published beside an undisturbed one."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.paths import ROOT

ROWS = 2048  # 8 shards
HOOK = Path(__file__).parent / "hook"


@dataclass
class Outcome:
    """How a drill ended, beside the undisturbed run of one worker."""

    drill: str
    executor: str
    rows: int
    lost: int  # neither published nor quarantined with a reason
    repeated: int  # ids that are there more than once
    wrong: int  # published with another content, or not there in the undisturbed run
    quarantined: int
    same_file: bool  # its hash is the undisturbed run's
    seconds: float
    note: str = ""

    @property
    def good(self) -> bool:
        """Whether no row was lost, repeated or altered."""
        return not (self.lost or self.repeated or self.wrong) and self.rows + self.quarantined == ROWS

    def plain(self) -> dict[str, object]:
        """As JSON."""
        return asdict(self)


class Field:
    """A folder of runs; `whole` is the undisturbed one, of one worker.

    Args:
        folder: to be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.settings = folder / "drill.json"
        self.spoil()
        driver = self.drive("whole")
        assert driver.wait(300) == 0, said(driver)
        self.whole = published(folder / "runs/whole")
        assert len(self.whole.rows) == ROWS

    def spoil(self, **settings: object) -> None:
        """The faults of the processes that are started from now on; see hook/sitecustomize.py."""
        self.settings.write_text(json.dumps(settings))
        for path in self.folder.glob("drill.json.*"):
            path.unlink()

    def environment(self) -> dict[str, str]:
        """Of a process of a drill."""
        quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        return {**os.environ, "PYTHONPATH": f"{HOOK}{os.pathsep}{ROOT}", "DRILL": str(self.settings), **quiet}

    def _start(self, name: str, module: list[str], prefix: Sequence[str], environment: Mapping[str, str]) -> "Process":
        log = self.folder / f"{name}.{time.monotonic_ns()}.out"
        with log.open("wb") as file:
            process = Process(
                [*prefix, sys.executable, "-m", *module], cwd=self.folder, stdin=subprocess.DEVNULL, stdout=file,
                stderr=file, start_new_session=True, env={**self.environment(), **environment},
            )  # fmt: skip
        process.log = log
        return process

    def drive(
        self, run: str, prefix: Sequence[str] = (), environment: Mapping[str, str] | None = None, **machine: Any
    ) -> "Process":
        """Ask for the rows of a run under these settings of [machine]; again, and it goes on."""
        return self._start(run, ["tests.drills.asking", run, json.dumps(machine)], prefix, environment or {})

    def follow(self, run: str, rank: int, world: int, prefix: Sequence[str] = ()) -> "Process":
        """A rank of a run, as users start it."""
        return self._start(f"{run}-{rank}", ["selfimprove", "work", run], prefix, place(rank, world))

    def done(self, run: str) -> list[Path]:
        """The shards that are published so far."""
        return list((self.folder / "runs" / run / "scratch/shards").glob("*.done"))

    def parts(self, run: str) -> list[Path]:
        """Those under way."""
        return list((self.folder / "runs" / run / "scratch/shards").glob("*.part"))

    def outcome(self, drill: str, executor: str, run: str, began: float, note: str = "") -> Outcome:
        """What the run published, beside the undisturbed one."""
        found, whole = published(self.folder / "runs" / run), self.whole
        lost = [row for row in whole.rows if row not in found.rows and row not in found.quarantined]
        wrong = [row for row, digest in found.rows.items() if whole.rows.get(row) != digest]
        return Outcome(
            drill, executor, len(found.rows), len(lost), found.repeated, len(wrong), len(found.quarantined),
            found.digest == whole.digest, round(time.monotonic() - began, 1), note,
        )  # fmt: skip


class Process(subprocess.Popen):  # type: ignore[type-arg]
    """A process that ends with its whole group."""

    log: Path

    def kill_group(self) -> None:
        """SIGKILL, as when a node goes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()


def said(process: Process) -> str:
    """What it printed."""
    return process.log.read_text(errors="replace")


@dataclass
class Published:
    """The rows of a stage: a digest of each by its id."""

    rows: dict[str, str] = field(default_factory=dict)
    repeated: int = 0
    quarantined: dict[str, str] = field(default_factory=dict)  # reasons
    digest: str = ""  # of all of it


def place(rank: int, world: int) -> dict[str, str]:
    """The variables that a scheduler sets."""
    return {"RANK": str(rank), "WORLD_SIZE": str(world)}


def published(run: Path) -> Published:
    """Read it."""
    found, data = Published(), (run / "rows.jsonl").read_bytes()
    found.digest = hashlib.sha256(data).hexdigest()
    for line in data.splitlines():
        row = json.loads(line)
        name = row.pop("id")
        if name in found.rows or name in found.quarantined:
            found.repeated += 1
        if "lost" in row:
            found.quarantined[name] = row["lost"]
        else:
            found.rows[name] = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()
    return found


def until(found: Callable[[], object], process: Process, seconds: float = 120.0) -> None:
    """Wait until it is so, while the process lives."""
    end = time.monotonic() + seconds
    while not found():
        assert process.poll() is None, said(process)
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.02)


@contextlib.contextmanager
def ended(*processes: Process) -> Iterator[None]:
    """Nothing of them is left afterwards."""
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill_group()
