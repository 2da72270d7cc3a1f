"""What the ranks of a run say to each other: files in a folder that all of them see, each written whole.

    driver                   a Session: which driver there is, and what all are to do
    rank-3                   a Report: how far rank 3 is
    00000012-ID.task-3       a shard that nobody has begun, and the rank whose share it is
    00000012-ID.taken-3      a shard that rank 3 is at; removed when it is published

A rank takes a shard by renaming its file, in which one of several succeeds. Nothing compares the clocks of two
machines: who is alive is known by a counter that grows. Each rank writes into the folder every few seconds, and that
also keeps fresh what an NFS client remembers of it.
"""

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

FOLDER = "work"  # of a run
DRIVER = "driver"
BEAT = 2.0  # seconds between two signs of life
LOST = 60.0  # seconds without one, after which a rank or a driver is taken for dead
NAME = re.compile(r"(\d{8})-([0-9a-f]{32})\.(task|taken)-(\d+)")


class Session(msgspec.Struct, frozen=True):
    """What the driver says."""

    id: str  # of this driver process
    machine: str  # the recipe's section, as JSON
    beat: int = 0
    stop: bool = False  # begin nothing, finish what was begun
    sleep: int = 0  # how often the engines have been told to give the device's memory back
    work: bytes = b""  # shard.Work, whose engine sleeps
    ended: bool = False


class Report(msgspec.Struct, frozen=True):
    """What a rank says."""

    session: str  # whom it follows
    beat: int = 0
    shard: str = ""  # that it is at
    answered: int = 0  # rows of it
    slept: int = 0  # the last Session.sleep that it has obeyed
    failed: str = ""  # why it cannot serve
    hint: str | None = None


Said = TypeVar("Said", Session, Report)


class Shown(NamedTuple):
    """A shard on the board."""

    path: Path
    number: int
    shard: str
    taken: bool
    rank: int  # who has taken it, or whose share it is


class Voice(Generic[Said]):
    """A file of which this process is the only writer, with a counter that grows for as long as it lives.

    Args:
        path: the file.
        said: what it says at first.
    """

    def __init__(self, path: Path, said: Said) -> None:
        self._path = path
        self.said: Said = said
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._write()
        threading.Thread(target=self._beat, daemon=True).start()

    def say(self, **changes: Any) -> None:
        """Change something of it."""
        with self._lock:
            self.said = msgspec.structs.replace(self.said, **changes)
            self._write()

    def close(self, remove: bool) -> None:
        """Say nothing more."""
        with self._lock:
            self._over.set()
            if remove:
                self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            with self._lock, contextlib.suppress(OSError):  # a full disk may have room again at the next one
                if not self._over.is_set():
                    self.said = msgspec.structs.replace(self.said, beat=self.said.beat + 1)
                    self._write()

    def _write(self) -> None:
        _put(self._path, msgspec.msgpack.encode(self.said))


class Ear(Generic[Said]):
    """Listens to a Voice of another process.

    Args:
        path: its file.
        kind: what it says.
    """

    def __init__(self, path: Path, kind: type[Said]) -> None:
        self._path = path
        self._kind: type[Said] = kind
        self._known, self._since = b"", time.monotonic()

    def hear(self) -> Said | None:
        """What it says; None where there is nobody."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return None
        if data != self._known:
            self._known, self._since = data, time.monotonic()
        said: Said = msgspec.msgpack.decode(data, type=self._kind)
        return said

    @property
    def silence(self) -> float:
        """Seconds since it last said something new, as far as this process has listened."""
        return time.monotonic() - self._since


def post(board: Path, number: int, folder: Path, shard: str, rank: int) -> None:
    """Show a shard, whose question lies in `folder`, as the share of a rank."""
    _put(board / f"{number:08d}-{shard}.task-{rank}", msgspec.msgpack.encode((str(folder), shard)))


def shown(board: Path) -> Iterator[Shown]:
    """The shards on the board, in the order in which they were posted."""
    with contextlib.suppress(FileNotFoundError):
        for path in sorted(board.iterdir()):
            if found := NAME.fullmatch(path.name):
                yield Shown(path, int(found[1]), found[2], found[3] == "taken", int(found[4]))


def take(board: Path, rank: int) -> tuple[Shown, Path] | None:
    """A shard to carry out and its folder: of one's own share, else the last of another's; None where there is none."""
    free = [one for one in shown(board) if not one.taken]
    for one in [one for one in free if one.rank == rank] + [one for one in reversed(free) if one.rank != rank]:
        mine = one._replace(path=_renamed(one, "taken", rank), taken=True, rank=rank)
        with contextlib.suppress(FileNotFoundError):  # another was faster
            one.path.rename(mine.path)
            folder, _ = msgspec.msgpack.decode(mine.path.read_bytes(), type=tuple[str, str])
            return mine, Path(folder)
    return None


def give_back(one: Shown, rank: int) -> None:
    """Let a shard that was taken be taken by others; it is of the share of `rank`."""
    with contextlib.suppress(FileNotFoundError):
        one.path.rename(_renamed(one, "task", rank))


def clear(board: Path) -> None:
    """Remove the shards of a driver that is gone."""
    for one in shown(board):
        one.path.unlink(missing_ok=True)


def _renamed(one: Shown, state: str, rank: int) -> Path:
    return one.path.with_name(f"{one.number:08d}-{one.shard}.{state}-{rank}")


def _put(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
