"""Verdicts are read from the end of a reply and never guessed; real judges' replies as those who published them did."""

import gzip
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove import brackets
from selfimprove.judges import reading
from selfimprove.judges.reading import first_is_better, score
from tests.paths import SHARED

DATA = SHARED / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the data with known answers is not beside the checkout")


def rows(name):
    with gzip.open(DATA / name, "rt") as file:
        return [json.loads(line) for line in file]


@needs_data
class TestRealReplies:
    def test_mt_bench_as_fastchat_reads_it(self):
        expected = json.loads((DATA / "mt_bench/granite-7b-lab_expected.json").read_text())
        turns: dict[int, list[float]] = {1: [], 2: []}
        invalid = 0
        for row in rows("mt_bench/granite-7b-lab_gpt-4_single.jsonl.gz"):
            score = brackets.bracketed_rating(row["judgment"], 0, 10, which="first", single=True)
            assert (-1 if score is None else score) == row["score"]
            if score is None:
                invalid += 1
            else:
                turns[row["turn"]].append(score)
        assert [len(scores) for scores in turns.values()] == expected["n"]
        assert np.mean(turns[1]) == pytest.approx(expected["first_turn"], abs=1e-12)
        assert np.mean(turns[2]) == pytest.approx(expected["second_turn"], abs=1e-12)
        assert np.mean(turns[1] + turns[2]) == pytest.approx(expected["average"], abs=1e-12)
        assert invalid == expected["n_invalid"]

    def test_mt_bench_as_we_read_it(self):
        """No rating out of `array[0]` or `[5]`, and the last of several: three of the judge's replies change theirs."""
        judged = rows("mt_bench/granite-7b-lab_gpt-4_single.jsonl.gz")
        found = [(row["score"], brackets.bracketed_rating(row["judgment"])) for row in judged]
        assert sum(score is not None for _, score in found) == 37
        assert [two for two in found if two[1] not in (None, two[0])] == [(9, 10), (9, 10), (8, 10)]

    def test_every_row_of_arena_bench(self):
        expected = json.loads((DATA / "arena_bench_v1/public/expected_scores.json").read_text())
        judged = rows("arena_bench_v1/public/judgments.jsonl.gz")
        assert len(judged) == 2400
        scores: dict[str, list[float | None]] = {}
        for row in judged:
            score = brackets.bracketed_rating(row["judgment"], whole=True)
            assert score == row["score"]
            scores.setdefault(row["model"], []).append(score)
        assert set(scores) == set(expected)
        for model, of in scores.items():
            known = [score for score in of if score is not None]
            told = {
                "n": len(of),
                "n_valid": len(known),
                "mean": np.mean(known),
                "sem": np.std(known, ddof=1) / len(known) ** 0.5,
            }
            assert told == pytest.approx(expected[model], abs=1e-12)
        ours = [brackets.bracketed_rating(row["judgment"]) for row in judged if row["score"] is None]
        assert sorted(score for score in ours if score is not None) == [7.5, 9.5, 9.5]

    def test_llmbar_where_the_whole_reply_is_known(self):
        """Upstream looks for (a) before (b) anywhere; of two statements we take the last: one reply differs."""
        first_shown = {"fwd": {"1": 1.0, "2": 0.0, None: None}, "swp": {"1": 0.0, "2": 1.0, None: None}}
        whole = [
            (row[f"{order}_text"], first_shown[order][row[f"{order}_winner"]])
            for row in rows("llmbar/public/verdicts.jsonl.gz")
            for order in ("fwd", "swp")
            if len(row.get(f"{order}_text", "." * 400)) < 400  # of longer ones only the end was kept
        ]
        differing = [text for text, first in whole if reading.output_label(text) != first]
        assert len(whole) == 3081
        assert len(differing) == 1
        assert differing[0].startswith("Output (a) is better.")
        assert "Output (b) is better in terms of helpfulness" in differing[0]


@pytest.mark.parametrize(
    ("reply", "ours", "fastchat"),
    [
        ("Rating: [[7]]", 7, 7),
        ("[[7.5]]", 7.5, 7.5),
        ("It says [[10]]. Rating: [[2]]", 2, 10),
        ("[5]", None, 5),
        ("array[0]", None, None),
        ("[[11]]", None, None),
        ("[[-1]]", None, None),
        ("[[seven]]", None, None),
        ("", None, None),
    ],
)
def test_a_rating_in_brackets(reply, ours, fastchat):
    assert brackets.bracketed_rating(reply) == ours
    assert brackets.bracketed_rating(reply, which="first", single=True) == fastchat


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        ("My final verdict is [[A>>B]]", "A>>B"),
        ("[[a=b]]", "A=B"),
        ("[[A>B]], no: [[B>>A]].", "B>>A"),
        ("[[A<<B]]", "B>>A"),
        ("[[B<A]]", "A>B"),
        ("[[A>>B]] or [[A>A]] or [[A]]", "A>>B"),
        ("[[A>>>B]]", None),
        ("[A>B]", None),
        ("A>B", None),
        ("", None),
    ],
)
def test_a_label_of_arena_hard(reply, label):
    assert brackets.arena_label(reply) == label


def test_a_label_in_single_brackets_counts_where_it_is_asked_for_and_no_other_stands():
    assert brackets.arena_label("so [A>B]", single=True) == "A>B"
    assert brackets.arena_label("[[B=A]], not [A>B]", single=True) == "A=B"


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
