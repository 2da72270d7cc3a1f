"""Whole runs with a store: another machine, a store that goes away, --from, the commands."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from selfimprove import store
from selfimprove.remote import moving
from selfimprove.remote.objects import Store
from tests.conftest import QUICK, cut, selfimprove
from tests.paths import ROOT
from tests.remote.helpers import (
    KEYS,
    check_readers,
    tree,
)
from tests.test_run import contents, keys

TINY = [*QUICK, "--rounds", "1", "--set", "synthesize.prompts=30", "--set", "generate.n=2",
        "--set", "synthesize.generator.epochs=1"]  # fmt: skip


@pytest.fixture(scope="module")
def kept_run(tmp_path_factory) -> Path:
    """A folder with a finished run `r` in `runs` and in `store`."""
    place = tmp_path_factory.mktemp("kept")
    (place / "store").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        cut(40)
        result = selfimprove("iterate", "--run", "r", *TINY, "--set", "machine.store=store")
        assert result.code == 0, result.err
    return place


@pytest.fixture
def at_kept_run(kept_run, tmp_path, monkeypatch) -> Path:
    """A copy of it, whose recipe names the copy of the store; the working directory."""
    shutil.copytree(kept_run, tmp_path / "w", symlinks=True)
    for recipe in (tmp_path / "w").glob("*/r/recipe.toml"):
        recipe.write_text(recipe.read_text().replace(f"{kept_run}/", f"{tmp_path}/w/"))
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


def test_every_stage_is_in_the_store_when_the_run_ends(at_kept_run):
    run = store.Run(Path("runs/r"))
    found = check_readers(str(at_kept_run / "store"), "r")
    assert len(found) == 8
    for directory, one in found.items():
        assert one.content == (run.path / directory / "manifest.json").read_bytes()
    assert f'store = "{at_kept_run}/store"' in Path("runs/r/recipe.toml").read_text()  # wherever it is resumed from
    for name in ("recipe.toml", "run.json"):
        assert Path(f"store/r/{name}").read_bytes() == Path(f"runs/r/{name}").read_bytes()
    result = selfimprove("push", "r", "--verify")
    assert (result.code, result.out) == (0, f"{at_kept_run}/store/r\n")
    assert "every stage was there already" in result.err
    assert "0 broken" in result.err


def test_a_new_machine_goes_on_from_the_store(at_kept_run):
    shutil.move("runs", "first")
    result = selfimprove("pull", "store/r")
    assert result.code == 0, result.err
    assert result.out == "runs/r\n"
    assert "brought 8 stages" in result.err
    assert "selfimprove resume r" in result.err
    assert tree(Path("runs/r")) == tree(Path("first/r"))
    assert Path("runs/r/best").readlink() == Path("first/r/best").readlink()
    verified = selfimprove("verify", "r")
    assert verified.code == 0, verified.out
    again = selfimprove("resume", "r")
    assert again.code == 0, again.err
    assert "nothing to do" in again.err
    assert selfimprove("fork", "r@1/train", "--run", "child").code == 0
    assert selfimprove("pull", "store/r").err.startswith("nothing was missing here")


def test_a_store_that_has_no_stage_yet_is_told(at_kept_run):
    shutil.rmtree("runs")
    for manifests in Path("store/r").glob("iter-*"):
        shutil.rmtree(manifests)
    result = selfimprove("pull", "store/r")
    assert result.code == 0, result.err
    assert result.err.startswith("the store has no finished stage of it")


def test_the_same_command_on_a_new_machine_brings_what_is_there_and_makes_the_rest(at_kept_run):
    shutil.move("runs", "first")
    command = ["iterate", "--run", "r", *TINY, "--set", "machine.store=store"]
    other = selfimprove(*command, "--set", "train.loss.beta=3.0")
    assert other.code == 1
    assert "run 'r' exists with another recipe: train.loss.beta" in other.err
    assert not list(Path("runs/r").glob("iter-*"))
    command[command.index("--rounds") + 1] = "2"
    result = selfimprove(*command)
    assert result.code == 0, result.err
    assert "brought 8 stages" in result.err
    assert f"from {at_kept_run}/store/r" in result.err.replace("\n", "")
    assert "5 stages in" in result.err
    found = check_readers(str(at_kept_run / "store"), "r")
    assert len(found) == 13
    whole = selfimprove("iterate", "--run", "whole", *TINY[:-6], "--rounds", "2", *TINY[-6:])
    assert whole.code == 0, whole.err
    assert keys(Path("runs/r")) == keys(Path("runs/whole"))
    assert contents(Path("runs/r")) == contents(Path("runs/whole"))


def test_a_store_that_goes_away_fails_the_run_in_one_sentence_and_the_next_resume_pushes(cut_data, monkeypatch):
    (cut_data / "store").mkdir()
    write, left = moving.write, [25]

    def gone(target, *more):
        left[0] -= str(target).startswith(str(cut_data / "store"))
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        write(target, *more)

    with monkeypatch.context() as patch:
        patch.setattr(moving, "write", gone)
        result = selfimprove("iterate", "--run", "r", *TINY, "--set", "machine.store=store")
    assert result.code == 1
    assert re.search(rf"error: the store {cut_data}/store could not write \S+: \[Errno 28\] No space left", result.err)
    assert "Traceback" not in result.err
    there, here = check_readers(str(cut_data / "store"), "r"), keys(Path("runs/r"))
    assert 0 < len(there) < len(here) < 8  # the one that could not be pushed is here
    told = json.loads(selfimprove("status", "r", "--json").out)
    assert told["state"] == "failed"
    assert "could not write" in told["error"]
    before = {d: (Path("runs/r") / d / "manifest.json").read_bytes() for d in here}
    resumed = selfimprove("resume", "r")
    assert resumed.code == 0, resumed.err
    assert re.search(r"kept \d stages? \(", resumed.err)
    found = check_readers(str(cut_data / "store"), "r")
    assert len(found) == 8
    assert before.items() <= {d: one.content for d, one in found.items()}.items()


def test_what_from_sets_aside_is_replaced_in_the_store_too(at_kept_run):
    old = check_readers("store", "r")
    result = selfimprove("resume", "r", "--from", "1/label")
    assert result.code == 0, result.err
    assert "set aside iter-001/3-label" in result.err
    assert "brought" not in result.err
    new = check_readers("store", "r")
    assert new.keys() == old.keys()
    assert {d for d in new if new[d].content != old[d].content} == {
        "iter-001/3-label", "iter-001/4-train", "iter-001/5-evaluate",
    }  # fmt: skip
    aside = [p.read_bytes() for p in Path("store/r/aside").rglob("manifest.json")]
    assert sorted(aside) == sorted(old[d].content for d in old if new[d].content != old[d].content)


def test_what_verify_sets_aside_comes_back_from_the_store(at_kept_run):
    before = tree(Path("runs/r"))
    file = Path("runs/r/iter-001/3-label/pairs-00000.parquet")
    file.write_bytes(b"x" * file.stat().st_size)
    assert selfimprove("verify", "r", "--repair").code == 0
    assert not file.exists()
    result = selfimprove("resume", "r")
    assert result.code == 0, result.err
    assert "brought 3 stages" in result.err
    assert "nothing to do" in result.err
    assert {name: what for name, what in tree(Path("runs/r")).items() if not name.startswith("aside/")} == before


def test_no_key_is_written_anywhere(cut_data, s3):
    result = selfimprove("iterate", "--run", "r", *TINY, "--until", "0/evaluate", "--set", f"machine.store={s3}")
    assert result.code == 0, result.err
    assert len(check_readers(s3, "r")) == 1
    written = b"".join(p.read_bytes() for p in Path("runs").rglob("*") if p.is_file())
    written += b"".join(Store(s3).read(f"r/{name}") or b"" for name in Store(s3).sizes("r"))
    for value in KEYS.values():
        assert value.encode() not in written
        assert value not in result.err + result.out


def test_check_tries_the_store(cut_data):
    assert "mkdir -p" in selfimprove("check", "default", *QUICK[2:], "--set", "machine.store=none").err
    assert not Path("none").exists()
    Path("some").mkdir()
    result = selfimprove("check", "default", *QUICK[2:], "--set", "machine.store=some")
    assert result.code == 0, result.err
    assert "ok    store: can be written, read and deleted in" in result.out
    assert not list(Path("some").iterdir())


def test_the_commands_say_what_they_lack(at_kept_run):
    assert selfimprove("pull", "r").code == 1
    assert "no run 'x' in" in (said := selfimprove("pull", "store/x").err)
    assert "there is r" in said
    assert not Path("runs/x").exists()
    for address in ("store/..", "s3://bucket", "store"):
        assert "names no run in a store" in selfimprove("pull", address).err
    Path("else").mkdir()
    pushed = selfimprove("push", "r", "--to", "else")
    assert pushed.code == 0, pushed.err
    assert "8 stages pushed" in pushed.err
    recipe = Path("runs/r/recipe.toml")
    recipe.write_text("".join(line for line in recipe.read_text().splitlines(True) if not line.startswith("store =")))
    lacking = selfimprove("push", "r")
    assert lacking.code == 2
    assert "selfimprove push r --to" in lacking.err
    outside = Path("runs/r/iter-001/3-label/notes")
    outside.symlink_to(Path("else").resolve())
    assert "notes is a symlink, which is not followed" in selfimprove("push", "r", "--to", "else").err
    outside.unlink()
    name = next(Path("else/r/iter-001/3-label").glob("*/pairs-00000.parquet"))
    name.write_bytes(b"x" * name.stat().st_size)
    verified = selfimprove("push", "r", "--to", "else", "--verify")
    assert verified.code == 3
    assert "pairs-00000.parquet differs from its manifest" in verified.out
    moved = selfimprove("pull", "else/r", "--runs", "other")
    assert moved.code == 1
    assert "pairs-00000.parquet differs from its manifest" in moved.err


def test_a_program_that_is_killed_while_it_pushes_goes_on(cut_data):
    """The command itself, killed right after its first artifact was published here and half pushed."""
    script = (
        "import os, signal, sys\n"
        "from selfimprove.remote import moving\n"
        "write = moving.write\n"
        "def stop(target, *more):\n"
        "    write(target, *more)\n"
        "    if '/iter-000/2-control/' in str(target): os.kill(os.getpid(), signal.SIGKILL)\n"
        "moving.write = stop\n"
        "sys.argv = ['selfimprove', *sys.argv[1:]]\n"
        "from selfimprove import cli\n"
        "cli.main()\n"
    )
    (cut_data / "store").mkdir()
    command = ["iterate", "--run", "r", *TINY, "--set", "machine.store=store", "--until", "0/control"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    ended = subprocess.run(
        [sys.executable, "-c", script, *command],
        capture_output=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert list(check_readers("store", "r")) == ["iter-000/1-evaluate"]
    assert list(Path("store/r/iter-000/2-control").rglob("*"))
    control = Path("runs/r/iter-000/2-control/manifest.json").read_bytes()
    result = selfimprove(*command)
    assert result.code == 0, result.err
    assert "kept 1 stage (" in result.err
    assert "0/control is made already" in result.err
    found = check_readers("store", "r")
    assert list(found) == ["iter-000/1-evaluate", "iter-000/2-control"]
    assert found["iter-000/2-control"].content == control
    assert not list(Path("store").rglob("*.half"))
