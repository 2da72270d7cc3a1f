"""A full or failing disk is known by whatever library met it; anything else stays a bug."""

import errno
import sqlite3
from pathlib import Path

import pytest
import safetensors

from selfimprove.io_errors import FULL, of_the_disk
from selfimprove.store import Run


def caught(function) -> BaseException:
    with pytest.raises((OSError, sqlite3.Error)) as error:
        function()
    return error.value


def test_a_full_sqlite_file_is_a_full_disk(tmp_path):
    file = sqlite3.connect(tmp_path / "a.sqlite", isolation_level=None)
    file.execute("CREATE TABLE answers (value BLOB)")
    file.execute("PRAGMA max_page_count = 3")
    error = caught(lambda: file.execute("INSERT INTO answers VALUES (zeroblob(100000))"))
    assert isinstance(error, sqlite3.OperationalError)
    assert of_the_disk(error).errno in FULL
    assert of_the_disk(caught(lambda: file.execute("SELECT nothing FROM answers"))) is None


def test_the_kernels_own_full_device():
    def write() -> None:
        with Path("/dev/full").open("w") as file:
            file.write("x")

    assert of_the_disk(caught(write)).errno == errno.ENOSPC
    assert of_the_disk(FileNotFoundError(errno.ENOENT, "no such file")) is None


def test_safetensors_tells_the_number_in_words():
    told = safetensors.SafetensorError("Error while serializing: I/O error: Input/output error (os error 5)")
    assert of_the_disk(told).errno == errno.EIO
    assert of_the_disk(safetensors.SafetensorError("invalid header")) is None


def test_half_written_cache_files_of_killed_writers_are_swept_and_whole_ones_stay(tmp_path):
    cache = tmp_path / "cache" / "model"
    cache.mkdir(parents=True)
    for name in (".tmpAbCdEf", "1234.tmp", "1234.safetensors"):
        (cache / name).write_bytes(b"x")
    Run(tmp_path).sweep()
    assert [path.name for path in cache.iterdir()] == ["1234.safetensors"]
