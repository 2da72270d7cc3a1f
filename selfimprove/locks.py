"""One writer at a time: a lock that the kernel frees when its holder dies, and a note of who holds it.

The lock is flock(2) on `.lock`. It holds between processes of one machine, and between machines where the file system
passes flock on: NFS from Linux 2.6.12 on (as a lock of the whole file), CephFS, GPFS, Lustre mounted with -o flock. The
note is for people: whether someone holds the lock is the kernel's word alone.
"""

import contextlib
import getpass
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import filelock
import psutil
import pydantic

from selfimprove.errors import UserError

FILE, NOTE = ".lock", ".lock.json"


class Holder(pydantic.BaseModel):
    """Who holds a lock."""

    pid: int
    process_started: float  # tells the process from a later one of the same number
    host: str
    user: str
    command: str
    since: str  # UTC

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} ({self.user}: {self.command}) since {self.since}"

    @property
    def alive(self) -> bool | None:
        """Whether the process is still there; None on another machine, of which nothing is known."""
        if self.host != socket.gethostname():
            return None
        try:
            return abs(float(psutil.Process(self.pid).create_time()) - self.process_started) < 1
        except psutil.Error:
            return False


@contextlib.contextmanager
def held(folder: Path, what: str, hint: str) -> Iterator[None]:
    """Hold the lock of a folder.

    Args:
        folder: holds the lock's file.
        what: is written under it, as the beginning of a sentence.
        hint: for whoever finds it held.

    Raises:
        UserError: another process holds it; says which and since when.
    """
    lock = filelock.FileLock(folder / FILE, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        found = holder(folder)
        raise UserError(f"{what} is being written by {found or 'another process'}", hint) from None
    try:
        (folder / NOTE).write_text(this_process().model_dump_json() + "\n", encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / NOTE).unlink()
        lock.release()


def holder(folder: Path) -> Holder | None:
    """Who holds the lock of a folder, as far as is known; None where nobody does. Takes no lock itself."""
    try:
        found = Holder.model_validate_json((folder / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no note, or one that is just being written
        return None
    return None if found.alive is False else found


def this_process() -> Holder:
    """The note of the process that asks."""
    process = psutil.Process()
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's number without a name
        user = str(os.getuid())
    return Holder(
        pid=process.pid,
        process_started=process.create_time(),
        host=socket.gethostname(),
        user=user,
        command=shlex.join(["selfimprove", *sys.argv[1:]]),
        since=time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime()),
    )
