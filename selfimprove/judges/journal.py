"""What models have answered, by the content of the request: kept as answers come, so that none is asked for twice."""

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TABLES = """
CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS accounts (name TEXT PRIMARY KEY, usd REAL NOT NULL) WITHOUT ROWID;
"""


class Journal:
    """A file of answers; whoever is killed leaves every answer that was put before.

    Processes of one machine may share it (SQLite's WAL needs their common memory).

    Args:
        path: an SQLite file, made when it is not there.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=60)
        self._file.execute("PRAGMA journal_mode = WAL")
        self._file.execute("PRAGMA synchronous = NORMAL")
        self._file.executescript(TABLES)

    def get(self, keys: Sequence[str]) -> dict[str, bytes]:
        """The answers known, by key."""
        found: dict[str, bytes] = {}
        for start in range(0, len(keys), 500):
            some = keys[start : start + 500]
            marks = ", ".join("?" * len(some))
            found |= dict(self._file.execute(f"SELECT key, value FROM answers WHERE key IN ({marks})", some))
        return found

    def put(self, key: str, value: bytes) -> None:
        """Keep an answer; it outlives this process, but may not outlive a power cut in the same half minute."""
        self._file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, value))

    def put_paid(self, answers: Mapping[str, bytes], account: str, usd: float) -> None:
        """Keep answers and what they cost, both or none, on the disk when this returns.

        An answer that is there stays: whoever read it keeps being right.
        """
        self._file.execute("PRAGMA synchronous = FULL")
        self._file.execute("BEGIN IMMEDIATE")
        try:
            self._file.executemany(
                "INSERT INTO answers VALUES (?, ?) ON CONFLICT (key) DO NOTHING", list(answers.items())
            )
            self._file.execute(
                "INSERT INTO accounts VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET usd = usd + ?2", (account, usd)
            )
        except BaseException:
            self._file.execute("ROLLBACK")
            raise
        self._file.execute("COMMIT")
        self._file.execute("PRAGMA synchronous = NORMAL")

    def paid(self, account: str) -> float:
        """USD put under an account so far, by all processes."""
        row = self._file.execute("SELECT usd FROM accounts WHERE name = ?", (account,)).fetchone()
        return float(row[0]) if row else 0.0

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def request_key(request: Mapping[str, Any]) -> str:
    """The key of a request: everything that its answer depends on."""
    return hashlib.sha256(json.dumps(request, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
