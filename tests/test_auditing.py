"""A judge is asked about labelled pairs, or its recorded verdicts are read; the command prints what was found."""

import contextlib
import json
import re

import pytest

from selfimprove import auditing
from selfimprove.errors import UserError
from selfimprove.judges import labelled
from selfimprove.judges.labelled import LabelledPair
from selfimprove.judges.protocol import Replies
from selfimprove.recipe import Choice
from tests.conftest import selfimprove
from tests.paths import SHARED

LLMBAR = SHARED / "data" / "llmbar"
needs_data = pytest.mark.skipif(not LLMBAR.is_dir(), reason="the data with known answers is not beside the checkout")

PAIRS = [
    LabelledPair("s", 0, "p0", "good", "bad one", "first"),
    LabelledPair("s", 1, "p1", "bad", "good one", "second"),
    LabelledPair("s", 2, "p2", "bad", "bad as well", "tie"),
    LabelledPair("s", 3, "p3", "good", "good and long", None),
]


class Panel:
    """Models whose reply is a function of the question."""

    opinions = {}  # noqa: RUF012

    def __init__(self, reply):
        self.reply = reply
        self.asked = []

    def nonce(self, name):
        return "n0nce"

    def ask(self, model, questions, n, temperature, max_tokens, schema=None):
        self.asked += [question.text for question in questions]
        return [Replies((self.reply(question.text),) * n) for question in questions]


def answers(text):
    """What a question shows between its marks."""
    return re.findall(r"<answer.*? n0nce>\n(.*)\n</answer", text)


def fair(text):
    """[[A]], [[B]] or [[C]] by which of the two answers is good."""
    first, second = ("good" in answer for answer in answers(text))
    return "[[C]]" if first == second else "[[A]]" if first else "[[B]]"


def rates(text):
    """90 for a good answer."""
    [answer] = answers(text)
    return "Score: 90" if "good" in answer else "Score: 10"


def test_a_judge_that_compares_is_asked_in_both_orders():
    panel = Panel(fair)
    found = auditing.audit_pairs(PAIRS, Choice(name="pairwise"), panel)
    assert len(panel.asked) == 8
    assert found.scores is None
    assert found.reasons == {}
    told = found.pairs
    assert (told.n, told.labelled, told.unreadable_verdicts) == (4, 3, 0)
    assert (told.forward.accuracy.value, told.swapped.accuracy.value, told.consistent.value) == (1, 1, 1)
    assert (told.first_position.value, told.ties.value) == (0.5, 0.5)
    assert told.prefers_longer.value == 0.5  # of the two that it decides, one is longer


def test_a_judge_that_takes_the_first_shown_is_found_out():
    told = auditing.audit_pairs(PAIRS, Choice(name="pairwise"), Panel(lambda text: "[[A]]")).pairs
    assert (told.first_position.value, told.flipped.value, told.combined.confusion["first"]["tie"]) == (1, 1, 1)


def test_a_reply_that_cannot_be_read_is_counted_with_its_reason():
    found = auditing.audit_pairs(PAIRS, Choice(name="pairwise"), Panel(lambda text: "I like both."))
    assert found.pairs.unreadable_verdicts == 8
    assert found.pairs.ties is None
    assert found.reasons == {"reply not readable": 4}


def test_a_judge_of_single_answers_rates_each_once_and_equal_scores_are_a_tie():
    panel = Panel(rates)
    found = auditing.audit_pairs(PAIRS, Choice(name="rubric"), panel)
    assert len(panel.asked) == 8
    assert found.pairs.forward.accuracy.value == 1
    assert (found.pairs.swapped, found.pairs.consistent, found.pairs.first_position) == (None, None, None)
    assert (found.scores.n, found.scores.mean, found.scores.ties.value) == (8, 50, 0.5)
    assert found.scores.length_within.spearman is not None


def test_a_score_that_is_unknown_gives_no_preference():
    panel = Panel(lambda text: "hm" if "bad" in answers(text)[0] else "Score: 90")
    found = auditing.audit_pairs(PAIRS, Choice(name="rubric"), panel)
    assert found.pairs.unreadable.value == 0.75
    assert found.reasons == {"no reply readable": 4}
    assert found.scores.unknown.value == 0.5


def test_a_judge_that_looks_at_token_ids_gets_them_or_is_refused():
    found = auditing.audit_pairs(PAIRS, Choice(name="length"), Panel(fair), lambda text: list(text.encode()))
    assert (found.pairs.prefers_longer.value, found.scores.length.pearson) == (1, pytest.approx(1))
    for choice in (Choice(name="length"), Choice(name="ensemble", judges=[{"name": "length"}])):
        with pytest.raises(UserError, match="looks at token ids"):
            auditing.audit_pairs(PAIRS, choice, Panel(fair))


def verdict(number, **change):
    given = {
        "subset": "s", "judge": "j", "strategy": "t", "number": number, "human": PAIRS[number].human, "forward": 1.0,
        "swapped": 1.0, "both_orders": True, "where": f"v, line {number + 1}",
    }  # fmt: skip
    return labelled.RecordedVerdict(**(given | change))


ALL = [verdict(number) for number in range(4)]


def test_recorded_verdicts_are_grouped():
    other = [v._replace(strategy="u", forward=None) for v in reversed(ALL)]
    found = auditing.audit_recorded({"s": PAIRS}, [*ALL, *other, verdict(0, subset="elsewhere")])
    assert [(g.strategy, g.pairs.unreadable_verdicts) for g in found.groups] == [("t", 0), ("u", 4)]
    assert found.left_out == ["elsewhere"]
    [only] = auditing.audit_recorded({"s": PAIRS}, [*ALL, *other], "u").groups
    assert only == found.groups[1]


