"""What models have answered, by the content of the request: kept as answers come, so that none is asked for twice."""

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Journal:
    """A file of answers; whoever is killed leaves every answer that was put before.

    Args:
        path: an SQLite file, made when it is not there.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=60)
        self._file.execute("PRAGMA journal_mode = WAL")
        self._file.execute("PRAGMA synchronous = NORMAL")
        self._file.execute(
            "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID"
        )

    def get(self, keys: Sequence[str]) -> dict[str, bytes]:
        """The answers known, by key."""
        found: dict[str, bytes] = {}
        for start in range(0, len(keys), 500):
            some = keys[start : start + 500]
            marks = ", ".join("?" * len(some))
            found |= dict(self._file.execute(f"SELECT key, value FROM answers WHERE key IN ({marks})", some))
        return found

    def put(self, key: str, value: bytes) -> None:
        """Keep an answer."""
        self._file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, value))

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def request_key(request: Mapping[str, Any]) -> str:
    """The key of a request: everything that its answer depends on."""
    return hashlib.sha256(json.dumps(request, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
