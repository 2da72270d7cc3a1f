"""Documents are executed or generated: the tutorial runs, the command line page is the program's own."""

import importlib.util
import re
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import pytest

from selfimprove import recipe, recipe_file
from selfimprove.stages import evaluate
from selfimprove.store import Manifest
from tests.conftest import selfimprove
from tests.paths import ROOT


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [block.strip() for block in blocks]


def test_the_tutorial_runs_as_it_is_written(in_tmp, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    blocks = commands(ROOT / "docs" / "tutorial.md")
    assert len(blocks) >= 6
    for block in blocks:
        ended = subprocess.run(["bash", "-ec", block], capture_output=True, text=True)
        assert ended.returncode == 0, f"{block}\n{ended.stdout}\n{ended.stderr}"
    assert (in_tmp / "runs/first/report.html").is_file()
    assert (in_tmp / "runs/first/iter-002/5-evaluate/scores.json").is_file()
    assert (in_tmp / "runs/trial").is_dir()


@pytest.mark.parametrize("page", ["cli", "losses", "recipe", "health"])
def test_a_generated_page_is_what_the_program_says(page):
    spec = importlib.util.spec_from_file_location(f"make_{page}", ROOT / "docs" / f"make_{page}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") == module.text(), "run `make docs`"


def test_the_training_page_names_every_setting():
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for section in (recipe.Train, recipe.Optimizer, recipe.Noise, recipe.Chunks, recipe.Sync):
        for field in section.model_fields:
            if field not in ("start", "pairs", "optimizer", "steps", "bound", "sigma", "margin", "number"):
                assert field in page, field


def test_the_benchmarks_of_the_evaluation_page_are_a_recipes():
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    table = recipe_file.load(recipe_file.find("iterative_dpo")).model_dump(exclude_none=True)
    snippet = tomllib.loads(re.search(r"```toml\n(.*?)```", page, re.DOTALL)[1])
    table["evaluate"] |= snippet["evaluate"]
    chosen = recipe.validated(recipe.Recipe, table | {"servers": snippet["servers"]}, "snippet")
    evaluate.check(chosen.evaluate)
    assert evaluate.servers(chosen.evaluate) == ["judge"]
    for kind in typing.get_args(recipe.BenchmarkKind):
        assert f"| `{kind}` |" in page
        assert f"- **{kind}**: " in page


def test_every_recipe_and_command_of_the_readme_exists():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", readme, re.MULTILINE)
    table = re.findall(r"`(\w+)`", " ".join(rows))
    names = {path.stem for path in recipe_file.shipped_recipes()}
    assert set(table) == {name for name in names if not name.endswith("_7b")}
    for command in re.findall(r"^selfimprove (\w+)", readme, re.MULTILINE):
        assert selfimprove(command, "--help").code == 0
    for link in re.findall(r"\]\(([^)#h][^)]*)\)", readme):
        assert (ROOT / link).exists(), link


def test_the_artifacts_page_names_every_field_of_the_manifest():
    page = (ROOT / "docs" / "artifacts.md").read_text(encoding="utf-8")
    for field in Manifest.model_fields:
        assert f"`{field}`" in page, field


def test_make_help_lists_the_targets():
    told = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"setup", "demo", "test", "docs"} <= {line.split()[0] for line in told.splitlines()}
