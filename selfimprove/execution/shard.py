"""Shards: some rows that a model is asked about, and its answers, in files that are there whole or not at all.

A shard is named by the hash of what is asked, so that whoever meets the same question again, in another process or
after a kill, finds its answers. Beside the answers of whole shards (`.done`) lie those of shards under way (`.part`):
one frame a row, written as the row is finished. What a disk has altered is seen by its digest and asked again.
"""

import contextlib
import hashlib
import os
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from selfimprove import store
from selfimprove.engine.protocol import Comparison, Completion, Request, Sampling

Task = Literal["complete", "score", "reward", "compare"]
FIRST, WINDOW = 2_048, 16_384  # rows that are cut into shards at a time: few at first, so that workers can begin
SMALLEST, LARGEST = 256, 2_048  # rows of a shard: whatever the number of workers, so that theirs are the same rows
PARTS = 8  # that a window is cut into, between those sizes
DIGEST = 16  # bytes
POISONED = "the engine dies on it"


class Work(msgspec.Struct, frozen=True):
    """What a model is asked to do with each row, and which model under which settings."""

    task: Task
    model: str  # directory of the weights
    identity: str  # their content
    engine: dict[str, Any]  # the recipe's section
    policy: (
        str | None
    )  # directory of the run's first policy, whose engine takes the weights; None = an engine of its own
    logs: str  # folder for the engine's log
    sampling: Sampling | None = None  # of "complete"


class Lost(msgspec.Struct, frozen=True):
    """In place of an answer: the engine dies on this row."""

    reason: str


class Shard(NamedTuple):
    """Rows, by the hash of what is asked about them."""

    id: str
    rows: Sequence[Any]  # Request, token ids (score, reward), or three texts (compare)

    @property
    def weight(self) -> int:
        """About how much work it is: the tokens, or characters, that are read."""
        first = self.rows[0] if self.rows else ()
        if isinstance(first, Request):
            return sum(len(row.prompt_token_ids) * row.n for row in self.rows)
        return sum(map(len, self.rows))


ROWS: dict[Task, Any] = {
    "complete": list[Request],
    "score": list[list[int]],
    "reward": list[list[int]],
    "compare": list[tuple[str, str, str]],
}
ANSWERS: dict[Task, Any] = {
    "complete": list[list[Completion] | Lost],
    "score": list[list[float] | Lost],
    "reward": list[float | Lost],
    "compare": list[Comparison | Lost],
}


def located(work: Work) -> Work:
    """The same work for a process in another folder, or on another machine that sees the same files."""
    policy = None if work.policy is None else str(Path(work.policy).absolute())
    model, logs = str(Path(work.model).absolute()), str(Path(work.logs).absolute())
    return msgspec.structs.replace(work, model=model, policy=policy, logs=logs)


def windows() -> Iterator[int]:
    """The most rows of each window."""
    size = min(FIRST, WINDOW)
    while True:
        yield size
        size = min(2 * size, WINDOW)


