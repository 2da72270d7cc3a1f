"""Files of a finished run, changed; every command that reads a run says so, or does not need them."""

import json
import os
import random
import shutil
from pathlib import Path

from tests import conftest
from tests.fuzz import mutation, oracle

RUN = "fake"
COMMANDS = [
    ["status", RUN, "--json"],
    ["status", RUN],
    ["plan", RUN, "--json"],
    ["plan", RUN],
    ["verify", RUN, "--json"],
    ["inspect", RUN],
    ["inspect", RUN, "1"],
    ["inspect", RUN, "1/label", "--json"],
    ["inspect", RUN, "0/evaluate"],
    ["gate", RUN],
    ["compare", RUN, "other", "--json"],
    ["report", RUN, "--out", "out/report.html"],
    ["export", RUN, "--out", "out/export"],
]


def case(folder: Path, rng: random.Random, number: int) -> oracle.Told:
    """One file of the run changed, one command, and the file put back."""
    run = folder / "runs" / RUN
    names = sorted(
        p
        for p in run.rglob("*")
        if p.is_file() and not p.is_symlink() and p.name != ".lock" and ".gitignore" not in p.name
    )
    small = [p for p in names if p.suffix in (".json", ".toml", ".jsonl", ".parquet")]
    path = rng.choice(small if rng.random() < 0.9 else names)
    kept = path.read_bytes()
    what = rng.random()
    try:
        path.unlink()
        if what < 0.05:
            pass
        elif what < 0.10:
            path.mkdir()
        elif what < 0.13:
            os.mkfifo(path)
        elif what < 0.17:
            path.symlink_to(rng.choice(["nowhere", path.name, "/dev/zero", "."]))
        elif what < 0.5 and path.suffix == ".json":
            path.write_text(json.dumps(mutation.structure(rng, json.loads(kept)), indent=1))
        else:
            path.write_bytes(mutation.content(rng, kept))
        before = oracle.snapshot(folder / "runs")
        command = rng.choice(COMMANDS)
        told = oracle.run(*command)
        if oracle.snapshot(folder / "runs") != before:
            raise oracle.Finding(f"{command} changed the run")
        changed = not path.is_file() or path.is_symlink() or path.read_bytes() != kept
        published = "iter-" in str(path) and (path.parent / "manifest.json").exists()
        if command[0] == "verify" and changed and published and told.kind == "done":
            raise oracle.Finding(f"verify says nothing of {path}")
        return told
    except oracle.Finding as error:
        raise oracle.Finding(f"{path.relative_to(folder)}: {error}") from error.__cause__
    finally:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        path.write_bytes(kept)
        shutil.rmtree(folder / "out", ignore_errors=True)
        (folder / "out").mkdir()


def prepare(folder: Path) -> None:
    """A finished run and its twin, made with the fake engine; the working directory is `folder`."""
    conftest.cut(40)
    made = conftest.selfimprove("iterate", "--rounds", "1", "--run", RUN, *conftest.QUICK)
    if made.code:
        raise RuntimeError(made.err)
    shutil.copytree(folder / "runs" / RUN, folder / "runs" / "other", symlinks=True)
    (folder / "out").mkdir(exist_ok=True)
