"""The gate in whole runs with the fake engine: what it looks at, what the next round starts from, when it stops."""

import json
import shutil
from pathlib import Path

import pytest

from selfimprove import records, store
from selfimprove.data import SHIPPED
from tests.conftest import QUICK, selfimprove

STAGES = "stages=['generate', 'label', 'train', 'evaluate', 'gate']"


@pytest.fixture
def gated(cut_data):
    lines = SHIPPED["demo:selection"].read_text(encoding="utf-8").splitlines(keepends=True)
    Path("selection.jsonl").write_text("".join(lines[:30]), encoding="utf-8")
    return cut_data


def ran(*settings, rounds=3, code=0):
    given = (STAGES, "data.selection=selection.jsonl", "gate={}", *settings)
    result = selfimprove(
        "iterate", "spin", "--rounds", str(rounds), "--run", "run", *QUICK, *(p for s in given for p in ("--set", s))
    )
    assert result.code == code, result.err
    return result


def told(iteration):
    return json.loads(Path(f"runs/run/iter-{iteration:03d}/5-gate/gate.json").read_text())


def manifest(iteration, stage):
    return json.loads(Path(f"runs/run/iter-{iteration:03d}/{stage}/manifest.json").read_text())


def deciding(monkeypatch, *decisions):
    """The gate's rule, replaced by decisions made up front; what it was asked is noted."""
    from selfimprove.evaluation import gate as rule

    real, asked, left = rule.decide, [], list(decisions)

    def decide(new, best, section, iteration, health, idle=0):
        asked.append((new, best, iteration, health, idle))
        return real(new, best, section, iteration, health, idle)._replace(decision=left.pop(0))

    monkeypatch.setattr(rule, "decide", decide)
    return asked


def policy(iteration):
    """The weights that a round's generation sampled from."""
    return manifest(iteration, "1-generate")["ingredients"]["models"]["current"]


def trained(iteration):
    return manifest(iteration, "4-evaluate")["ingredients"]["models"]["policy"]


BASE = "iter-000"


def test_the_next_round_starts_from_what_the_gate_says(gated, monkeypatch):
    asked = deciding(monkeypatch, "promote", "keep", "roll back", "keep")
    ran(rounds=4)
    assert [told(t)["best"] for t in (1, 2, 3, 4)] == [1, 1, 1, 1]
    assert [told(t)["goes_on_from"] for t in (1, 2, 3, 4)] == [1, 2, 1, 4]
    initial = manifest(0, "1-evaluate")["ingredients"]["models"]["policy"]
    assert [policy(t) for t in (1, 2, 3, 4)] == [initial, trained(1), trained(2), trained(1)]
    assert len({trained(t) for t in (1, 2, 3)}) == 3
    assert [iteration for _, _, iteration, _, _ in asked] == [1, 2, 3, 4]
    assert [idle for *_, idle in asked] == [0, 0, 1, 2]
    best = [best for _, best, *_ in asked]
    assert best[0] != best[1]
    assert best[1] == best[2] == best[3] == asked[0][0]  # round 1's own scores
    assert Path("runs/run/best").resolve().name == "iter-001"
    assert Path("runs/run/latest").resolve().name == "iter-004"


def test_it_sees_the_selection_split_alone(gated, monkeypatch):
    asked = deciding(monkeypatch, "keep")
    ran(rounds=1)
    rows = store.read_rows(Path("runs/run/iter-001/4-evaluate"), "samples", records.Sample)
    assert {row.split for row in rows} == {"report", "selection"}
    [(new, _, _, health, _)] = asked
    chosen = {row.prompt_id for row in rows if row.split == "selection"}
    assert len(chosen) == 30
    for metric in ("greedy", "sampled"):
        assert set(new[metric]) == chosen
    scores = json.loads(Path("runs/run/iter-001/4-evaluate/scores.json").read_text())
    assert scores["scores"]["greedy"]["n"] == 40
    assert scores["selection"]["scores"]["greedy"]["n"] == 30
    ours = [row for row in rows if (row.split, row.mode) == ("selection", "sampled")]
    base = [
        row
        for row in store.read_rows(Path("runs/run/iter-000/1-evaluate"), "samples", records.Sample)
        if (row.split, row.mode) == ("selection", "sampled")
    ]
    assert health["truncated_share"] == sum(row.finish_reason == "length" for row in ours) / len(ours)
    lengths = [sum(row.tokens for row in some) / len(some) for some in (ours, base)]
    assert health["length_ratio"] == pytest.approx(lengths[0] / lengths[1])
    assert all(row.tokens > 0 for row in rows)