def size_for(rows: int) -> int:
    """Rows of each shard but the last, of a window of so many."""
    return min(LARGEST, max(SMALLEST, -(-rows // PARTS)))


def cut(work: Work, rows: Sequence[Any]) -> Iterator[Shard]:
    """A window's rows as shards, in their order."""
    size = size_for(len(rows))
    asked = msgspec.msgpack.encode([work.task, work.identity, work.engine, work.sampling])
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        digest = hashlib.sha256(asked)
        digest.update(msgspec.msgpack.encode(part))
        yield Shard(digest.hexdigest()[:32], part)


def ask(folder: Path, work: Work, shard: Shard) -> None:
    """Write a shard's question, for a worker that has only the folder; one that is there may name old paths."""
    question = msgspec.msgpack.encode([msgspec.msgpack.encode(work), msgspec.msgpack.encode(shard.rows)])
    write(folder / f"{shard.id}.ask", question)


def asked(folder: Path, name: str) -> tuple[Work, Shard]:
    """The question of a shard.

    Raises:
        OSError: it is not there, or damaged.
    """
    found = read(folder / f"{name}.ask")
    if found is None:
        raise FileNotFoundError(folder / f"{name}.ask")
    said, rows = msgspec.msgpack.decode(found, type=tuple[bytes, bytes])
    work = msgspec.msgpack.decode(said, type=Work)
    return work, Shard(name, msgspec.msgpack.decode(rows, type=ROWS[work.task]))


def is_done(folder: Path, name: str) -> bool:
    """Whether a shard is published; what its file holds is looked at by whoever reads it."""
    return (folder / f"{name}.done").exists()


def answers(folder: Path, work: Work, shard: Shard) -> list[Any] | None:
    """The answers to a shard's rows, in order; None where it is not done, or its file is damaged."""
    found = read(folder / f"{shard.id}.done")
    if found is None:
        return None
    said: list[Any] = msgspec.msgpack.decode(found, type=ANSWERS[work.task])
    return said if len(said) == len(shard.rows) else None


class Answering:
    """The answers of a shard that is under way.

    Args:
        folder: of the shards.
        shard: the rows.
    """

    def __init__(self, folder: Path, shard: Shard) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._shard = folder, shard
        self.known: dict[int, bytes] = {}  # answers, encoded, by the number of their row
        for part in folder.glob(f"{shard.id}.*.part"):
            self.known |= _frames(part)
        self.known = {number: answer for number, answer in self.known.items() if number < len(shard.rows)}
        self._part = folder / f"{shard.id}.{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}.part"
        self._file: Any = None

    def missing(self) -> list[int]:
        """The rows without an answer."""
        return [i for i in range(len(self._shard.rows)) if i not in self.known]

    def put(self, number: int, answer: Any) -> None:
        """Keep an answer; whoever is killed afterwards leaves it."""
        encoded = msgspec.msgpack.encode(answer)
        self.known[number] = encoded
        frame = struct.pack("<II", number, len(encoded)) + encoded
        if self._file is None:
            self._file = self._part.open("ab", buffering=0)
        self._file.write(_digest(frame) + frame)

    def finish(self) -> None:
        """Publish the shard; all rows have their answers."""
        self.close()
        ordered = [msgspec.Raw(self.known[i]) for i in range(len(self._shard.rows))]
        write(self._folder / f"{self._shard.id}.done", msgspec.msgpack.encode(ordered))
        for path in self._folder.glob(f"{self._shard.id}.*.part"):
            path.unlink(missing_ok=True)
        (self._folder / f"{self._shard.id}.ask").unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _frames(path: Path) -> dict[int, bytes]:
    """The whole frames of a file; what a kill or the disk has torn ends it."""
    found, at = {}, 0
    try:
        data = path.read_bytes()
    except FileNotFoundError:  # another worker finished the shard
        return {}
    while at + DIGEST + 8 <= len(data):
        number, length = struct.unpack_from("<II", data, at + DIGEST)
        end = at + DIGEST + 8 + length
        frame = data[at + DIGEST : end]
        if end > len(data):
            break
        if _digest(frame) != data[at : at + DIGEST]:
            print(f"{path} is damaged: rows from byte {at} on are asked again", file=sys.stderr)
            break
        found[number] = frame[8:]
        at = end
    return found


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST).digest()


def write(path: Path, payload: bytes) -> None:
    """A file that is there whole or not at all, its digest in front."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(_digest(payload) + payload)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    store.fsync(path.parent)


def read(path: Path) -> bytes | None:
    """What `write` has written; None where it is not there, or damaged, in which case it goes."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    if _digest(data[DIGEST:]) != data[:DIGEST]:
        print(f"{path} is damaged: its rows are asked again", file=sys.stderr)
        path.unlink(missing_ok=True)
        return None
    return data[DIGEST:]
