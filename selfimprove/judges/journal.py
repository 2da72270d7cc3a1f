"""What models have answered, by the content of the request: kept as answers come, so that none is asked for twice."""

import errno
import hashlib
import json
import os
import sqlite3
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import filelock

from selfimprove.locks import Holder, this_process

TABLES = (
    "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value BLOB NOT NULL, seal BLOB) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS accounts (name TEXT PRIMARY KEY, usd REAL NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS under_way "
    "(id INTEGER PRIMARY KEY, account TEXT NOT NULL, usd REAL NOT NULL, process TEXT NOT NULL)",
)
COUNTS = ("requests", "answers", "prompt_tokens", "completion_tokens", "unmeasured")  # of an account, besides its USD


class Journal:
    """A file of answers; whoever is killed leaves every answer that was put before.

    Processes of one machine may share it (SQLite's WAL needs their common memory).

    Args:
        path: an SQLite file, made when it is not there.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        with self._alone():
            try:
                self._open()
            except sqlite3.DatabaseError as error:
                if not _damaged(error):
                    raise
                self._set_aside(str(error))
                self._open()

    def get(self, keys: Sequence[str]) -> dict[str, bytes]:
        """The answers known, by key; one that is not what was put is as good as none."""
        found: dict[str, bytes] = {}
        try:
            for start in range(0, len(keys), 500):
                some = keys[start : start + 500]
                marks = ", ".join("?" * len(some))
                for key, value, seal in self._file.execute(
                    f"SELECT key, value, seal FROM answers WHERE key IN ({marks})", some
                ):
                    if seal is None or seal == _seal(key, value):  # files of earlier versions have none
                        found[key] = value
        except sqlite3.DatabaseError as error:
            if not _damaged(error):
                raise
            with self._alone():
                self._file.close()  # before it is renamed: its end removes the log beside the path it was opened by
                if self._path.exists() and self._path.stat().st_ino == self._inode:  # else another process has done it
                    self._set_aside(str(error))
                self._open()
            return {}
        return found

    def put(self, key: str, value: bytes) -> None:
        """Keep an answer; it outlives this process, but may not outlive a power cut in the same half minute."""
        with _full_disk(self._path):
            self._file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", (key, value, _seal(key, value)))

    def put_all(self, answers: Mapping[str, bytes]) -> None:
        """Keep answers, all or none; see `put`."""
        with _full_disk(self._path), self._transaction():
            self._file.executemany(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?)",
                [(key, value, _seal(key, value)) for key, value in answers.items()],
            )

    def put_paid(self, answers: Mapping[str, bytes], account: str, usd: float, **counts: int) -> None:
        """Keep answers and what they cost, both or none, on the disk when this returns.

        An answer that is there stays: whoever read it keeps being right. `counts` are of COUNTS.
        """
        self._file.execute("PRAGMA synchronous = FULL")
        with _full_disk(self._path), self._transaction():
            self._file.executemany(
                "INSERT INTO answers VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value, "
                "seal = excluded.seal WHERE NOT _sound(key, value, seal)",
                [(key, value, _seal(key, value)) for key, value in answers.items()],
            )
            self._book(account, usd, answers=len(answers), **counts)
        self._file.execute("PRAGMA synchronous = NORMAL")

    def begin(self, account: str, worst: float) -> int:
        """Count a request that is sent now, and note what it may cost, which a kill leaves to `settle`; its number."""
        with _full_disk(self._path), self._transaction():
            self._book(account, 0.0, requests=1)
            noted = "INSERT INTO under_way (account, usd, process) VALUES (?, ?, ?)"
            number = self._file.execute(noted, (account, worst, self._process)).lastrowid
        assert number is not None
        return number

    def end(self, number: int) -> None:
        """A request is no longer under way; what it cost has been put."""
        self._file.execute("DELETE FROM under_way WHERE id = ?", (number,))

    def settle(self, account: str) -> None:
        """Book at its worst what processes that were killed had under way; those of other machines may be alive."""
        rows = self._file.execute("SELECT id, usd, process FROM under_way WHERE account = ?", (account,)).fetchall()
        for number, usd, process in rows:
            if Holder.model_validate_json(process).alive is False:
                with _full_disk(self._path), self._transaction():
                    gone = self._file.execute("DELETE FROM under_way WHERE id = ?", (number,)).rowcount
                    if gone and usd:  # another process may have settled it meanwhile
                        self._book(account, usd, unmeasured=1)

    def paid(self, account: str) -> float:
        """USD put under an account so far, by all processes."""
        row = self._file.execute("SELECT usd FROM accounts WHERE name = ?", (account,)).fetchone()
        return float(row[0]) if row else 0.0

    def counts(self, account: str) -> dict[str, int]:
        """What has been counted under an account so far, by all processes, by the names of COUNTS."""
        chosen = f"SELECT {', '.join(COUNTS)} FROM accounts WHERE name = ?"
        row = self._file.execute(chosen, (account,)).fetchone()
        return dict(zip(COUNTS, row or (0,) * len(COUNTS), strict=True))

    def _book(self, account: str, usd: float, **counts: int) -> None:
        added = {"usd": usd, **counts}
        columns, marks = ", ".join(added), ", ".join("?" * len(added))
        sums = ", ".join(f"{name} = {name} + excluded.{name}" for name in added)
        self._file.execute(
            f"INSERT INTO accounts (name, {columns}) VALUES (?, {marks}) ON CONFLICT (name) DO UPDATE SET {sums}",
            (account, *added.values()),
        )

    @cached_property
    def _process(self) -> str:
        return this_process().model_dump_json()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._file.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._file.execute("COMMIT")
        except BaseException:
            if self._file.in_transaction:
                self._file.execute("ROLLBACK")
            raise

    def _alone(self) -> filelock.BaseFileLock:
        """One process opens the file at a time: neither the change to WAL nor a new column waits for another's."""
        return filelock.FileLock(f"{self._path}.lock")

    def _open(self) -> None:
        self._file = _opened(self._path)
        self._inode = self._path.stat().st_ino

    def _set_aside(self, why: str) -> None:
        """Make room for an empty file; the damaged one stays beside it, since what is in it may have cost money."""
        aside = self._path.with_name(f"{self._path.name}.damaged-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}")
        for end in ("", "-wal", "-shm"):
            one = self._path.with_name(self._path.name + end)
            if one.exists():
                one.rename(aside.with_name(aside.name + end))
        print(
            f"the answers kept in {self._path} are damaged ({why}); set aside as {aside.name}, and asked for again; "
            "what servers were paid so far is not known any more, and ceilings count from zero",
            file=sys.stderr,
        )