def test_patience_ends_the_run_and_more_rounds_do_not_begin(gated, monkeypatch):
    deciding(monkeypatch, "keep", "keep", "promote")
    result = ran("gate.patience=2", rounds=4)
    assert not Path("runs/run/iter-003").exists()
    assert told(2)["stop"]
    assert "gate.patience ends here" in told(2)["reasons"][-1]
    assert json.loads(selfimprove("status", "run", "--json").out)["state"] == "done"
    again = ran("gate.patience=2", rounds=4)
    assert "nothing to do" in again.err
    assert Path("runs/run/best").resolve().name == BASE  # nothing was promoted
    assert result.code == 0


def test_a_longer_run_keeps_its_decisions(gated, monkeypatch):
    deciding(monkeypatch, "promote", "keep")
    ran(rounds=1)
    key = manifest(1, "5-gate")["key"]
    ran(rounds=2)
    assert manifest(1, "5-gate")["key"] == key
    planned = json.loads(selfimprove("plan", "run", "--json").out)
    assert {one["plan"] for one in planned} == {"done"}


def test_what_a_gate_looked_at_is_in_its_key(gated, monkeypatch):
    deciding(monkeypatch, "promote", "keep")
    ran(rounds=2)
    path = Path("runs/run/iter-001/5-gate/gate.json")
    changed = json.loads(path.read_text()) | {"goes_on_from": 0}
    path.write_text(json.dumps(changed, indent=1))
    planned = {(p["iteration"], p["stage"]): p["plan"] for p in json.loads(selfimprove("plan", "run", "--json").out)}
    assert planned[1, "5-gate"] == "stale"  # its file is not what its manifest says
    assert planned[2, "1-generate"] == "stale"


def test_a_real_decision_is_made_and_the_rest_of_a_stopped_run_resumes(gated):
    ran(rounds=1)
    first = told(1)
    assert first["decision"] in ("promote", "keep", "roll back")
    assert first["reasons"]
    shutil.rmtree("runs/run/iter-001/5-gate")
    assert selfimprove("resume", "run").code == 0
    assert told(1) == first


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["data.selection=selection.jsonl"], "go together"),
        ([STAGES, "gate={}"], "go together"),
        ([STAGES, "gate={}", "data.selection=heldout.jsonl"], "stand in data.heldout too"),
        ([STAGES, "gate={}", "data.selection=seeds.jsonl"], "stand in data.selection too"),
        ([STAGES, "gate={}", "data.selection=nowhere.jsonl"], "no file"),
        ([STAGES, "gate={metric='elo'}", "data.selection=selection.jsonl"], "gate.metric"),
        ([STAGES, "gate={}", "data.selection=selection.jsonl", "train.average=0.5"], "does not take a policy back"),
    ],
)
def test_what_cannot_work_is_refused(settings, says, gated):
    given = ["data.seeds=seeds.jsonl", "data.heldout=heldout.jsonl", *settings]
    result = selfimprove("check", "spin", *(part for s in given for part in ("--set", s)))
    assert result.code == 1
    assert says in result.err


def test_selection_prompts_without_ids_are_not_held_out_ones(tmp_path):
    from selfimprove.data import read_heldout

    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert not {r.prompt_id for r in read_heldout(path)} & {r.prompt_id for r in read_heldout(path, "selection")}
