"""Judges keep order and length; unknown is None with a reason."""

import numpy as np
import pytest

from selfimprove import judges, recipe
from selfimprove.data import SHIPPED, read_seeds
from selfimprove.demo import world
from selfimprove.judges import Candidate, Opinion, demo_rubric, rating, rubric, self_consistency, verifier
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


class Panel:
    """A judge's view of the run, with replies made up front."""

    opinions = {("p", "current", 0): Opinion(0.25)}  # noqa: RUF012

    def __init__(self, *replies):
        self.replies = list(replies)
        self.asked = []

    def answers(self, model, requests, n, temperature, max_tokens):
        self.asked += [(model, text, n) for _, text in requests]
        return [self.replies.pop(0) for _ in requests]


def test_the_policy_rates_answers_and_its_readable_replies_are_averaged():
    panel = Panel(["Score: 5", "I like it.", "score:2"], ["", "Score: 7", "Score: 4.5"], [])
    rows = [candidate("a", "q"), candidate("b", "q"), candidate("c", "q")]
    good, unread, long = rubric(rows, panel)
    assert (good.score, unread.score, long.score) == (3.5, None, None)
    assert (unread.reason, long.reason) == ("no reply readable", "too long for the judge's context")
    assert [o.score for o in rubric([rows[0], rows[0]], Panel(["Score: 1"]))] == [1, 1]  # asked once
    assert panel.asked[0] == ("current", "Score this answer from 0 to 5. Question: q Answer: a", 3)


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Score: 5", 5),
        ("SCORE : 0", 0),
        ("Score: 3. No, Score: 1", 1),
        ("Score: 6", None),
        ("Score: 33", None),
        ("Score: 4.5", None),
        ("Score: 4.", 4),
        ("**Score:** **3**", 3),
    ],
)
def test_a_rating_is_read_from_the_end_and_never_guessed(reply, score):
    assert rating(reply) == score


def test_the_discriminators_opinions_are_those_of_its_stage():
    known, unknown = judges.bind(recipe.Choice(name="discriminator"))([candidate("a"), candidate("a", "q")], Panel())
    assert known.score == 0.25
    assert unknown.score is None
    assert unknown.reason


def test_the_demo_rubric_errs_as_it_says_and_says_the_same_twice():
    seeds: list[Seed] = read_seeds(SHIPPED["demo:seeds"])
    right = [candidate(seed.completion, seed.prompt) for seed in seeds]
    wrong = [candidate(seed.completion + " indeed", seed.prompt) for seed in seeds]
    first, again = demo_rubric(right + wrong, noise=20.0, gap=20.0), demo_rubric(right + wrong, noise=20.0, gap=20.0)
    assert first == again
    scores = np.array([o.score for o in first]).reshape(2, -1)
    assert set(scores.ravel() % 5) == {0}
    assert scores.min() >= 0
    assert scores.max() <= 100
    # clipping at 0 and 100 moves the means of N(60, 20) and N(40, 20) by less than one
    assert scores.mean(1) == pytest.approx([60, 40], abs=3)
    # two independent errors of 20: the wrong answer wins with the probability of N(20, 28.3) < 0, ties aside
    assert (scores[1] > scores[0]).mean() == pytest.approx(0.24, abs=0.05)
    assert [o.score for o in demo_rubric(right + wrong, noise=0.0)] == [70] * 650 + [30] * 650
    [outside] = demo_rubric([candidate("x", "What is love?")])
    assert outside.score is None


def test_a_verdict_names_the_judge_and_its_parameters():
    choice = recipe.Choice(name="demo_rubric", noise=10.0, gap=40.0)
    assert judges.identity(choice) == "demo_rubric(gap=40.0, noise=10.0)"
    assert judges.identity(None) == "none"
