"""A finished four-round run, as it is and with everything in it poisoned."""

import os
import shutil
from pathlib import Path

import pytest

from selfimprove import recipe_file, store
from selfimprove.report import html
from tests.conftest import QUICK, cut, selfimprove
from tests.report import hostile


@pytest.fixture(scope="session")
def four_rounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run; nobody writes into it."""
    folder = tmp_path_factory.mktemp("report")
    before = Path.cwd()
    os.chdir(folder)
    try:
        cut(60)
        result = selfimprove("iterate", "--rounds", "4", "--run", "four", *QUICK, "--set", "synthesize.prompts=60")
        assert result.code == 0, result.err
    finally:
        os.chdir(before)
    return folder / "runs" / "four"


@pytest.fixture(scope="session")
def poisoned(four_rounds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("poisoned") / "runs" / "four"
    shutil.copytree(four_rounds, run, symlinks=True)
    hostile.poison(run)
    return run


@pytest.fixture
def run_copy(four_rounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to be changed; the working directory holds it."""
    run = tmp_path / "runs" / "four"
    shutil.copytree(four_rounds, run, symlinks=True)
    monkeypatch.chdir(tmp_path)
    return run


def page_of(path: Path) -> str:
    run = store.Run(path)
    return html.render(run, recipe_file.load(run.recipe_file))
