"""What a run says while it goes on."""

import io
import re
from types import SimpleNamespace

from rich.console import Console

from selfimprove import recipe_file, store
from selfimprove.report import terminal
from selfimprove.status import summary


def test_a_resumed_stage_tells_its_own_speed_and_what_it_has_cost(monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock.now)
    out = io.StringIO()
    with terminal.Watcher(Console(file=out, width=200)) as watcher:
        watcher.started(SimpleNamespace(iteration=1, name="label"), 3, 5)
        watcher.progress("judging ($0.10)", 100, 200)  # an earlier process asked these
        clock.now += 20
        watcher.progress("judging ($0.14)", 140, 200)
    assert "judging ($0.14): 140/200 2/s, 30 s left" in out.getvalue()


def test_a_count_whose_cost_grows_is_one_bar(monkeypatch):
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=True)
    with terminal.Watcher(console) as watcher:
        watcher.started(SimpleNamespace(iteration=1, name="label"), 3, 5)
        for cent in range(5):
            watcher.progress(f"judging ($0.0{cent})", cent, 5)
        watcher._bars.refresh()
        last = out.getvalue().rsplit("\n", 1)[-1]
        assert "judging ($0.04)" in last
        assert "$0.03" not in last
        assert len(watcher._bars.tasks) == 1


def test_a_narrow_terminal_breaks_scores_and_cuts_none(fake_run):
    run = store.Run(fake_run)
    told = summary(run, recipe_file.load(run.recipe_file))
    wide, narrow = io.StringIO(), io.StringIO()
    for out, width in ((wide, 200), (narrow, 40)):
        console = Console(file=out, width=width)
        console.print(terminal.evaluations(told))
    for number in re.findall(r"\.\d{3}", wide.getvalue()):
        assert number in narrow.getvalue()
    Console(file=narrow, width=40).print(terminal.stages_table(told))
    assert "…" not in narrow.getvalue()


def test_a_difference_that_is_rounding_noise_has_no_sign_of_a_loss():
    assert terminal.change({"base": {"greedy": {"difference": -1.4e-18, "p": 1.0}}}, "base", "greedy") == "+.000 p=1"
    assert terminal.change({"base": {"greedy": {"difference": -0.021, "p": 0.034}}}, "base", "greedy") == "-.021 p=.034"