@pytest.mark.parametrize(
    ("verdicts", "strategy", "says"),
    [
        (ALL[:3], None, "s/j/t: 3 verdicts on 4 pairs, the first without one is 3"),
        ([*ALL, ALL[0]], None, "a second verdict on pair 0, after v, line 1"),
        ([ALL[0]._replace(number=4)], None, "v, line 1: a verdict on pair 4 of 4"),
        ([verdict(0, human="second")], None, "v, line 1: the label says second, that of the data says first"),
        (ALL, "x", "no verdict of the strategy 'x'"),
        ([verdict(0, subset="r")], None, "no verdict is on s: the file is on r"),
    ],
)
def test_verdicts_that_do_not_fit_the_pairs(verdicts, strategy, says):
    with pytest.raises(UserError) as told:
        auditing.audit_recorded({"s": PAIRS}, verdicts, strategy)
    assert says in told.value.message
    assert told.value.hint


def test_verdicts_that_name_no_subset_need_one_file_of_pairs():
    verdicts = [v._replace(subset="", human=None) for v in ALL]
    [group] = auditing.audit_recorded({"s": PAIRS}, verdicts).groups
    assert group.subset == "s"
    with pytest.raises(UserError, match="name no subset, but 2 files"):
        auditing.audit_recorded({"s": PAIRS, "r": PAIRS}, verdicts)
    with pytest.raises(UserError, match="two files of pairs are called s"):
        auditing.by_subset([PAIRS, PAIRS])


@pytest.mark.usefixtures("in_tmp")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["default"], "audit needs --data"),
        (["--data", "d"], "audit needs a recipe or --verdicts"),
        (["default", "--data", "d", "--verdicts", "v"], "a recipe and --verdicts do not go together"),
        (["default", "--data", "d", "--strategy", "x"], "--strategy goes with --verdicts"),
        (["default", "--data", "d", "--data", "e"], "several --data go with --verdicts"),
        (["--data", "d", "--verdicts", "v", "--limit", "3"], "--limit goes with a recipe"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, says):
    told = selfimprove("audit", *arguments)
    assert (told.code, told.out) == (2, "")
    assert says in told.err
    assert "hint: " in told.err


def test_a_recipe_without_a_judge_has_nothing_to_audit(in_tmp):
    (in_tmp / "d.jsonl").write_text(json.dumps({"prompt": "p", "answer_a": "a", "answer_b": "b", "label": "a"}))
    told = selfimprove("audit", "spin", "--data", "d.jsonl")
    assert (told.code, told.out) == (1, "")
    assert "has no label.judge" in told.err


@pytest.fixture
def my_pairs(in_tmp, monkeypatch):
    """A file of pairs, and a recipe whose judge is asked through a panel made up front."""
    letters = {"first": "a", "second": "b", "tie": "tie", None: None}
    rows = [{"prompt": p.prompt, "answer_a": p.first, "answer_b": p.second, "label": letters[p.human]} for p in PAIRS]
    path = in_tmp / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    panel = Panel(rates)
    monkeypatch.setattr(
        auditing,
        "open_panel",
        lambda recipe, progress: contextlib.nullcontext((panel, lambda text: list(text.encode()))),
    )
    monkeypatch.setattr(auditing, "label_judge", lambda recipe: Choice(name="rubric"))
    return panel


def test_the_command_asks_the_judge_of_a_recipe(my_pairs):
    told = selfimprove("audit", "default", "--data", "pairs.jsonl", "--json")
    assert told.code == 0, told.err
    found = json.loads(told.out)
    assert (found["judge"], found["pairs"]["n"], found["pairs"]["forward"]["accuracy"]["value"]) == ("rubric", 4, 1)
    assert found["scores"]["mean"] == 50
    printed = selfimprove("audit", "default", "--data", "pairs.jsonl", "--limit", "2")
    assert printed.code == 0, printed.err
    assert "rubric: 2 pairs, 2 labelled by people" in printed.out
    assert re.search(r"right +1\.000 +\[\.342, 1\.000\] +2", printed.out)
    assert len(my_pairs.asked) == 8 + 4


@needs_data
def test_the_command_reads_recorded_verdicts():
    data = ["--data", str(LLMBAR / "dataset/Natural.json")]
    told = selfimprove("audit", *data, "--verdicts", str(LLMBAR / "public/verdicts.jsonl.gz"), "--strategy", "Vanilla")
    assert told.code == 0, told.err
    assert re.search(r"Natural/ChatGPT/Vanilla +100 +\.800 +\.830 +\.670", told.out)
    assert told.out.count("Natural/") == 3
    assert max(map(len, told.out.splitlines())) <= 80
    assert told.err == "left out, no --data given: Neighbor, GPTInst, GPTOut, Manual\n"


def test_names_from_a_file_are_no_markup(in_tmp):
    (in_tmp / "s.jsonl").write_text(json.dumps({"prompt": "p", "answer_a": "a", "answer_b": "b", "label": "a"}))
    row = {"subset": "s", "judge": "[/x]", "strategy": "[red]", "index": 0, "label": "1"}
    (in_tmp / "v.jsonl").write_text(json.dumps(row | {"fwd_winner": "1", "swp_winner": "1"}))
    told = selfimprove("audit", "--data", "s.jsonl", "--verdicts", "v.jsonl")
    assert told.code == 0, told.err
    assert "s/[/x]/[red]" in told.out
