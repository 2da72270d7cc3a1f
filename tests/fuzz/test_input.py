"""Bad recipes and bad data files, each given to the commands that read it; `make fuzz` does this 20,000 times."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selfimprove import data
from selfimprove.errors import UserError
from tests.fuzz import cases, files, mutation, oracle

RECIPES, FILES = 200, 360
QUICKLY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def folder(in_tmp: Path) -> Iterator[Path]:
    (in_tmp / "case").mkdir()
    with cases.quick(in_tmp), pytest.MonkeyPatch.context() as patch:
        patch.chdir(in_tmp / "case")
        yield in_tmp / "case"


def test_recipes(folder):
    ended = [cases.recipe(folder, random.Random(f"test/recipes/{k}"), k).kind for k in range(RECIPES)]
    assert {"done", "user error"} <= set(ended)


def test_data_files(folder):
    ended = [cases.file(folder, random.Random(f"test/files/{k}"), k).kind for k in range(FILES)]
    assert {"done", "user error"} <= set(ended)


@pytest.mark.parametrize("form", files.FORMATS, ids=lambda form: form.name)
def test_the_formats_are_right_before_they_are_changed(folder, form):
    files.prepare(folder)
    valid = form.valid(random.Random(0))
    path = folder / f"{form.name}{files.ENDINGS.get(form.name, '.jsonl')}"
    path.write_bytes(valid.encode() if isinstance(valid, str) else files.lines(valid))
    for command in form.commands(path.name):
        told = oracle.run(*command)
        assert told.kind == "done" or any(why in told.sentence for why in ("Punkt", "no run of study")), told


@given(st.randoms(use_true_random=False))
@QUICKLY
def test_no_row_is_lost_and_none_is_changed(tmp_path, rng):
    """Against a reader that knows nothing of ours: the file's own lines, each as JSON."""
    seeds = next(form for form in files.FORMATS if form.name == "seeds")
    text = files.draw(rng, seeds)
    path = tmp_path / "seeds.jsonl"
    path.write_bytes(text)
    error = refusal(data.read_seeds, path)
    if error:
        assert str(path) in error.message
        assert error.hint
        return
    rows = data.read_seeds(path)
    plain = text.decode("utf-8-sig")
    expected = (
        json.loads(plain)
        if plain.lstrip().startswith("[")
        else [json.loads(line) for line in plain.split("\n") if line.strip()]
    )
    assert [(row.prompt, row.completion) for row in rows] == [
        (one["prompt"], one.get("completion")) for one in expected
    ]
    assert [row.prompt_id for row in rows if not row.prompt_id.startswith("seed-")] == [
        str(one["id"])
        for one in expected
        if "id" in one  # a whole number names a row by its digits
    ]


@given(st.binary(max_size=300))
@QUICKLY
def test_any_bytes_are_rows_or_one_sentence(tmp_path, content):
    path = tmp_path / "any.jsonl"
    path.write_bytes(content)
    told = [refusal(read, path) for read in (data.read_seeds, data.read_pairs, data.read_heldout, data.read_paragraphs)]
    assert all(error is None or (str(path) in error.message and error.hint) for error in told)


def refusal(read: Callable[[Path], Any], path: Path) -> UserError | None:
    try:
        read(path)
    except UserError as error:
        return error
    return None


def a_bug(arguments, standalone_mode):
    raise KeyError("a bug")


def a_write(arguments, standalone_mode):
    Path("somewhere").write_text("something")


def no_end(arguments, standalone_mode):
    while True:
        pass


def no_hint(arguments, standalone_mode):
    raise UserError("something is wrong")


@pytest.mark.parametrize("wrong", [a_bug, a_write, no_end, no_hint])
def test_the_oracle_sees_what_it_must_see(in_tmp, monkeypatch, wrong):
    monkeypatch.setattr(oracle, "program", lambda: wrong)
    monkeypatch.setattr(oracle, "SECONDS", 0.2)
    with pytest.raises(oracle.Finding):
        oracle.run("anything")


def test_mutations_reach_every_kind_of_damage():
    found = [mutation.content(random.Random(k), b'{"a": 1}\n{"b": 2}\n') for k in range(2000)]
    assert b"" in found
    assert any(text.startswith(b"\xff\xfe") for text in found)
    assert any(b"\x00" in text for text in found)
    assert any(len(text) > 50_000 for text in found)
