"""What must stay true of the repository itself."""

import re
import subprocess

from tests.paths import ROOT


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_no_file_is_large():
    assert [name for name in tracked() if (ROOT / name).stat().st_size > 4_000_000] == []


def test_the_package_carries_what_the_first_run_needs(tmp_path):
    """A wheel holds recipes, templates, data and the base model."""
    import sys
    import zipfile

    build = "from setuptools import build_meta; import sys; build_meta.build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", build, str(tmp_path)]
    subprocess.run(command, cwd=_copy(tmp_path), check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for needed in (
        "selfimprove/pipelines/default.toml",
        "selfimprove/prompts/synthesize.jinja",
        "selfimprove/demo/data/seeds.jsonl",
        "selfimprove/demo/model/model.safetensors",
        "selfimprove/report/report.html.jinja",
        "selfimprove/report/report.css",
    ):
        assert needed in names


def _copy(tmp_path):
    source = tmp_path / "source"
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    return source


def test_no_lock_holds_a_path_or_a_host():
    for file in (ROOT / "requirements").glob("*.txt"):
        assert not re.search(r"file:|https?:|/\w+/\w+/", file.read_text()), file
