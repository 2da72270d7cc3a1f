"""Files on their way: several at once, each written so that it is there whole or not at all."""

import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import NamedTuple

from selfimprove.store import fsync

Progress = Callable[[int, int], None]  # bytes moved so far, bytes to move
THREADS = 8  # files moved at once; s3fs also cuts large ones into parts, and moves ten of them at once
LARGE = 64 << 20  # bytes of a file from which on only one is moved at a time: s3fs holds its ten parts in memory
CHUNK = 4 << 20
HALF = ".half"  # ends the name of a file in a folder that is being written


class Item(NamedTuple):
    """A file here and an object there; size and sha256 are those of the manifest."""

    path: Path
    name: str
    bytes: int
    sha256: str


class Stopped(Exception):
    """Somebody else's transfer has failed; this one ends too."""


def together(move: Callable[[Item, Callable[[int], None]], None], items: Sequence[Item], progress: Progress) -> None:
    """Move files at the same time; the first error ends all. `progress` is called in this thread, and may raise."""
    done = {item.name: 0 for item in items}
    total = sum(item.bytes for item in items)
    stopped = threading.Event()

    def moved(name: str, value: int) -> None:
        if stopped.is_set():
            raise Stopped
        done[name] = value

    pools = ThreadPoolExecutor(THREADS), ThreadPoolExecutor(1)
    try:
        pending: set[Future[None]] = {
            pools[item.bytes > LARGE].submit(move, item, partial(moved, item.name)) for item in items
        }
        while pending:
            ended, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
            for future in ended:
                future.result()
            progress(sum(done.values()) if pending else total, total)
    finally:
        stopped.set()
        for pool in pools:
            pool.shutdown(wait=True, cancel_futures=True)


def chunks(path: Path) -> Iterator[bytes]:
    """A file piece by piece."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def write(target: Path, chunks: Iterable[bytes], moved: Callable[[int], None]) -> None:
    """Write a file so that it is there whole or not at all, also after the machine has died."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(target)
    try:
        with beside.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
                moved(file.tell())
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
    fsync(target.parent)


def create(target: Path, content: bytes) -> bool:
    """`write` where no file of that name is; False where one is with other content."""
    beside = _beside(target)
    write(beside, [content], lambda done: None)
    try:
        os.link(beside, target)  # unlike a rename, it takes nobody's place
    except FileExistsError:
        return target.read_bytes() == content
    except OSError:  # a file system without hard links
        if target.exists():
            return target.read_bytes() == content
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
    fsync(target.parent)
    return True


def sweep(folder: Path) -> None:
    """Remove what killed writers have left beside their targets; one that is still at it fails, and can try again."""
    for path in folder.rglob(f".*{HALF}"):
        path.unlink(missing_ok=True)


def _beside(target: Path) -> Path:
    """A name of this writer's own: another one may be writing the same file now."""
    return target.with_name(f".{secrets.token_hex(8)}{HALF}")
