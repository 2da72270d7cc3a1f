"""Judging answers while others are being written: the same artifacts, nothing asked twice, however the writer ends."""

import contextlib
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from selfimprove import judges, recipe, recipe_file, run
from selfimprove.errors import UserError
from selfimprove.execution import shard
from selfimprove.plan import find_step, steps
from selfimprove.records import Generation
from selfimprove.stages import ahead, answers, judging
from tests.conftest import QUICK, selfimprove
from tests.judges.misbehaving import Server

HELD = 90  # answers after which the writer waits until the judge has been asked
RUBRIC = {"name": "rubric", "template": "demo", "max_tokens": 8}
ARMS = {
    "default": ["iterate", "default", "--set", "generate.n=4", "--set", "label.pairing={name='best_vs_worst'}"],
    "synpo": ["iterate", "synpo", "--set", "improve.n=4", "--set", "label.quota=30"],
}


@pytest.fixture
def server():
    with Server(lambda handler, asked, number: handler.answer(asked, message={"content": mark(asked)})) as server:
        yield server


@pytest.fixture
def small(monkeypatch, cut_data):
    """A few answers make a window, and fewer a file."""
    monkeypatch.setattr(answers, "SOONER", 32)
    monkeypatch.setattr(ahead, "ROWS", 8)
    monkeypatch.setattr(shard, "SMALLEST", 8)


@pytest.fixture
def puts(monkeypatch):
    """What is done after so many answers have been handed over."""
    after, put = {}, ahead.Ahead.put
    count = Counter()

    def counted(self, row):
        put(self, row)
        count[self] += 1
        if count[self] in after:
            after[count[self]]()

    monkeypatch.setattr(ahead.Ahead, "put", counted)
    return after


def mark(asked):
    return f"Score: {sum(asked.text.encode()) % 6}"


def table(values):
    return "{" + ", ".join(f"{key}={value!r}" for key, value in values.items()) + "}"


def command(arm, name, server, judge=RUBRIC, price=0.0):
    served = {"url": server.url, "model": "m", "attempts": 1, "output_price": price}
    return [
        *ARMS[arm], "--rounds", "1", "--run", name, *QUICK, "--set", "synthesize.prompts=60",
        "--set", f"servers.s={table(served)}", "--set", f"label.judge={table({**judge, 'model': 'server:s'})}",
    ]  # fmt: skip


def made(name):
    """The hash of every file that says nothing of time or place, by its path."""
    table = {}
    for path in sorted(Path("runs", name).glob("iter-*/*/manifest.json")):
        manifest = msgspec.json.decode(path.read_bytes())
        told = {o["path"]: o["sha256"] for o in manifest["outputs"] if not o["path"].endswith("metrics.jsonl")}
        metrics = manifest["metrics"]
        costs = {k: v for k, v in metrics.get("servers", {}).get("s", {}).items() if k != "cached"}
        table[path.parent.name] = (manifest["key"], told, manifest["rows"], costs, metrics.get("mean score"))
    return table


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def asked_after_all(monkeypatch):
    """The way without it: the stage label asks when all is written."""
    monkeypatch.setattr(run, "can_begin", lambda writing, label: False)


PAIRWISE = {"name": "pairwise", "max_tokens": 8}


@pytest.mark.parametrize(("arm", "judge"), [("default", RUBRIC), ("synpo", RUBRIC), ("default", PAIRWISE)])
def test_the_judge_begins_before_the_last_answer_and_finds_the_same(arm, judge, small, puts, server, monkeypatch):
    held = []

    def hold():
        until(lambda: server.asked)
        held.append(len(server.asked))

    puts[HELD] = hold
    if judge == PAIRWISE:
        server.behave = lambda handler, asked, number: handler.answer(
            asked, message={"content": "[[A]]" if sum(asked.text.encode()) % 2 else "[[B]]"}
        )
    first = selfimprove(*command(arm, "ahead", server, judge))
    assert first.code == 0, first.err
    assert held, "nothing was judged before the last answer"
    asked = set(server.answered)
    assert max(server.answered.values()) == 1
    asked_after_all(monkeypatch)
    second = selfimprove(*command(arm, "after", server, judge))
    assert second.code == 0, second.err
    assert made("ahead") == made("after")
    assert set(server.answered) == asked
    assert set(server.answered.values()) == {2}
    assert not Path("runs/ahead/scratch").exists()


class Failed(Exception):
    pass


