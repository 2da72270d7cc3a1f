"""A disk that is full, nearly full or broken: one sentence, nothing torn, and the same result at last."""

import builtins
import contextlib
import errno
import io
import json
import os
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import safetensors
import torch
from safetensors.torch import save_file

from selfimprove import disk, recipe_file, records, store
from selfimprove.errors import UserError
from selfimprove.judges.journal import Journal
from selfimprove.training import checkpoint, references
from tests.conftest import cut, selfimprove
from tests.test_run import TINY, contents, keys

SIZES = (0.25, 0.6, 1.5, 4, 9, 14, 20)  # MiB: the first file of a run, parquet, weights, a later round's ...


@pytest.fixture
def mounted(tmp_path, monkeypatch):
    """A function that gives a working directory of so many MiB, or another size to the one it gave."""
    folder = tmp_path / "small"
    folder.mkdir()

    def mount(mib: float) -> Path:
        options = f"size={int(mib * 1024)}k"
        remount = ["-o", f"remount,{options}"] if folder.is_mount() else ["-o", options]
        made = subprocess.run(["mount", *remount, "-t", "tmpfs", "none", folder], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"a small file system cannot be mounted here: {made.stderr.strip()}")
        return folder

    try:
        yield mount
    finally:
        monkeypatch.chdir(tmp_path)
        if folder.is_mount():
            subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted run has, by keys and content; and its data files."""
    folder = tmp_path_factory.mktemp("whole")
    with contextlib.chdir(folder):
        cut(40)
        result = selfimprove("iterate", "--run", "r", *TINY)
        assert result.code == 0, result.err
    run = folder / "runs/r"
    return folder, keys(run), contents(run)


def one_sentence(result) -> None:
    assert result.code == 1, (result.out, result.err)
    [sentence, hint] = [line for line in result.err.splitlines() if line.startswith(("error: ", "hint: "))]
    assert "Traceback" not in result.err
    assert "disk" in sentence
    assert "selfimprove resume r" in hint or "the same command again" in hint


def nothing_torn(run: Path) -> None:
    """Every file that a reader takes for whole is whole."""
    for manifest in run.glob("iter-*/*/manifest.json"):
        assert not list(store.broken_outputs(manifest.parent, store.read_manifest(manifest.parent)))
    for path in [*run.glob("*.json"), *run.glob("iter-*/*/*.json")]:
        json.loads(path.read_text())
    if (run / "recipe.toml").exists():
        recipe_file.load(run / "recipe.toml")
    for path in run.glob("cache/*/*.safetensors"):
        with safetensors.safe_open(path, "pt"):
            pass
    for found in run.glob("scratch/*/*/checkpoint-*[0-9]"):
        assert checkpoint.read_progress(found)
    assert not list(run.glob("iter-*/*.partial"))
    assert not list(run.glob("**/*.tmp"))


@pytest.mark.parametrize("reserve", [0, None], ids=["written until it is full", "watched"])
def test_a_full_disk_at_any_size_ends_in_one_sentence_and_a_resumed_run_is_the_uninterrupted_one(
    mounted, whole, monkeypatch, reserve
):
    source, whole_keys, whole_contents = whole
    if reserve is not None:
        monkeypatch.setattr(disk, "RESERVE_SHARE", 0.0)
    folder = mounted(40)
    for name in ("seeds", "heldout"):  # outside: the run's files alone shall fill it
        shutil.copy(source / f"{name}.jsonl", folder)
    monkeypatch.chdir(folder)
    command = ["iterate", "--run", "r", *TINY, "--set", "machine.checkpoint_steps=1"]
    stopped_in = set()
    for mib in SIZES:
        mounted(mib)
        result = selfimprove(*command)
        if result.code == 0:
            break
        one_sentence(result)
        nothing_torn(folder / "runs/r")
        stopped_in.add(result.err.split("error: ")[1].splitlines()[0])
    assert len(stopped_in) >= 3, stopped_in  # it filled up in different places
    mounted(200)
    finished = selfimprove("resume", "r")
    assert finished.code == 0, finished.err
    assert keys(folder / "runs/r") == whole_keys
    assert contents(folder / "runs/r") == whole_contents
    assert selfimprove("verify", "r").code == 0


class Broken:
    """From its `after`-th write of a file in the run on, writing raises EIO; reading goes on."""

    def __init__(self, monkeypatch, after: int) -> None:
        self.left, self.tripped = after, False
        self.monkeypatch = monkeypatch
        opened, fsync, copy, write_table = io.open, os.fsync, shutil.copyfile, pq.write_table

        def write(*arguments, **more):
            mode = arguments[1] if len(arguments) > 1 else more.get("mode", "r")
            if set(mode) & set("wax") and "runs/r" in str(arguments[0]):
                self.count()
            return opened(*arguments, **more)

        def counted(of):
            def called(*arguments, **more):
                self.count()
                return of(*arguments, **more)

            return called

        monkeypatch.setattr(builtins, "open", write)
        monkeypatch.setattr(io, "open", write)
        monkeypatch.setattr(os, "fsync", counted(fsync))
        monkeypatch.setattr(shutil, "copyfile", counted(copy))
        monkeypatch.setattr(pq, "write_table", counted(write_table))

    def count(self) -> None:
        self.left -= 1
        if self.left < 0:
            self.tripped = True
            raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("after", [0, 1, 3, 6, 12, 25, 50, 90, 140, 200])
def test_an_error_of_the_disk_at_any_write_ends_in_one_sentence_and_can_be_resumed(cut_data, whole, after):
    _, whole_keys, whole_contents = whole
    with pytest.MonkeyPatch.context() as patch:
        broken = Broken(patch, after)
        result = selfimprove("iterate", "--run", "r", *TINY)
    if broken.tripped:
        one_sentence(result)
        assert "Input/output error" in result.err
        nothing_torn(Path("runs/r"))
    else:
        assert result.code == 0, result.err
    finished = selfimprove("iterate", "--run", "r", *TINY)
    assert finished.code == 0, finished.err
    assert (keys(Path("runs/r")), contents(Path("runs/r"))) == (whole_keys, whole_contents)


def test_what_each_library_says_of_a_full_disk_is_understood(mounted):
    folder = mounted(1)

    def rows():
        row = records.Quarantined("x", "y", "")
        many = (records.Quarantined(os.urandom(40).hex(), row.reason, row.detail) for _ in range(60_000))
        out = store.Artifact(folder / "a")
        out.begin()
        out.write_rows("rows", records.Quarantined, many)

    def journal():
        kept = Journal(folder / "j.sqlite")
        for k in range(200):
            kept.put(str(k), os.urandom(50_000))

    def paid():
        kept = Journal(folder / "j.sqlite")
        for k in range(200):
            kept.put_paid({str(k): os.urandom(50_000)}, "a", 1.0)

    def cached():
        references.Store(folder).add({os.urandom(16): torch.rand(500_000)})

    def text():
        store.write_atomically(folder / "t.json", "x" * 2_000_000)

    for write in (rows, journal, paid, cached, text, lambda: save_file({"a": torch.rand(10**6)}, folder / "s")):
        with pytest.raises(UserError, match="is full: here was not written"), disk.told(folder, "here"):
            write()
        assert not list(folder.glob("*.tmp"))
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_an_error_behind_another_one_is_found(tmp_path, number):
    def write():
        try:
            raise OSError(number, os.strerror(number))
        except OSError as error:
            raise RuntimeError("something else") from error

    with pytest.raises(UserError, match="the disk"), disk.told(tmp_path, "here"):
        write()


def test_what_is_not_the_disks_keeps_its_traceback(tmp_path):
    for error in (FileNotFoundError(errno.ENOENT, "x"), sqlite3.OperationalError("locked"), ValueError("28")):
        with pytest.raises(type(error)), disk.told(tmp_path, "here"):
            raise error
    with pytest.raises(KeyboardInterrupt), disk.told(tmp_path, "here"):
        raise KeyboardInterrupt


def test_a_stage_that_would_not_fit_is_refused_with_both_numbers(tmp_path, monkeypatch):
    there, reserve = disk.free(tmp_path / "not" / "made" / "yet")
    disk.check(tmp_path, None, "iter-001/4-train")
    disk.check(tmp_path, 1000, "iter-001/4-train")
    with pytest.raises(UserError, match=r"free: iter-001/4-train needs about .* and leaves") as refused:
        disk.check(tmp_path, there - reserve + disk.GIB, "iter-001/4-train")
    assert "selfimprove gc" in refused.value.hint


def test_the_watch_asks_the_disk_once_a_second_and_stops_at_the_reserve(tmp_path, monkeypatch):
    clock, asked = [0.0], []
    monkeypatch.setattr(disk, "free", lambda path: asked.append(path) or (room[0], 100))
    room = [100]
    look = disk.watch(tmp_path, "iter-001/4-train", lambda: clock[0])
    for _ in range(1000):
        look()
    assert len(asked) == 1
    room[0] = 99
    look()
    clock[0] = 1.0
    with pytest.raises(UserError, match="nearly full"):
        look()


def test_training_processes_say_that_the_disk_is_full(mounted, whole, monkeypatch):
    source, *_ = whole
    folder = mounted(40)
    monkeypatch.chdir(folder)
    for name in ("seeds", "heldout"):
        shutil.copy(source / f"{name}.jsonl", folder)
    monkeypatch.setattr(disk, "RESERVE_SHARE", 0.0)
    settings = ["--set", "machine.num_processes=2", "--set", "machine.threads=1", "--set", "machine.checkpoint_steps=1"]
    mounted(3)
    result = selfimprove("iterate", "--run", "r", *TINY, *settings)
    one_sentence(result)
    assert "iter-000/2-control" in result.err
