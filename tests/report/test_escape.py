"""Text that a model wrote is shown, never obeyed: properties over any text, and the terminal itself."""

import io
import json
import unicodedata
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from selfimprove.report import audit, escape, planning, terminal
from selfimprove.report.escape import as_json, line, markup, visible
from tests.conftest import selfimprove
from tests.report.hostile import CODES, HUGE, MARKUP

ANY = st.text(st.characters(codec=None, exclude_categories=()))  # surrogates and everything else


def controls(text: str, keep: str = "") -> set[str]:
    """What a terminal, a browser or an eye could be misled by, by Unicode's own categories."""
    acting = {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"}
    return {c for c in text if unicodedata.category(c) in acting} - set(keep) - {"\u200c", "\u200d"}


class Text(HTMLParser):
    """The text and the tags of a page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.signs = 0

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.signs += ("class", "sign") in attrs

    def handle_data(self, data):
        self.text += data


@given(ANY)
def test_no_control_character_is_left(text):
    assert controls(line(text)) == set()
    assert controls(visible(text), "\n\t") == set()
    assert controls(str(markup(text)), "\n\t") == set()
    line(text).encode()  # surrogates are gone too


@given(ANY)
def test_html_says_the_same_text_and_marks_each_sign(text):
    parsed = Text()
    parsed.feed(str(markup(text)))
    parsed.close()
    assert parsed.text == visible(text)
    assert {tag for tag, _ in parsed.tags} <= {"span"}
    assert parsed.signs == sum(bool(controls(c, "\n\t")) for c in text)


@given(st.recursive(ANY | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(ANY, inner)))
def test_json_means_the_same_and_acts_on_no_terminal(value):
    text = as_json(value)
    assert json.loads(text) == value
    assert controls(text, "\n") == set()


def test_signs_have_names():
    assert line("\x1b\x00\x7f\u202e\U000e0041\ud800") == "‹ESC›‹NUL›‹DEL›‹RLO›‹U+E0041›‹U+D800›"
    assert escape.C0[0x1B] == "ESC"
    assert len(escape.C0) == 32


def test_a_long_text_tells_what_is_left_out():
    assert line("x" * 5_000, 1_000) == "x" * 1_000 + " … (4,000 more characters)"
    assert line("x" * 1_000, 1_000) == "x" * 1_000


def test_joiners_stay_where_scripts_need_them():
    assert line("نمی\u200cخواهم 👩\u200d🚀") == "نمی\u200cخواهم 👩\u200d🚀"


# --- the terminal ------------------------------------------------------------------------------------------------


def printed(*tables) -> str:
    """What a terminal with colours would be sent."""
    console = Console(file=io.StringIO(), force_terminal=True, width=400, color_system="truecolor")
    for table in tables:
        console.print(table)
    return console.file.getvalue()


def codes_of_rich(text: str) -> str:
    """The text without the codes that rich itself sends: colours and weights."""
    import re

    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("text", [MARKUP, CODES])
def test_tables_show_markup_and_codes(text):
    from selfimprove.auditing import Group
    from selfimprove.judges.audit import audit as audited
    from selfimprove.plan import Examined

    summary = {
        "run": text, "recipe": text, "state": "failed", "sft": None, "control": None, "iterations": [],
        "base": {"iteration": 0, "scores": {}, "stages": []},
    }  # fmt: skip
    step = type("Step", (), {"iteration": 1, "name": "1-generate", "directory": "iter-001/1-generate"})()
    group = Group(text, text, text, audited([]))
    shown = codes_of_rich(
        printed(
            terminal.iterations_table(summary),
            *planning.reasons([Examined(step, "stale", text, None, None)]),
            audit.groups_table([group]),
        )
    )
    assert controls(shown, "\n") == set()
    folded = "".join(shown.split())
    assert ("[bold]markup[/]" if text is MARKUP else "‹ESC›[31mred") in folded


@pytest.mark.parametrize("terminal_like", [True, False])
def test_what_a_person_sees_while_a_run_goes_on_is_text_too(terminal_like, monkeypatch):
    from selfimprove.store import Manifest, Rows
    from selfimprove.study import Ended

    console = Console(file=io.StringIO(), force_terminal=terminal_like, width=4_000)
    step = type("Step", (), {"iteration": 1, "name": "1-generate", "directory": "iter-001/1-generate"})()
    rows = Rows(unit="row", rows_in=2, rows_out=0, quarantined={MARKUP: 1, CODES: 1})
    manifest = Manifest(
        iteration=1, stage="1-generate", key="", ingredients={}, outputs=[], rows=rows, metrics={}, environment={},
        seconds=1.0, tokens=0, finished="",
    )  # fmt: skip
    clock = iter(range(0, 1_000, 20))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: float(next(clock)))
    watcher = terminal.Watcher(console)
    watcher.started(step, 1, 2)
    for done in (1, 2, 3):
        watcher.progress(f"asking {CODES}{MARKUP}", done, 9)
    watcher.finished(step, manifest, None)
    study = terminal.StudyWatcher(console, 2)
    one = type("Planned", (), {"name": "one"})()
    study.started(one)
    study.ended(one, Ended("failed", 1.0, error=MARKUP + CODES))
    shown = codes_of_rich(console.file.getvalue())
    assert controls(shown, "\n") == set()
    assert shown.count("[bold]markup[/]") == (2 if terminal_like else 4)  # a bar is drawn elsewhere


def test_inspect_shows_a_poisoned_run_as_text(poisoned, monkeypatch):
    monkeypatch.chdir(poisoned.parent.parent)
    shown = selfimprove("inspect", "four", "1", "--sample", "30").out
    assert controls(shown, "\n") == set()
    assert "[bold]markup[/]" in shown
    assert "‹ESC›[31mred" in shown
    assert f"({len(HUGE) - escape.LONGEST:,} more characters)" in shown
    as_data = selfimprove("inspect", "four", "1", "--sample", "30", "--json").out
    assert controls(as_data, "\n") == set()
    rows = [row for stage in json.loads(as_data)["stages"] for row in stage["samples"].get("generations", [])]
    assert any(CODES in row["text"] for row in rows)


def test_status_and_plan_show_a_poisoned_run_as_text(poisoned, monkeypatch):
    monkeypatch.chdir(poisoned.parent.parent)
    for command in ("status", "plan"):
        assert controls(selfimprove(command, "four").out, "\n") == set()
