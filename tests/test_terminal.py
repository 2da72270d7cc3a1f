"""What a run says while it goes on."""

import io
from types import SimpleNamespace

from rich.console import Console

from selfimprove.report import terminal


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
