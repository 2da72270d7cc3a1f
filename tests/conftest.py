"""Shared fixtures: one real run of the embedded default for the whole session, quick runs with the fake engine."""

import contextlib
import io
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if not os.environ.get("SELFIMPROVE_GPU"):  # `make test-gpu` sets it: all other tests are about a CPU's exact numbers
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from selfimprove import cli
from selfimprove.data import SHIPPED

SMALL = [  # the embedded default in miniature: everything real, a fraction of the work
    "--set", "synthesize.prompts=60",
    "--set", "generate.n=4",
    "--set", "evaluate.n=2",
    "--set", "synthesize.generator.epochs=2",
    "--set", "train.optimizer.epochs=1",
]  # fmt: skip

QUICK = [  # with the fixture `cut_data`: a whole run in seconds
    "--engine", "fake", "--set", "evaluate.n=1",
    "--set", "data.seeds=seeds.jsonl", "--set", "data.heldout=heldout.jsonl",
    "--set", "control.optimizer.epochs=1", "--set", "train.optimizer.epochs=1",
]  # fmt: skip


def cut(rows: int) -> None:
    """Write the first rows of the embedded seeds and held-out prompts into the working directory."""
    for name in ("seeds", "heldout"):
        lines = SHIPPED[f"demo:{name}"].read_text(encoding="utf-8").splitlines(keepends=True)
        Path(f"{name}.jsonl").write_text("".join(lines[:rows]), encoding="utf-8")


class Result:
    """What a command printed and how it ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


def selfimprove(*arguments: str) -> Result:
    """Run the program in this process, as its console script would."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["selfimprove", *arguments])
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code
    return Result(int(code or 0), out.getvalue(), err.getvalue())


def processor_seconds(*arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run the program in a process of its own three times: how it ended, and the least processor seconds it took.

    That is what passes on an idle machine, and other load changes it little. Bytecode is kept, as in an installation.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {"COLUMNS": "120"}
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert ended.returncode == 0, ended.stderr
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return ended, min(seconds)


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cut_data(in_tmp: Path) -> Path:
    """The first 40 rows of the embedded seeds and held-out prompts, as files in the working directory."""
    cut(40)
    return in_tmp


@pytest.fixture(scope="session")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished 2-round run of the default recipe with real vLLM, small settings; the working directory holds it."""
    folder = tmp_path_factory.mktemp("real")
    before = Path.cwd()
    os.chdir(folder)
    try:
        result = selfimprove("iterate", "--rounds", "2", "--run", "real", *SMALL)
        assert result.code == 0, result.err
        yield folder / "runs" / "real"
    finally:
        os.chdir(before)


@pytest.fixture
def at_real_run(real_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(real_run.parent.parent)
    return real_run


@pytest.fixture(scope="session")
def fake_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished 2-round run `fake` of the fake engine."""
    folder = tmp_path_factory.mktemp("fake")
    before = Path.cwd()
    os.chdir(folder)
    try:
        result = selfimprove("iterate", "--rounds", "2", "--run", "fake", "--engine", "fake", *SMALL)
        assert result.code == 0, result.err
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def fake_run(fake_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that run, free to be damaged; the working directory holds it."""
    import shutil

    shutil.copytree(fake_runs / "runs", tmp_path / "runs", symlinks=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "fake"
