"""Damaged files of a finished run: every command that reads a run says one sentence, and verify names the file."""

import random
import shutil
from pathlib import Path

import pytest

from tests.fuzz import artifacts, cases, oracle

CASES = 60


@pytest.fixture
def folder(fake_run: Path) -> Path:
    shutil.copytree(fake_run, fake_run.parent / "other", symlinks=True)
    (fake_run.parent.parent / "out").mkdir()
    return fake_run.parent.parent


def test_damaged_artifacts(folder):
    with cases.quick(folder):
        for number in range(CASES):
            artifacts.case(folder, random.Random(f"test/artifacts/{number}"), number)


@pytest.mark.parametrize("name", ["scores.json", "samples-00000.parquet", "manifest.json"])
@pytest.mark.parametrize("command", [["status", "fake"], ["report", "fake", "--out", "out/r.html"]])
def test_a_byte_changed_under_a_reader_is_named(folder, name, command):
    path = folder / "runs" / "fake" / "iter-001" / "5-evaluate" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    told = oracle.run(*command)
    if (command[0], name) == ("status", "samples-00000.parquet"):
        assert told.kind == "done"  # which reads no rows
    else:
        assert told.kind == "user error"
        assert str(path.relative_to(folder)) in told.sentence
