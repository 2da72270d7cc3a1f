"""Runs Python code that nobody has read, and its tests, behind walls of the Linux kernel.

No network, no files but the interpreter's (read-only) and an empty directory of its own in memory, no other process in
sight, an empty environment; time, memory, disk, processes and output limited; every process ended with the program.
Where the kernel gives no such walls nothing is run. What the walls do not hold: the code shares a process with its
tests and can deceive them on purpose (an object equal to everything passes every comparison).
"""

import functools
import json
import os
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from selfimprove import interrupts
from selfimprove.errors import UserError
from selfimprove.sandbox import syscalls

HERE = Path(__file__).parent
SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache")
ENVIRONMENT = {
    "HOME": "/box",
    "TMPDIR": "/box",
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "MALLOC_ARENA_MAX": "1",  # memory is limited as address space, of which each thread's arena takes 64 MiB
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
BROKEN = "the tests cannot be run: "  # as the harness says it
GRACE = 10.0  # seconds beyond the limit in which the jail itself must answer
REMEDY = (
    "it needs Linux 5.14 or newer with user namespaces: sysctl user.max_user_namespaces=15000, on Ubuntu also "
    "kernel.apparmor_restrict_unprivileged_userns=0; in Docker --privileged, or --security-opt seccomp=unconfined "
    "--security-opt apparmor=unconfined --security-opt systempaths=unconfined"
)
PROBE = """
import errno, os, signal, socket
assert os.getppid() == 1 and os.listdir(".") == [] and not os.path.exists("/proc")
with socket.socket() as end:
    assert end.connect_ex(("192.0.2.1", 9)) == errno.ENETUNREACH, "it has a network"
try:
    os.mkdir("/probe")
except OSError as error:
    assert error.errno == errno.EROFS, error
else:
    raise AssertionError("it can write outside")
made = []
try:
    for _ in range(PROCESSES + 1):
        made.append(os.fork())
        if not made[-1]:
            signal.pause()
except BlockingIOError:
    pass
else:
    raise AssertionError("it can make too many processes")
"""


class Limits(NamedTuple):
    """What a program may use."""

    seconds: float = 5.0  # by the clock, from its start to the end of its tests
    memory_mib: int = 1024  # address space of all its processes together
    disk_mib: int = 64  # in memory
    processes: int = 16
    output_kib: int = 64  # kept; more is read and forgotten


class Job(NamedTuple):
    """A program and the tests that decide about it, both Python."""

    code: str
    tests: str


class Outcome(NamedTuple):
    """Whether the code passed its tests, and in plain words why not; None where the tests or the sandbox broke."""

    passed: bool | None
    reason: str  # "ok" where it passed
    output: str = ""  # what it printed, its beginning


def run(job: Job, limits: Limits = Limits()) -> Outcome:  # noqa: B008  # immutable
    """What becomes of a program.

    Raises:
        UserError: this machine has no walls to offer.
    """
    check()
    return _run(job, limits)


def run_all(jobs: Sequence[Job], limits: Limits = Limits()) -> list[Outcome]:  # noqa: B008
    """The outcomes of many programs in their order, as many at a time as there are processors.

    Raises:
        UserError: this machine has no walls to offer.
    """
    if not jobs:
        return []
    check()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        try:
            return list(pool.map(lambda job: _run_next(job, limits), jobs))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # an interrupt shall not wait for thousands of programs
            raise


def _run_next(job: Job, limits: Limits) -> Outcome:
    interrupts.check()  # before each, so that those under way end and no other begins
    return _run(job, limits)


@functools.cache
def check() -> None:
    """Run a program that tries the walls, once per process.

    Raises:
        UserError: a wall is missing, with what mends it.
    """
    if platform.system() != "Linux" or not syscalls.known():
        raise UserError(
            f"the code sandbox does not run on {platform.system()} {platform.machine()}",
            f"use Linux on {' or '.join(syscalls.MACHINES)}, or a checker that runs no code",
        )
    limits = Limits(seconds=30.0)
    probe = PROBE.replace("PROCESSES", str(limits.processes))
    found = _run(Job("", probe), limits)
    if not found.passed:
        told = " ".join([found.reason, *found.output.split()])
        raise UserError(f"the code sandbox does not work here ({told})", REMEDY)


def _run(job: Job, limits: Limits) -> Outcome:
    order = {
        "parent": os.getpid(),
        "python": _python(),
        "shown": _shown(),
        "environment": ENVIRONMENT,
        "limits": limits._asdict(),
        "filter": syscalls.bpf().hex(),
        "harness": (HERE / "harness.py").read_text(encoding="utf-8"),
        "program": {**job._asdict(), "paths": _packages()},
    }
    command = [_python(), "-I", "-S", str(HERE / "jail.py")]
    done = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={},  # no secret of ours
        cwd="/",
        start_new_session=True,  # Ctrl-C is for us
    )
    with done:
        try:
            report, trouble = done.communicate(json.dumps(order).encode(), timeout=limits.seconds + GRACE)
        except BaseException as error:
            done.kill()  # and the kernel takes down what it holds
            if isinstance(error, subprocess.TimeoutExpired):
                return Outcome(None, "the sandbox did not answer")
            raise
    if done.returncode:
        last = trouble.decode("utf-8", "replace").strip().splitlines()[-1:]
        return Outcome(None, f"the sandbox failed: {' '.join(last)}")
    return _outcome(json.loads(report), limits)


def _outcome(report: dict[str, str | int | bool], limits: Limits) -> Outcome:
    said, ended, output = str(report["said"]), report["ended"], str(report["output"])
    if report["trouble"]:
        return Outcome(None, f"the sandbox failed: {str(report['trouble']).strip().splitlines()[-1]}")
    if report["passed"]:
        return Outcome(True, "ok", output)
    if ended == "time" or ended == 128 + 24:  # SIGXCPU
        return Outcome(False, f"timeout after {limits.seconds:g} s", output)
    if ended == "memory":
        return Outcome(False, "out of memory", output)
    return Outcome(None if said.startswith(BROKEN) else False, said or f"ended early with exit status {ended}", output)


@functools.cache
def _python() -> str:
    return os.path.realpath(sys.executable)


@functools.cache
def _packages() -> list[str]:
    return sorted({os.path.realpath(sysconfig.get_path(name)) for name in ("purelib", "platlib")})


@functools.cache
def _shown() -> list[str]:
    """What of the file system is there inside: the system's libraries, the interpreter and its packages."""
    prefix = Path(_python()).parent.parent
    paths = [*SYSTEM, *(str(prefix / name) for name in ("bin", "lib", "lib64")), *_packages()]
    kept: list[str] = []
    for path in sorted(paths, key=len):
        if not any(path.startswith(f"{other}/") or path == other for other in kept):
            kept.append(path)
    return kept
