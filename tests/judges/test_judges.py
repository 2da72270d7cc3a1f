"""Judges keep order and length; unknown is None with a reason."""

import pytest

from selfimprove.data import SHIPPED, read_seeds
from selfimprove.demo import world
from selfimprove.judges import Candidate, self_consistency, verifier
from selfimprove.records import Seed


def candidate(text, prompt="p", source="current", answer=None):
    return Candidate(prompt, prompt, source, 0, text, [], "stop", answer)


def test_the_checker_of_the_world_says_right_wrong_or_unknown():
    seeds: list[Seed] = read_seeds(SHIPPED["demo:seeds"])[:50]
    right = [candidate(f"  {seed.completion} ", seed.prompt) for seed in seeds]
    wrong = [candidate(seed.completion + " indeed", seed.prompt) for seed in seeds]
    opinions = verifier([*right, *wrong, candidate("x", "What is love?")], checker="demo_world")
    assert [o.score for o in opinions] == [1.0] * 50 + [0.0] * 50 + [None]
    assert opinions[-1].reason == "prompt outside the grammar"
    assert world.answer("What is love?") is None


def test_exact_needs_a_reference():
    a, b, c = verifier([candidate("4  2", answer=" 4 2"), candidate("5", answer="4"), candidate("5")], checker="exact")
    assert (a.score, b.score, c.score, c.reason) == (1.0, 0.0, None, "no reference answer")


def test_self_consistency_is_the_share_of_the_current_policys_votes():
    own = [candidate("a"), candidate("a "), candidate("b")]
    rows = [*own, candidate("c", source="improver"), candidate("a", source="initial")]
    assert [o.score for o in self_consistency(rows)] == pytest.approx([2 / 3, 2 / 3, 1 / 3, 0, 2 / 3])
    opinions = self_consistency(rows, voters="improver")
    assert [o.score for o in opinions] == [0, 0, 0, 1, 0]
    [alone] = self_consistency([candidate("a", source="improver")])
    assert alone.score is None
    assert alone.reason
