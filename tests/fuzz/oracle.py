"""What every command must do with whatever it is given: end in time, in success or one sentence; write nowhere else."""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import typer

from selfimprove import cli
from selfimprove.errors import UserError

SECONDS = 60.0  # for one command; they take milliseconds
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "shutil.rmtree")
ALLOWED = ("__pycache__", "torchinductor", "matplotlib", "'out/", "/out/")  # libraries' own, and the folder for reports

watched: list[str] | None = None  # what was written since, while somebody listens


class Told(NamedTuple):
    """How a command ended."""

    kind: str  # "done", "no", "user error", "usage"
    sentence: str
    hint: str


class Hung(BaseException):
    """A command took too long; no `except Exception` swallows it."""


class Finding(AssertionError):
    """A command did what it must not."""


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if watched is None:
        return
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING and arguments[0] != os.devnull:
        watched.append(f"open {arguments[0]!r}")
    elif event in CHANGES:
        watched.append(f"{event} {arguments[:2]!r}")


sys.addaudithook(_listen)


def run(*arguments: str) -> Told:
    """One command, as its console script would run it.

    Raises:
        Finding: a traceback, a sentence that says nothing, a command that hangs, or one that writes.
    """
    with limited(arguments), silent(arguments), writing_nothing(arguments):
        return _run(arguments)


def program() -> Any:
    """The command that `selfimprove` is."""
    return typer.main.get_command(cli.app)


def _run(arguments: tuple[str, ...]) -> Told:
    try:
        code = program()(list(arguments), standalone_mode=False)
    except UserError as error:
        if not error.message.strip() or "\n\n" in error.message or not error.hint:
            raise Finding(f"{arguments}: {error.message!r}, hint {error.hint!r}") from error
        return Told("user error", error.message, error.hint)
    except (click.UsageError, typer.Abort) as error:
        return Told("usage", str(error), "")
    except (Hung, KeyboardInterrupt):
        raise
    except SystemExit as ended:
        return Told("no" if ended.code == 3 else "done", "", "")
    except BaseException as error:
        raise Finding(f"{arguments}: {type(error).__name__}: {str(error)[:500]}") from error
    return Told("no" if code else "done", "", "")


@contextlib.contextmanager
def limited(arguments: tuple[str, ...]) -> Iterator[None]:
    """An end of what takes too long."""

    def ring(number: int, frame: Any) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    except Hung as error:
        raise Finding(f"{arguments}: took more than {SECONDS} s") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def silent(arguments: tuple[str, ...]) -> Iterator[None]:
    """Output as strict as a terminal's: what cannot be encoded must not get there."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield
        out.flush()


@contextlib.contextmanager
def writing_nothing(arguments: tuple[str, ...]) -> Iterator[None]:
    """No file is opened for writing, made, moved or removed, but where it was told to."""
    global watched
    watched = []
    try:
        yield
        wrong = [what for what in watched if not any(one in what for one in ALLOWED)]
    finally:
        watched = None
    if wrong:
        raise Finding(f"{arguments}: wrote: {'; '.join(wrong[:5])}")


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every path below a folder with its mode, size and time."""
    found = {}
    for at, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(at) / name
            told = path.lstat()
            found[path.relative_to(folder).as_posix()] = (told.st_mode, told.st_size, told.st_mtime_ns)
    return found


def checked(path: str, settings: list[str]) -> Told:
    """A recipe with `--set` values, as far as `iterate` goes before it makes anything.

    Raises:
        Finding: as `run`.
    """
    from selfimprove import preflight, recipe_file

    arguments = (path, *settings)
    with limited(arguments), silent(arguments), writing_nothing(arguments):
        try:
            chosen = recipe_file.absolute(recipe_file.load(recipe_file.find(path), settings))
            preflight.check(chosen)
            recipe_file.dump(chosen).encode()
        except UserError as error:
            if not error.message.strip() or not error.hint:
                raise Finding(f"{arguments}: {error.message!r}, hint {error.hint!r}") from error
            return Told("user error", error.message, error.hint)
        except Exception as error:
            raise Finding(f"{arguments}: {type(error).__name__}: {str(error)[:500]}") from error
    return Told("done", "", "")