def _opened(path: Path) -> sqlite3.Connection:
    fresh = not path.exists()
    file = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=60)
    try:
        file.execute("PRAGMA journal_mode = WAL")
        file.execute("PRAGMA synchronous = NORMAL")
        if not fresh and (said := file.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(said)
        for table in TABLES:
            file.execute(table)
        if "seal" not in [column[1] for column in file.execute("PRAGMA table_info(answers)")]:
            file.execute("ALTER TABLE answers ADD COLUMN seal BLOB")
        known = [column[1] for column in file.execute("PRAGMA table_info(accounts)")]
        for name in [name for name in COUNTS if name not in known]:
            file.execute(f"ALTER TABLE accounts ADD COLUMN {name} INTEGER NOT NULL DEFAULT 0")
        file.create_function("_sound", 3, lambda key, value, seal: seal is None or seal == _seal(key, value))
    except BaseException:
        file.close()
        raise
    return file


def _seal(key: str, value: bytes) -> bytes:
    """SQLite does not notice a page that was torn inside a value."""
    return hashlib.blake2b(value or b"", key=key.encode()[:64], digest_size=8).digest()


def _damaged(error: sqlite3.DatabaseError) -> bool:
    """Whether the file is to blame, and not a lock or the disk."""
    return not isinstance(error, sqlite3.OperationalError | sqlite3.IntegrityError | sqlite3.ProgrammingError)


@contextmanager
def _full_disk(path: Path) -> Iterator[None]:
    """A full disk is the same error wherever it is met."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
        raise


def request_key(request: Mapping[str, Any]) -> str:
    """The key of a request: everything that its answer depends on."""
    return hashlib.sha256(json.dumps(request, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
