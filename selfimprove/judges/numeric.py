"""Answers that are numbers or formulas, compared by math-verify in processes that can be ended."""

import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from selfimprove import children, interrupts
from selfimprove.errors import UserError
from selfimprove.judges.protocol import Candidate, Opinion

SECONDS = 15.0  # for one answer; the library ends most by itself after 5
START_SECONDS = 120.0  # the first answer waits for the imports
ROWS_PER_PROCESS = 256


def checker() -> Callable[[Sequence[Candidate]], list[Opinion]]:
    """Whether the answers equal the reference answers.

    Raises:
        UserError: math-verify is not installed.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise UserError("checker 'numeric' needs math-verify", "pip install 'selfimprove[math]'")
    return _check


def _check(candidates: Sequence[Candidate]) -> list[Opinion]:
    rows = [(c.answer, c.text) for c in candidates if c.answer is not None]
    number = min(len(os.sched_getaffinity(0)), -(-len(rows) // ROWS_PER_PROCESS))
    parts = [rows[i::number] for i in range(number)]
    with ThreadPoolExecutor(max(1, number)) as pool:
        found = list(pool.map(_compared, parts))
    opinions = iter([found[i % number][i // number] for i in range(len(rows))])
    return [Opinion(None, "no reference answer") if c.answer is None else next(opinions) for c in candidates]


def _compared(rows: Sequence[tuple[str, str]]) -> list[Opinion]:
    found = []
    with _Process() as process:
        for row in rows:
            interrupts.check()
            found.append(process.ask(row))
    return found


class _Process:
    """arithmetic.py at work; begun anew after an answer that took too long or brought it down."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.lines: queue.Queue[str] = queue.Queue()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end()

    def ask(self, row: tuple[str, str]) -> Opinion:
        """One comparison."""
        seconds = SECONDS if self.process else START_SECONDS
        process = self.process or self._start()
        assert process.stdin
        try:
            process.stdin.write(json.dumps(row) + "\n")
            process.stdin.flush()
            line = self.lines.get(timeout=seconds)
        except (queue.Empty, BrokenPipeError):
            line = None
        if not line:
            self._end()
            return Opinion(None, f"took more than {seconds:g} s" if line is None else "math-verify broke down")
        right, reason = json.loads(line)
        return Opinion(None if right is None else float(right), reason)

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-I", str(Path(__file__).with_name("arithmetic.py"))]
        pipe = subprocess.PIPE
        process = children.start(command, stdin=pipe, stdout=pipe, stderr=children.NOTHING, text=True)
        assert process.stdout
        self.process, self.lines = process, queue.Queue()
        threading.Thread(target=_forward, args=(process.stdout, self.lines), daemon=True).start()
        return process

    def _end(self) -> None:
        if self.process:
            self.process.kill()
            with self.process:  # waits, and closes the pipes
                pass
        self.process = None


def _forward(lines: IO[str], to: "queue.Queue[str]") -> None:
    for line in lines:
        to.put(line)
    to.put("")  # it has ended
