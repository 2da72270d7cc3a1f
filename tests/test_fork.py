"""Forks: shared by hard link up to a stage, never a change of the parent, refused where sharing would be wrong."""

import errno
import json
import os
from pathlib import Path

import pytest

from selfimprove import forking, store
from selfimprove.errors import UserError
from tests.conftest import selfimprove

BETA = ["--set", "train.loss.beta=3.0"]


def tree(run: Path) -> dict[str, tuple[str, int, int]]:
    """Every file of a run: its content, its mode and when it was written."""
    return {
        str(p.relative_to(run)): (store.sha256(p), p.stat().st_mode, p.stat().st_mtime_ns)
        for p in run.rglob("*")
        if p.is_file() and not p.is_symlink() and p.name != ".lock"
    }


def artifacts(run: Path) -> set[str]:
    return {str(m.parent.relative_to(run)) for m in run.glob("iter-*/*/manifest.json")}


def key(run: Path, directory: str) -> str:
    return json.loads((run / directory / "manifest.json").read_text())["key"]


def plans(run: str) -> dict[str, str]:
    told = json.loads(selfimprove("plan", run, "--json").out)
    return {f"{p['iteration']}/{p['stage'].partition('-')[2]}": p["plan"] for p in told}


def test_a_fork_shares_what_comes_before_and_never_touches_its_parent(fake_run):
    before = tree(fake_run)
    result = selfimprove("fork", "fake@2/train", *BETA, "--set", "train.noise=0", "--run", "x")
    assert result.code == 1  # no recipe
    assert not Path("runs/x").exists()
    result = selfimprove("fork", "fake@1/train", *BETA, "--run", "child")
    assert result.code == 0, result.err
    child = Path("runs/child")
    assert result.out.strip() == str(child)
    assert "shares 6 stages" in result.err
    assert "begins at iter-001/4-train" in result.err
    assert "hint: selfimprove resume child" in result.err
    shared = artifacts(child)
    assert shared == {
        "iter-000/1-evaluate", "iter-000/2-control", "iter-000/3-control-evaluate",
        "iter-001/1-synthesize", "iter-001/2-generate", "iter-001/3-label",
    }  # fmt: skip
    for directory in shared:
        for file in (p for p in (child / directory).rglob("*") if p.is_file()):
            assert file.stat().st_ino == (fake_run / file.relative_to(child)).stat().st_ino
    about = json.loads((child / "run.json").read_text())
    assert about["forked_from"] == {"run": "fake", "at": "iter-001/4-train"}
    assert about["run"] == "child"
    told = plans("child")
    assert {stage for stage, plan in told.items() if plan == "done"} == {
        "0/evaluate", "0/control", "0/control-evaluate", "1/synthesize", "1/generate", "1/label"
    }  # fmt: skip
    assert set(told.values()) == {"done", "to do"}
    assert json.loads(selfimprove("status", "child", "--json").out)["state"] == "stopped"
    assert tree(fake_run) == before

    assert selfimprove("resume", "child").code == 0
    assert selfimprove("verify", "child").code == 0
    assert selfimprove("report", "child").code == 0
    assert json.loads(selfimprove("status", "child", "--json").out)["state"] == "done"
    assert artifacts(child) == artifacts(fake_run)
    same = {d for d in artifacts(child) if key(child, d) == key(fake_run, d)}
    assert same == shared | {"iter-002/1-synthesize"}  # made from the generator of round 1, not from a policy
    assert selfimprove("resume", "child", "--from", "1/synthesize", "--until", "1/synthesize").code == 0
    assert tree(fake_run) == before  # not even what the fork sets aside is the parent's


def test_an_unchanged_fork_makes_what_its_parent_made(fake_run):
    assert selfimprove("fork", "fake@2", "--run", "same").code == 0
    assert {d.partition("/")[0] for d in artifacts(Path("runs/same"))} == {"iter-000", "iter-001"}
    assert (Path("runs/same") / "latest").readlink() == Path("iter-001")
    assert (Path("runs/same") / "best").readlink() == Path("iter-001")
    assert selfimprove("resume", "same").code == 0
    for directory in artifacts(fake_run):
        assert key(Path("runs/same"), directory) == key(fake_run, directory)


def test_more_rounds_and_a_name_of_its_own(fake_run):
    for name in ("fake-2", "fake-3"):
        result = selfimprove("fork", "fake@3", "--set", "rounds=3")
        assert result.code == 0, result.err
        assert result.out.strip() == f"runs/{name}"
    assert artifacts(Path("runs/fake-2")) == artifacts(fake_run)


@pytest.mark.parametrize(
    ("arguments", "code", "says", "hint"),
    [
        (["fake@2/label", "--set", "generate.n=5"], 1,
         "iter-001/2-generate comes before iter-002/3-label and cannot be shared: generate.n 4 -> 5",
         "fork earlier: selfimprove fork fake@1/generate --set generate.n=5"),
        (["fake@2/label", *BETA], 1, "iter-001/4-train comes before iter-002/3-label", "fake@1/train"),
        (["fake@2/lable"], 1, "no stage '2/lable'", "2/ synthesize, generate"),
        (["fake@7"], 1, "no iteration 7", "the recipe has 2"),
        (["fake@7", "--set", "rounds=8"], 1, "iter-003/1-synthesize of run 'fake' is not made", "fake@3/synthesize"),
        (["fake"], 2, "'fake' does not say where to fork", "selfimprove fork fake@2/label"),
        (["none@2"], 1, "no run 'none'", "runs here: fake"),
        (["fake@2", "--run", "fake"], 1, "run 'fake' exists already", "--run ANOTHER_NAME"),
        (["fake@2", "--run", "../x"], 2, "cannot be a run's name", "no slash"),
        (["fake@2", "--set", "label.judge.name=oracle"], 1, "oracle", "hint"),
    ],
)  # fmt: skip
def test_what_cannot_be_forked_is_refused_and_leaves_nothing(fake_run, arguments, code, says, hint):
    before = tree(fake_run)
    result = selfimprove("fork", *arguments)
    assert result.code == code, result.err
    assert says in result.err
    assert hint in result.err.partition(says)[2]
    assert [p.name for p in Path("runs").iterdir()] == ["fake"]
    assert tree(fake_run) == before


def test_a_file_system_without_links_gets_copies_and_says_so(fake_run, monkeypatch):
    def no_links(*arguments, **options):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    result = selfimprove("fork", "fake@1/label", "--run", "child")
    assert result.code == 0, result.err
    assert "files were copied: the file system makes no hard links here" in result.err
    for directory in artifacts(Path("runs/child")):
        assert key(Path("runs/child"), directory) == key(fake_run, directory)
    assert selfimprove("verify", "child").code == 0


def test_a_fork_that_fails_half_way_leaves_nothing(fake_run, monkeypatch):
    real, calls = store.Artifact.link, []

    def full(self, published, manifest):
        calls.append(published)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, published, manifest)

    monkeypatch.setattr(store.Artifact, "link", full)
    assert selfimprove("fork", "fake@2").code == 1
    assert [p.name for p in Path("runs").iterdir()] == ["fake"]


def test_the_place_of_a_fork():
    assert forking.parse("a@2/label") == ("a", "2/label")
    assert forking.parse("a@2") == ("a", "2")
    for text in ("a", "a@", "@2", "@", ""):
        with pytest.raises(UserError):
            forking.parse(text)
