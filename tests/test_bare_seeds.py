"""Seeds that are prompts alone: enough where the policy's own answers are judged, refused where golds are used."""

import json
import re
from pathlib import Path

import pytest

from selfimprove import preflight, recipe_file
from selfimprove.errors import UserError
from selfimprove.records import Pair, Seed, Verdict
from selfimprove.store import read_rows
from tests.conftest import selfimprove

SETTINGS = [
    "--rounds", "2", "--engine", "fake", "--set", "train.optimizer.epochs=1",
    "--set", "data.heldout=heldout.jsonl", "--set", "evaluate.n=1",
]  # fmt: skip


@pytest.fixture
def without_control(cut_data: Path) -> None:
    """A recipe that uses no gold, and the seeds of `cut_data` once more without their answers, but for the first."""
    first, *rows = [json.loads(line) for line in Path("seeds.jsonl").read_text(encoding="utf-8").splitlines()]
    bare = [{name: value for name, value in row.items() if name != "completion"} for row in rows]
    for name, seeds in [("bare", bare), ("mixed", [first, *bare])]:
        Path(f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in seeds), encoding="utf-8")
    Path("rest.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    shipped = recipe_file.find("iterative_dpo").read_text(encoding="utf-8")
    Path("mine.toml").write_text(re.sub(r"\[control\]\n.+\n", "", shipped), encoding="utf-8")


def iterate(name: str) -> list[list[Pair]]:
    """A whole run on the seeds of that name; its pairs by round."""
    result = selfimprove("iterate", "mine.toml", "--run", name, *SETTINGS, "--set", f"data.seeds={name}.jsonl")
    assert result.code == 0, result.err
    assert selfimprove("verify", name).code == 0
    return [read_rows(Path(f"runs/{name}/iter-00{t}/2-label"), "pairs", Pair) for t in (1, 2)]


def test_a_run_without_golds_makes_the_pairs_of_one_with_golds_that_it_does_not_use(without_control):
    bare = iterate("bare")
    assert bare == iterate("rest")
    assert all(bare)
    assert selfimprove("report", "bare").code == 0


def test_a_file_with_some_answers_is_read_as_it_is(without_control):
    assert all(iterate("mixed"))
    verdicts = read_rows(Path("runs/mixed/iter-001/2-label"), "verdicts", Verdict)
    assert sum(verdict.source == "gold" for verdict in verdicts) == 1


def test_check_says_how_many_golds_there_are(without_control):
    told = selfimprove("check", "mine.toml", "--json", "--set", "data.seeds=mixed.jsonl")
    found = {entry["what"]: entry["found"] for entry in json.loads(told.out)}
    assert found["seeds"] == "40, 1 of them with a gold answer"
    assert "equals plain rows" in found["packed forward"]


@pytest.mark.parametrize(
    ("name", "settings", "user"),
    [
        ("iterative_dpo", [], "[control]"),
        ("spin", [], "pairing 'gold_vs_generated'"),
        ("iterative_dpo", ['label.pairing={name="dynamic"}'], "pairing 'dynamic'"),
        ("synpo", [], "[synthesize]"),
        ("self_rewarding", [], "[sft]"),
        ("sapo", [], "generate.splice"),
        ("iterative_dpo", ['label.judge={name="verifier", checker="exact"}'], "label.judge"),
        ("d2po", ['discriminate.judge={name="verifier", checker="exact"}'], "discriminate.judge"),
    ],
)
def test_whatever_uses_golds_is_named(name, settings, user):
    chosen = recipe_file.load(recipe_file.find(name), settings)
    with pytest.raises(UserError) as raised:
        preflight.answered(chosen, [Seed("a", "p", "c"), Seed("b", "q", None)])
    assert raised.value.message == f"{user} needs gold answers, and 1 of 2 seeds in demo:seeds have none, first 'b'"
    preflight.answered(chosen, [Seed("a", "p", "c")])
