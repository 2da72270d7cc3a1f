"""Two answers at a time, in both orders."""

import math

import pytest

from selfimprove.judges import Candidate
from selfimprove.judges.pairwise import pairwise, pairwise_ranker
from selfimprove.judges.protocol import Preference, Replies


def candidate(text, sample=0):
    return Candidate("p", "the question", "current", sample, text, [], "stop")


PAIR = (candidate("good answer"), candidate("bad answer", 1))


class Panel:
    """Reads the prompt as a judge would: what stands as answer A, and what as answer B."""

    def __init__(self, rule):
        self.rule, self.asked = rule, []

    def nonce(self, name):
        return f"m{abs(hash(name))}"

    def ask(self, model, questions, n, temperature, max_tokens, schema=None):
        self.asked += questions
        return [self.rule(*self.answers(question.text)) for question in questions]

    def choose(self, model, questions, options):
        assert options == ("A", "B")
        return [self.rule(*self.answers(question.text)) for question in questions]

    def compare(self, model, rows):
        return [self.rule(a, b) for _, a, b in rows]

    @staticmethod
    def answers(text):
        lines = text.split("\n")
        at = [i for i, line in enumerate(lines) if line.startswith("<answer ")]
        return lines[at[0] + 1], lines[at[1] + 1]


def test_a_judge_of_merit_says_the_same_in_both_orders():
    panel = Panel(lambda a, b: Replies(("Reasons. [[A]]" if a > b else "[[B]]",)))
    [found] = pairwise([PAIR], panel)
    assert found == Preference(1.0, 1.0, "", ("Reasons. [[A]]", "[[B]]"))
    assert found.consistent
    assert found.mean == 1
    [back] = pairwise([PAIR[::-1]], panel)
    assert (back.forward, back.swapped, back.consistent) == (0.0, 0.0, True)


def test_a_judge_of_position_is_inconsistent():
    [found] = pairwise([PAIR], Panel(lambda a, b: Replies(("[[A]]",))))
    assert (found.forward, found.swapped, found.mean, found.consistent) == (1.0, 0.0, 0.5, False)


def test_half_a_reading_is_none():
    [found] = pairwise([PAIR], Panel(lambda a, b: Replies(("[[A]]",) if a > b else ("hm",))))
    assert (found.forward, found.swapped, found.mean, found.consistent) == (1.0, None, None, False)
    assert found.reason == "reply not readable"
    [found] = pairwise([PAIR], Panel(lambda a, b: Replies((), "too long")))
    assert (found.mean, found.reason) == (None, "too long")


def test_label_probabilities():
    [found] = pairwise([PAIR], Panel(lambda a, b: [0.9, 0.1] if a > b else [0.4, 0.6]), read="logprobs")
    assert (found.forward, found.swapped) == (0.9, 0.6)
    assert found.mean == pytest.approx(0.75)
    [found] = pairwise([PAIR], Panel(lambda a, b: None), read="logprobs")
    assert (found.mean, found.reason) == (None, "no label has a known probability")


def test_each_order_has_a_mark_of_its_own():
    panel = Panel(lambda a, b: Replies(("[[C]]",)))
    [found] = pairwise([PAIR], panel)
    assert (found.mean, found.consistent) == (0.5, False)
    marks = [question.text.split("<question ")[1].split(">")[0] for question in panel.asked]
    assert len(set(marks)) == 2
    assert len({question.name for question in panel.asked}) == 2


def test_a_ranker_is_asked_in_both_orders():
    [found] = pairwise_ranker([PAIR], Panel(lambda a, b: 2.0 if a > b else -1.0), model="m")
    assert found.forward == pytest.approx(1 / (1 + math.exp(-2)))
    assert found.swapped == pytest.approx(1 / (1 + math.exp(-1)))
    [found] = pairwise_ranker([PAIR], Panel(lambda a, b: None), model="m")
    assert (found.mean, found.reason) == (None, "too long for the judge's context")
