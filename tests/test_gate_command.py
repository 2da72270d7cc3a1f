"""`selfimprove gate`: its exit code is for programs, its words are for people."""

import json
from pathlib import Path

import pytest

from selfimprove.data import SHIPPED
from tests.altered import decision, gated
from tests.conftest import QUICK, selfimprove


@pytest.mark.parametrize(
    ("last", "code", "word"), [("promote", 0, "promoted"), ("keep", 3, "kept"), ("roll back", 3, "rolled back")]
)
def test_the_latest_round_decides(fake_run, last, code, word):
    gated(fake_run, {1: decision("promote", 1, 1), 2: decision(last, 2 if last == "promote" else 1, 1)})
    result = selfimprove("gate", "fake")
    assert result.code == code, result.err
    assert result.out.startswith(f"fake, round 2: {word}")
    for number in ("+0.021", "[+0.003, +0.039]", "300 prompts", "detectable: 0.02", "0.02, limit 0.1: ok"):
        assert number in result.out
    told = json.loads(selfimprove("gate", "fake", "--json").out)
    assert (told["run"], told["iteration"], told["decision"]) == ("fake", 2, last)
    assert told["primary"]["difference"] == 0.021


def test_a_round_that_is_not_finished_does_not_decide(fake_run):
    gated(fake_run, {1: decision("promote", 1, 1)})
    assert selfimprove("gate", "fake").out.startswith("fake, round 1: promoted")


def test_what_could_not_be_said_is_unknown_and_not_zero(fake_run):
    unknown = {"metric": "sampled", "difference": None, "low": None, "high": None, "level": 0.05, "mde": None, "n": 1}
    health = {"length_ratio": {"value": None, "limit": 2.0, "ok": None}}
    gated(fake_run, {1: decision("keep", 0, 1, primary=unknown, health=health, stop=True)})
    result = selfimprove("gate", "fake")
    assert result.code == 3
    assert "against the best: unknown [unknown, unknown]" in result.out
    assert "length_ratio: unknown, limit 2: unknown" in result.out
    assert "best so far: what round 1 started with" in result.out
    assert "the run stops here" in result.out


def test_a_hostile_reason_is_shown_as_text(fake_run):
    gated(fake_run, {1: decision("keep", 0, 1, reasons=["\x1b[31mred\x07 [bold]x[/]"])})
    out = selfimprove("gate", "fake").out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "[bold]x[/]" in out


def test_a_run_without_a_gate_says_how_to_add_one(fake_run):
    result = selfimprove("gate", "fake")
    assert result.code == 1
    assert "has no gate" in result.err
    assert "[gate]" in result.err
    assert "data.selection" in result.err


def test_a_gate_that_has_not_decided_is_no_answer(fake_run):
    gated(fake_run, {})
    result = selfimprove("gate", "fake")
    assert (result.code, result.out) == (1, "")
    assert "has not decided yet" in result.err


def test_a_real_gate_is_told_compared_and_exported(cut_data):
    """Two rounds with a gate of their own, not a hand-written one."""
    lines = SHIPPED["demo:selection"].read_text(encoding="utf-8").splitlines(keepends=True)
    Path("selection.jsonl").write_text("".join(lines[:30]), encoding="utf-8")
    stages = "stages=['generate', 'label', 'train', 'evaluate', 'gate']"
    settings = [stages, "data.selection=selection.jsonl", "gate={}"]
    given = [part for setting in settings for part in ("--set", setting)]
    for name, seed in (("a", "0"), ("b", "1")):
        ended = selfimprove("iterate", "spin", "--rounds", "2", "--run", name, "--seed", seed, *QUICK, *given)
        assert ended.code == 0, ended.err
    written = json.loads(Path("runs/a/iter-002/5-gate/gate.json").read_text())
    result = selfimprove("gate", "a")
    assert result.code == (0 if written["decision"] == "promote" else 3), result.err
    assert all(reason in result.out for reason in written["reasons"])
    assert json.loads(selfimprove("gate", "a", "--json").out).items() >= written.items()
    told = json.loads(selfimprove("compare", "a", "b", "--json").out)
    assert told["runs"][0]["best"]["iteration"] == written["best"]
    assert {row["n"] for row in told["comparisons"]} == {40}  # of the report split; the other one has 30
    assert selfimprove("export", "a", "--latest", "--out", "out").code == 0
    card = Path("out/README.md").read_text()
    assert f"**{written['decision']}**" in card
    assert "selection.jsonl | prompts that the gate looks at" in card