@pytest.mark.parametrize("error", [UserError("the engine is gone", "mend it"), KeyboardInterrupt(), Failed()])
def test_a_writer_that_fails_leaves_what_was_judged(error, small, puts, server, monkeypatch):
    def fail():
        until(lambda: server.asked)
        raise error

    puts[HELD] = fail
    if isinstance(error, Failed):
        with pytest.raises(Failed):
            selfimprove(*command("default", "r", server, price=10.0))
    else:
        assert selfimprove(*command("default", "r", server, price=10.0)).code != 0
    assert server.busy == 0, "what was under way was not awaited"
    judged = sum(server.answered.values())
    assert judged
    puts.clear()
    again = selfimprove("resume", "r")
    assert again.code == 0, again.err
    assert max(server.answered.values()) == 1
    assert sum(server.answered.values()) > judged
    asked_after_all(monkeypatch)
    assert selfimprove(*command("default", "after", server, price=10.0)).code == 0
    found, expected = made("r"), made("after")
    usd = []
    for each in (found, expected):
        *others, costs, score = each["3-label"]
        usd.append(costs["usd"])
        each["3-label"] = (*others, score)
    assert found == expected
    assert usd[0] == pytest.approx(usd[1])
    assert usd[0] > 0


def test_what_the_judge_meets_is_said_by_label_when_all_is_written(small, puts, server):
    def behave(handler, asked, number):
        if sum(server.answered.values()) >= 5:
            handler.say(500, "down")
        else:
            handler.answer(asked, message={"content": mark(asked)})

    server.behave = behave
    puts[HELD] = lambda: until(lambda: server.asked)
    first = selfimprove(*command("default", "r", server))
    assert first.code == 1
    assert "server 's' gave no answer" in first.err
    assert Path("runs/r/iter-001/2-generate/manifest.json").exists()
    assert not Path("runs/r/iter-001/3-label").exists()
    server.behave = lambda handler, asked, number: handler.answer(asked, message={"content": mark(asked)})
    assert selfimprove("resume", "r").code == 0
    assert max(server.answered.values()) == 1


def test_a_disk_that_is_full_for_waiting_answers_does_not_stop_the_writer(small, puts, server, monkeypatch):
    import pyarrow.parquet as pq

    write = pq.write_table

    def full(table, path, *rest, **more):
        if "arriving" in str(path):
            raise OSError(28, "No space left on device")
        return write(table, path, *rest, **more)

    monkeypatch.setattr(pq, "write_table", full)
    found = selfimprove(*command("default", "r", server))
    assert found.code == 0, found.err
    assert max(server.answered.values()) == 1


def test_an_interrupt_while_label_waits_ends_the_run_and_loses_nothing(small, puts, server, monkeypatch):
    finish = ahead.Ahead.finish

    def interrupted(self, io):
        until(lambda: server.asked)
        raise KeyboardInterrupt

    monkeypatch.setattr(ahead.Ahead, "finish", interrupted)
    assert selfimprove(*command("default", "r", server)).code == 130
    monkeypatch.setattr(ahead.Ahead, "finish", finish)
    assert selfimprove("resume", "r").code == 0
    assert max(server.answered.values()) == 1


