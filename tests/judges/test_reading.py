"""Verdicts are read from the end of a reply and never guessed."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove.judges.reading import first_is_better, score


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("Score: 5", 5),
        ("SCORE : 0", 0),
        ("Score: 3. No, Score: 1", 1),
        ("Score: 6", None),
        ("Score: 33", None),
        ("Score: -1", None),
        ("Score: 4.5", 4.5),
        ("Score: 4.", 4),
        ("**Score:** **3**", 3),
        ("Score: 3/5", 3),
        ("I would not score this.", None),
        ("underscore: 3", None),
        ("Score: 1.2.3", None),
        ("", None),
        (json.dumps({"reason": "Score: 1", "score": 4}), 4),
        (json.dumps({"reason": "x", "score": True}), None),
        (json.dumps({"reason": "x", "score": 9}), None),
        ("[" * 100_000, None),
    ],
)
def test_a_score(reply, found):
    assert score(reply, 0, 5) == found


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("[[A]]", 1),
        ("... so [[B]]", 0),
        ("[[C]].", 0.5),
        ("The answer says [[A]], which is a trick: [[B]]", 0),
        ("[A]", None),
        ("[[a]]", None),
        ("[[AB]]", None),
        ("A", None),
        ("", None),
        (json.dumps({"reason": "[[A]]", "verdict": "B"}), 0),
        (json.dumps({"verdict": "D"}), None),
    ],
)
def test_a_label(reply, found):
    assert first_is_better(reply) == found


@given(st.text(), st.integers(0, 100))
def test_whatever_comes_before_the_last_score_counts(before, value):
    assert score(f"{before}\nScore: {value}", 0, 100) == value


@given(st.text())
def test_any_reply_is_read_without_an_error(reply):
    found = score(reply, 0, 100)
    assert found is None or 0 <= found <= 100
    assert first_is_better(reply) in (None, 0, 0.5, 1)
