"""Runs inside the sandbox: the code, then its tests. The sandbox starts the text of this file, it is never imported.

What says "passed" is a random word that waits in a pipe, is read only after the last test, and is told backwards, so
that pouring every open pipe into every other says nothing. Code that ends early, however it ends, has not said it.
Code written against this very file could: tests that share a process with what they test cannot be closed to that.
"""

import ast
import builtins
import contextlib
import errno
import json
import os
import sys
import traceback
import types
from typing import Any

NETWORK = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, -2, -3}
DISK = {errno.EFBIG: "wrote too large a file", errno.ENOSPC: "wrote too much to disk", errno.EDQUOT: "wrote too much"}
PASSIVE = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)


def main(told: int, sealed: int) -> None:
    """Read the job (JSON: code, tests, paths) from stdin and write the sealed word or a reason to `told`."""
    write, read, leave, pid, home = os.write, os.read, os._exit, os.getpid, os.getpid()
    job = json.load(sys.stdin)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.path += job["paths"]
    sys.argv[:] = ["solution"]
    streams = sys.stdout, sys.stderr
    try:
        word = _run(job, read, sealed)
    except BaseException as error:
        word = _reason(error, job["tests"])
    for stream in streams:
        with contextlib.suppress(BaseException):  # the code may have closed it
            stream.flush()
    if pid() == home:  # a forked child has no say
        write(told, word)
        leave(0)
    leave(1)


class _Broken(Exception):
    """The tests themselves cannot decide anything."""


def _run(job: dict[str, str], read: Any, sealed: int) -> bytes:
    try:
        tests = ast.parse(job["tests"], "<tests>")
        compiled = compile(tests, "<tests>", "exec")
    except (SyntaxError, ValueError) as error:
        raise _Broken(str(error)) from None
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    space = module.__dict__
    before = dict(vars(builtins))
    exec(compile(job["code"], "<code>", "exec"), space)
    vars(builtins).update(before)  # an `all` that always agrees is not taken over into the tests
    of_code = dict(space)
    exec(compiled, space)
    called = [_call(found, name) for name, found in list(space.items()) if found is not of_code.get(name)]
    if not any(called) and all(isinstance(step, PASSIVE) or _is_text(step) for step in tests.body):
        raise _Broken("they call nothing")
    word: bytes = read(sealed, 64)
    return word[::-1]


def _is_text(step: ast.stmt) -> bool:
    return isinstance(step, ast.Expr) and isinstance(step.value, ast.Constant)


def _call(found: Any, name: str) -> bool:
    """Run what the tests only define: functions named test..., and test cases of unittest."""
    if isinstance(found, types.FunctionType) and name.startswith("test"):
        if found.__code__.co_argcount > len(found.__defaults__ or ()):
            raise _Broken(f"nobody gives {name} its arguments")
        result = found()
        if isinstance(result, types.CoroutineType):
            import asyncio

            asyncio.run(result)
        return True
    if isinstance(found, type) and found.__module__ == "solution" and "unittest" in sys.modules:
        import unittest

        if issubclass(found, unittest.TestCase):
            outcome = unittest.TestResult()
            unittest.defaultTestLoader.loadTestsFromTestCase(found).run(outcome)
            for _, trace in (*outcome.errors, *outcome.failures):
                raise AssertionError(trace.strip().splitlines()[-1].removeprefix("AssertionError: "))
            return outcome.testsRun > len(outcome.skipped)
    return False


def _reason(error: BaseException, tests: str = "") -> bytes:
    try:
        text = _plain(error, tests)
    except BaseException:  # its own words may raise
        text = "ended with an error that cannot be told"
    return text[:500].encode("utf-8", "replace")


def _plain(error: BaseException, tests: str) -> str:
    said = str(error)
    number = getattr(error, "errno", None)
    if isinstance(error, _Broken):
        return f"the tests cannot be run: {said}"
    if isinstance(error, AssertionError):
        return f"assertion failed: {said or _line(error, tests)}"
    if isinstance(error, MemoryError) or number == errno.ENOMEM:
        return "out of memory"
    if isinstance(error, SystemExit | KeyboardInterrupt):
        return f"ended early: {type(error).__name__}({said})"
    if number == errno.EAGAIN or "can't start new thread" in said:
        return f"too many processes: {said}"
    if isinstance(error, OSError) and number in NETWORK:
        return f"tried to use the network: {said}"
    if isinstance(error, OSError) and number == errno.EROFS:
        return f"tried to write outside its directory: {said}"
    if isinstance(error, OSError) and number in DISK:
        return f"{DISK[number]}: {said}"
    return f"{type(error).__name__}: {said}"


def _line(error: BaseException, tests: str) -> str:
    """The line of the tests that failed."""
    lines = tests.splitlines()
    numbers = [at.lineno for at in traceback.extract_tb(error.__traceback__) if at.filename == "<tests>"]
    return lines[numbers[-1] - 1].strip() if numbers and numbers[-1] and numbers[-1] <= len(lines) else "no message"


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