def test_a_process_that_begins_with_generate_imports_nothing_twice_at_once(small, server):
    """In a process of its own: here all is imported already."""
    assert selfimprove(*command("default", "r", server), "--until", "1/synthesize").code == 0
    said = subprocess.run(
        [sys.executable, "-m", "selfimprove", "resume", "r"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    assert "Traceback" not in said.stderr
    assert max(server.answered.values()) == 1


def test_a_second_wish_to_stop_is_not_deaf_to_what_is_under_way(small, puts, server):
    """What was asked and not answered is booked, since it may have to be paid."""
    server.behave = lambda handler, asked, number: time.sleep(60)

    def insist():
        until(lambda: server.busy == 16)
        raise KeyboardInterrupt

    puts[HELD] = insist
    stop = ahead.Stop

    class Impatient(stop):
        def due(self):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "Stop", Impatient)
        assert selfimprove(*command("default", "r", server, price=1000.0)).code == 130
    with contextlib.closing(sqlite3.connect("runs/r/cache/servers.sqlite")) as journal:
        [(paid,)] = journal.execute("SELECT sum(usd) FROM accounts").fetchall()
    assert paid >= 16 * 8 * 1000 / 1e6  # the most that the answers may have cost


def test_a_writer_whose_artifact_is_another_run_s_begins_no_judge(tmp_path):
    io = SimpleNamespace(scratch=tmp_path / "scratch", logs=tmp_path, progress=None)
    early = ahead.Ahead(io, recipe.Label(pairing={"name": "best_vs_worst"}))
    early.finish(SimpleNamespace(progress=None))
    early.stop()
    assert list(tmp_path.iterdir()) == []


def begins(name, *settings):
    chosen = recipe_file.load(recipe_file.find(name), list(settings))
    every = list(steps(chosen))
    step = find_step(chosen, "1/label")
    before = every[[one.directory for one in every].index(step.directory) - 1]
    return ahead.can_begin(before.section, step.section)


SERVED = "servers.s={url='http://127.0.0.1:1/v1', model='m'}"


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("default", [], False),  # a checker that is done at once
        ("default", ["label.judge={name='rubric', template='demo'}"], False),  # the policy itself
        ("default", ["label.judge={name='rubric', model='server:s'}", SERVED], True),
        ("default", ["label.judge={name='pairwise', model='server:s'}", SERVED], True),
        ("default", ["label.judge={name='verifier', checker='unit_tests'}"], True),
        ("default", ["label.judge={name='rubric', model='server:s'}", SERVED, "generate.initial_n=1"], False),
        (
            "default",  # a user's function may count on the main thread
            [
                SERVED,
                "label.judge={name='ensemble', judges=[{name='rubric', model='server:s'},"
                " {name='verifier', checker='python', function='os.path:samefile'}]}",
            ],
            False,
        ),
        ("synpo", ["label.judge={name='rubric', model='server:s'}", SERVED], True),
        (
            "default",
            [
                SERVED,
                "label.judge={name='ensemble', judges=[{name='rubric', model='server:s'}, {name='logps'}]}",
            ],
            False,
        ),
    ],
)
def test_only_a_judge_that_needs_no_device_of_the_run_begins_before(name, settings, expected):
    assert begins(name, *settings) == expected


def test_kept_findings_are_read_and_damaged_ones_asked_for_again(tmp_path, monkeypatch):
    asked = []

    def judge(candidates, panel):
        asked.append(len(candidates))
        return [judges.Opinion(float(len(c.text)), "long", "words") for c in candidates]

    monkeypatch.setattr(judges, "bind", lambda choice: judge)
    io = SimpleNamespace(scratch=tmp_path, inputs={}, judging=SimpleNamespace(), progress=None)
    some = [judges.Candidate("p", "say", "current", k, "x" * k, [1], "stop", None) for k in range(3)]
    bench = judging.Judging(io, recipe.Choice(name="verifier", checker="unit_tests"), lambda: 5)
    found = bench.find(some)
    assert bench.find(some) == found
    assert asked == [3]
    assert bench.find(some[:2]).opinions == found.opinions[:2]
    assert asked == [3, 2]
    for path in tmp_path.glob("judged/*.done"):
        path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    assert bench.find(some) == found
    assert asked == [3, 2, 3]


def test_progress_is_that_of_all_windows(monkeypatch, tmp_path):
    told = []
    io = SimpleNamespace(
        scratch=tmp_path, inputs={}, judging=SimpleNamespace(), progress=lambda *what: told.append(what)
    )

    def judge(candidates, panel):
        for done in range(0, 11, 5):
            panel.progress("judging ($0.10)", done, 10)  # questions, which may be more than answers
        return [judges.Opinion(1.0)] * len(candidates)

    monkeypatch.setattr(judges, "bind", lambda choice: judge)
    bench = judging.Judging(io, recipe.Choice(name="length"), lambda: 7)
    some = [judges.Candidate("p", "say", "current", k, "x", [1], "stop", None) for k in range(4)]
    for window in (some, some):
        bench.find(window)
    io.judging.progress("again", 1, 2)
    costs = "judging ($0.10)"
    assert told == [
        (costs, 0, 7), (costs, 2, 7), (costs, 4, 7), (costs, 4, 8), (costs, 6, 8), (costs, 8, 8), ("again", 1, 2)
    ]  # fmt: skip


def test_rows_in_another_order_are_left_to_label(tmp_path):
    rows = [Generation(p, "q", "current", 0, "a", [1], [2], [-1.0], "stop", "m", 0) for p in ("a", "b")]
    found = answers.Answers([], {}, None, lambda prompt, completion: [1], 8)
    assert [w.candidates[0].prompt_id for w in found.windows(iter(rows))] == ["a"]
    two = answers.Answers([], {}, None, lambda prompt, completion: [1], 8)
    two._streams = [Fixed(rows)]
    with pytest.raises(answers.OtherOrder):
        list(two.windows(iter(rows[::-1])))


class Fixed:
    def __init__(self, rows):
        self.rows = rows

    def groups(self):
        return iter([(row.prompt_id, [row]) for row in self.rows])
