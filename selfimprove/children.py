"""Child processes that die with us, however we die: SIGKILL runs no handler of ours, so the kernel has to see to it.

Linux sends a process a signal when its parent ends (PR_SET_PDEATHSIG), but only from the moment that it asked for it:
a parent that ended just before is noticed by looking once, afterwards, who the parent is. `start` runs this very file
as a script that does both and then becomes the command, so that the command need know nothing of it. What a child
starts in its turn is the child's to end; where it does not (torchrun), the grandchild's command is given by `beyond`.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

PR_SET_PDEATHSIG = 1
NOTHING = subprocess.DEVNULL
BEYOND = "beyond"


def start(command: Sequence[str], **settings: Any) -> "subprocess.Popen[Any]":
    """Start a command in a process group and session of its own, so that Ctrl-C is ours to handle; it dies with us.

    Args:
        command: the program, whose first part is a path, and its arguments.
        settings: of subprocess.Popen.
    """
    return subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command], start_new_session=True, **settings
    )


def beyond(command: Sequence[str]) -> list[str]:
    """A command for a child of ours to start, so that the grandchild dies with the child.

    It has to inherit the child's stdin: a pipe whose other end is ours, into which nothing is written.
    """
    return [sys.executable, "-I", "-S", __file__, BEYOND, *command]


def end(process: "subprocess.Popen[Any]") -> None:
    """End a child and what is left of its group at once; a no-op where all are gone."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # before `wait`, as afterwards the number may be another's
        process.wait()


def tie(parent: int) -> None:
    """Let this process be killed when its parent ends; ends at once where `parent` is not the parent any more."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above could take effect
        os._exit(1)


def _tie_beyond() -> None:
    """As `tie`, for the child of a child of whoever holds the other end of our stdin, which says whether it died."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    poll = select.poll()
    poll.register(0, select.POLLIN)
    if poll.poll(0):  # nothing is ever said there, so that this is its end
        os._exit(1)


if __name__ == "__main__":
    if sys.argv[1] == BEYOND:
        _tie_beyond()
    else:
        tie(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
