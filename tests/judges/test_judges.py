"""Judges keep order and length; unknown is None with a reason."""

import numpy as np
import pytest

from selfimprove import judges, recipe
from selfimprove.data import SHIPPED, read_seeds
from selfimprove.demo import world
from selfimprove.errors import UserError
from selfimprove.judges import Candidate, Opinion
from selfimprove.judges.controls import length, random
from selfimprove.judges.demo_rubric import demo_rubric
from selfimprove.judges.protocol import Replies
from selfimprove.judges.rubric import rubric
from selfimprove.judges.scorers import logps, reward_model
from selfimprove.judges.verifiers import verifier
from selfimprove.judges.votes import self_consistency
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

    def nonce(self, name):
        return f"<{name}>"

    def ask(self, model, questions, n, temperature, max_tokens, schema=None):
        self.asked += [(model, question.text, n, temperature) for question in questions]
        return [self.replies.pop(0) for _ in questions]

    def logps(self, model, rows):
        return [None if not ids else [-1.0, -3.0] for _, ids in rows]

    def rewards(self, model, rows):
        return [None if answer == "long" else float(len(answer)) for _, answer in rows]


def test_readable_replies_are_averaged_and_the_same_answer_is_asked_about_once():
    panel = Panel(
        Replies(("Score: 5", "I like it.", "score:2")), Replies(("", "Score: 7", "Score: -1")), Replies((), "too long")
    )
    rows = [candidate("a", "q"), candidate("b", "q"), candidate("a", "q"), candidate("c", "q")]
    good, unread, again, long = rubric(rows, panel, template="demo", n=3, temperature=0.7)
    assert (good.score, unread.score, long.score) == (3.5, None, None)
    assert (unread.reason, long.reason) == ("no reply readable", "too long")
    assert again == good
    assert good.reply == "Score: 5\n---\nI like it.\n---\nscore:2"
    assert panel.asked[0] == ("current", "Score this answer from 0 to 5. Question: q Answer: a", 3, 0.7)


@pytest.mark.parametrize("template", ["hundred", "additive"])
def test_question_and_answer_stand_between_marks_of_this_request(template):
    panel = Panel(Replies(("Score: 4",)))
    rubric([candidate("the answer", "the question")], panel, template=template, model="server:x")
    [(model, text, _, _)] = panel.asked
    assert model == "server:x"
    mark = "<the question/current/0>"
    assert f"<question {mark}>\nthe question\n</question {mark}>" in text
    assert f"<answer {mark}>\nthe answer\n</answer {mark}>" in text


def test_numbers_read_off_models():
    rows = [candidate("a"), candidate("long")]
    rows[0].token_ids.extend([1, 2])
    assert logps(rows, Panel()) == [Opinion(-2.0), Opinion(None, "empty answer")]
    assert reward_model(rows, Panel(), model="m") == [Opinion(1.0), Opinion(None, "too long for the judge's context")]


def test_controls_read_nothing_but_length_and_name():
    short, long = candidate("x"), candidate("y")
    long.token_ids.extend([1, 2, 3])
    assert [o.score for o in length([short, long])] == [0, 3]
    assert [o.score for o in length([short, long], prefer="shorter")] == [0, -3]
    first, second = random([candidate("x", "p"), candidate("x", "q")], Panel())
    assert first != second
    assert random([candidate("other text", "p")], Panel()) == [first]
    assert 0 <= first.score < 1


class TestEnsemble:
    def bound(self, *members, **more):
        return judges.bind(recipe.Choice.model_validate({"name": "ensemble", "judges": list(members), **more}))

    def test_ranks_need_no_common_scale(self):
        rows = [candidate("1", answer="1"), candidate("2", answer="1"), candidate("3", answer="1")]
        for row, ids in zip(rows, ([1], [1, 2, 3], [1, 2]), strict=True):
            row.token_ids.extend(ids)
        members = {"name": "verifier", "checker": "exact"}, {"name": "length"}
        # right: ranks 1, .25, .25 (a tie counts half); length: 0, 1, .5
        assert [o.score for o in self.bound(*members)(rows, Panel())] == [0.5, 0.625, 0.375]
        assert [o.score for o in self.bound(*members, combine="mean")(rows, Panel())] == [1.0, 1.5, 1.0]

    def test_what_a_member_cannot_judge_is_unknown(self):
        members = {"name": "verifier", "checker": "exact"}, {"name": "length"}
        [opinion] = self.bound(*members)([candidate("1")], Panel())
        assert (opinion.score, opinion.reason) == (None, "unknown to a member: no reference answer")

    def test_members_are_looked_at_before_anything_runs(self):
        with pytest.raises(UserError, match="unknown judge 'nobody'"):
            self.bound({"name": "nobody"})
        with pytest.raises(UserError, match="compares two answers"):
            self.bound({"name": "pairwise"})


def test_which_models_a_judge_asks():
    def models(**choice):
        return judges.models(recipe.Choice.model_validate(choice))

    assert models(name="verifier", checker="exact") == []
    assert models(name="rubric") == ["current"]
    assert models(name="pairwise", model="server:x") == ["server:x"]
    assert models(name="reward_model", model="org/name") == ["org/name"]
    members = [{"name": "rubric", "model": "initial"}, {"name": "length"}, {"name": "logps"}]
    assert models(name="ensemble", judges=members) == ["initial", "current"]


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
