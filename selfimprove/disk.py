"""Disk space: asked for before a stage, watched during it; what libraries say of a full or failing disk, in one form.

`torch`, `safetensors`, `pyarrow` and SQLite each hide the operating system's error number in another place.
"""

import contextlib
import errno
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from selfimprove.errors import UserError

GIB, MIB = 2**30, 2**20
LARGEST_RESERVE = 256 * MIB  # bytes that stay free on a large disk ...
RESERVE_SHARE = 0.01  # ... and the share of a small one
WATCH_SECONDS = 1.0
FULL = (errno.ENOSPC, errno.EDQUOT)
FAILING = (errno.EIO, errno.EROFS)


def free(path: Path) -> tuple[int, int]:
    """Bytes that this user may still write where the path is (or its nearest folder that exists), and the reserve."""
    while not path.exists():
        path = path.parent
    found = os.statvfs(path)
    reserve = min(LARGEST_RESERVE, int(found.f_blocks * found.f_frsize * RESERVE_SHARE))
    return found.f_bavail * found.f_frsize, reserve


def check(path: Path, needed: int | None, directory: str) -> None:
    """Refuse to begin a stage that the disk will not hold.

    Args:
        path: of the run.
        needed: bytes that the stage will write; None = unknown, so only the reserve is asked for.
        directory: of the stage, as it is named in the run.

    Raises:
        UserError: too little is free.
    """
    there, reserve = free(path)
    if there < (needed or 0) + reserve:
        about = f"needs about {size(needed)} and " if needed else ""
        raise UserError(
            f"the disk of {path} has {size(there)} free: {directory} {about}leaves {size(reserve)} in reserve",
            mend(path),
        )


def watch(path: Path, directory: str, now: Callable[[], float] = time.monotonic) -> Callable[[], None]:
    """A function to be called as often as one likes, which raises UserError once the reserve is touched.

    It asks the file system at most once in WATCH_SECONDS.
    """
    last = -WATCH_SECONDS + now()

    def look() -> None:
        nonlocal last
        if now() - last < WATCH_SECONDS:
            return
        last = now()
        there, reserve = free(path)
        if there < reserve:
            raise UserError(
                f"the disk of {path} is nearly full ({size(there)} free): {directory} was stopped before it tore",
                mend(path),
            )

    return look


def mend(path: Path) -> str:
    """The hint of all that a full disk stops."""
    return f"free some space (selfimprove gc shows what can go), then {_again(path)}"


def _again(path: Path) -> str:
    return f"selfimprove resume {path.name}" if (path / "recipe.toml").is_file() else "the same command again"


@contextlib.contextmanager
def told(path: Path, directory: str) -> Iterator[None]:
    """Whatever a full or failing disk makes a library raise, as one sentence.

    Raises:
        UserError: in its place.
    """
    try:
        yield
    except Exception as error:
        if mended := told_of(error, path, directory):
            raise mended from None
        raise


def told_of(error: BaseException, path: Path, directory: str) -> UserError | None:
    """The sentence for what a full or failing disk made somebody raise; None for anything else."""
    number = number_of(error)
    if number in FULL:
        return UserError(f"the disk of {path} is full: {directory} was not written", mend(path))
    if number == errno.EROFS:
        return UserError(
            f"the disk of {path} is read-only: {directory} was not written",
            f"mount it for writing (Linux turns it read-only after an error, see dmesg), then {_again(path)}",
        )
    if number in FAILING:
        return UserError(
            f"the disk of {path} fails ({os.strerror(number)}): {directory} was not written",
            f"see what the system says of it (dmesg), then {_again(path)}",
        )
    return None


def number_of(error: BaseException) -> int | None:
    """The operating system's number of an error of a full or failing disk, wherever a library keeps it."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        if (number := _number(at)) in (*FULL, *FAILING):
            return number
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
    return None


def _number(error: BaseException) -> int | None:
    if isinstance(error, UserError):
        return None  # somebody has said already what it is
    if isinstance(error, OSError):
        return error.errno
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest says where
        return {sqlite3.SQLITE_FULL: errno.ENOSPC, sqlite3.SQLITE_IOERR: errno.EIO}.get(code)
    if named := re.search(r"\(os error (\d+)\)|\[[Ee]rrno (\d+)\]", str(error)):  # Rust's and Arrow's words
        return int(named[1] or named[2])
    return None


def size(number: int | None) -> str:
    """Bytes as a person reads them."""
    if number is None:
        return "unknown"
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (1024, "KiB")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number} B"
