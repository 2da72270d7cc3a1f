"""Disks that are full, fail, or forget: what the drills of test_chaos.py do to a run."""

import contextlib
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("fault.c")


def shim(folder: Path) -> Path:
    """The library of fault.c, to be preloaded."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the shim that makes writes fail")
    built = folder / "fault.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", built, SOURCE, "-ldl"], check=True)
    return built


@contextlib.contextmanager
def small_disk(at: Path, size: int) -> Iterator[None]:
    """A file system of so many bytes, in memory."""
    at.mkdir(parents=True, exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={size}", "none", str(at)]
    made = subprocess.run(["mount", *options], capture_output=True, text=True) if os.getuid() == 0 else None
    if made is None or made.returncode:
        pytest.skip("a small file system needs root and the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", at], check=True)


def grow(at: Path, size: int) -> None:
    """Free some space."""
    subprocess.run(["mount", "-o", f"remount,size={size}", at], check=True)


def unflushed(log: Path) -> dict[Path, int]:
    """The files of which something was written after they were last flushed, and how many bytes were flushed before.

    They have the names that they have now.
    """
    dirty: dict[str, int] = {}
    flushed: dict[str, int] = {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        what, (path, *more) = line[0], line[2:].split("\t")
        if what == "w":
            dirty[path] = flushed.get(path, 0)
        elif what == "s":
            dirty.pop(path, None)
            flushed[path] = int(more[0])
        else:
            dirty, flushed = moved(dirty, path, more[0]), moved(flushed, path, more[0])
    found = {Path(one): size for one, size in dirty.items()}
    for temporary in [path for path in found if path.name.startswith(".tmp")]:  # safetensors renames it unseen
        found |= {path: 0 for path in temporary.parent.glob("*.safetensors") if str(path) not in flushed}
    return {path: size for path, size in found.items() if path.is_file()}


def moved(names: dict[str, int], old: str, new: str) -> dict[str, int]:
    """The names after a file or folder was renamed over another."""
    below = {one for one in names if one == old or one.startswith(f"{old}/")}
    kept = {one: size for one, size in names.items() if one not in below and one != new}
    return kept | {new + one.removeprefix(old): names[one] for one in below}


def cut_power(log: Path, dice: random.Random) -> list[Path]:
    """Do to the unflushed files what a power cut may do: a part is gone, or it is zeros; returns them."""
    torn = unflushed(log)
    for path, safe in sorted(torn.items()):
        size = path.stat().st_size
        safe = min(safe, size)
        os.truncate(path, dice.choice([safe, dice.randint(safe, size), max(safe, size - 1)]))
        if dice.random() < 0.5:
            os.truncate(path, size)  # the length was on the disk, the bytes were not
    return list(torn)
