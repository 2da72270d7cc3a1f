"""The search for rows that an engine dies on, with engines that die in several ways."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfimprove import interrupts
from selfimprove.engine.protocol import Completion, EngineDied, Request, Sampling
from selfimprove.errors import UserError
from selfimprove.execution import Lost, ask
from selfimprove.execution.hunt import LEAST, MOST, Hunt
from tests.executing import inline, work


def at_once(rows, poison, dice):
    """A batch engine: nothing is answered where one row is poisoned."""
    return [] if poison.intersection(rows) else rows


def in_turn(rows, poison, dice):
    """Answers one row after the other, up to the first that is poisoned."""
    return rows[: next((k for k, row in enumerate(rows) if row in poison), len(rows))]


def some(rows, poison, dice):
    """Answers some of the others before it dies."""
    return [row for row in rows if row not in poison and (not poison.intersection(rows) or dice.random() < 0.3)]


@settings(max_examples=300, deadline=None)
@given(
    size=st.integers(8, 2048),
    numbers=st.sets(st.integers(0, 2047), max_size=20),
    engine=st.sampled_from([at_once, in_turn, some]),
    dice=st.randoms(use_true_random=False),
)
def test_exactly_the_poisoned_rows_are_lost_with_few_deaths(size, numbers, engine, dice):
    limit = int(max(LEAST, MOST * size))
    poison = set(sorted(number for number in numbers if number < size)[:limit])
    hunt, answered, deaths = Hunt(range(size), size), [], 0
    while (rows := hunt.next()) is not None:
        told = engine(rows, poison, dice)
        answered += told
        if poison.intersection(rows):
            deaths += 1
            hunt.died(rows, [row for row in rows if row not in set(told)], UserError("it died", ""))
    assert sorted(hunt.lost) == sorted(poison)
    assert sorted(answered) == [row for row in range(size) if row not in poison]  # each once
    assert deaths <= 2 + 2 * len(poison) * math.log2(size)


@pytest.mark.parametrize(("size", "limit"), [(20, 3), (300, 3), (1000, 10)])
def test_beyond_the_limit_it_is_not_the_rows(size, limit):
    hunt, deaths = Hunt(range(size), size), []

    def die():
        while (rows := hunt.next()) is not None:
            deaths.append(rows)
            hunt.died(rows, rows, UserError("out of luck", ""))

    with pytest.raises(UserError, match=rf"dies on {limit + 1} rows one by one; the last time: out of luck"):
        die()
    assert len(hunt.lost) == limit + 1
    assert len(deaths) < 40


def test_one_accident_loses_nothing_and_halves_nothing():
    hunt = Hunt(range(100), 100)
    rows = hunt.next()
    hunt.died(rows, rows[40:], UserError("it died", ""))
    assert hunt.next() == rows[40:]
    assert hunt.next() is None
    assert (hunt.halved, hunt.lost) == (False, [])


def test_the_last_row_of_a_portion_is_tried_alone_before_it_is_left_out():
    hunt = Hunt(range(8), 8)
    hunt.died(hunt.next(), list(range(8)), UserError("", ""))
    rows = hunt.next()
    hunt.died(rows, [3], UserError("", ""))  # all others were answered, and one of them may have been the last straw
    assert hunt.lost == []
    assert hunt.next() == [3]


# with an engine


class Mortal:
    """Dies on requests of certain seeds, after it has answered those before them."""

    def __init__(self, poison, accidents=()):
        self.poison, self.accidents, self.asked, self.deaths = poison, list(accidents), [], 0

    def swap(self, model):
        pass

    def generate(self, requests, sampling, finished):
        for number, request in enumerate(requests):
            if request.seed in self.poison or len(self.asked) in self.accidents:
                self.accidents = [one for one in self.accidents if one != len(self.asked)]
                self.deaths += 1
                raise EngineDied("it died", "look")
            self.asked.append(request.seed)
            finished(number, [Completion([request.seed], [-1.0], "stop")])

    def prompt_logprobs(self, sequences):
        if any(ids[0] in self.poison for ids in sequences):
            self.deaths += 1
            raise EngineDied("it died", "look")
        self.asked += [ids[0] for ids in sequences]
        return [[float(ids[0])] for ids in sequences]


SAMPLING = Sampling(1.0, 1.0, 4, [2])
REQUESTS = [Request([k % 7 + 1] * (k % 5 + 1), 1, k) for k in range(600)]


def test_what_an_engine_dies_on_is_lost_with_its_reason_and_all_else_answered_once(tmp_path):
    engine = Mortal({3, 77, 500})
    found = list(ask(inline(engine), tmp_path, work("complete", SAMPLING), REQUESTS))
    assert [k for k, one in enumerate(found) if isinstance(one, Lost)] == [3, 77, 500]
    assert found[77].reason == "the engine dies on it"
    assert all(isinstance(one, Lost) or one[0].token_ids == [k] for k, one in enumerate(found))
    assert sorted(engine.asked) == [k for k in range(600) if k not in engine.poison]
    again = Mortal({3, 77, 500})
    assert list(ask(inline(again), tmp_path, work("complete", SAMPLING), REQUESTS)) == found
    assert again.deaths == 0  # what is lost is not tried again either


def test_an_accident_in_each_shard_loses_nothing(tmp_path):
    engine = Mortal(set(), accidents=[100, 300, 599])
    found = list(ask(inline(engine), tmp_path, work("complete", SAMPLING), REQUESTS))
    assert [one[0].token_ids for one in found] == [[k] for k in range(600)]
    assert sorted(engine.asked) == list(range(600))
    assert engine.deaths == 3


def test_scores_that_are_hunted_leave_out_that_row_alone(tmp_path):
    rows = [[k, 1] for k in range(600)]
    engine = Mortal({5, 599})
    found = list(ask(inline(engine), tmp_path, work("score"), rows))
    assert [k for k, one in enumerate(found) if isinstance(one, Lost)] == [5, 599]
    assert all(isinstance(one, Lost) or one == [float(k)] for k, one in enumerate(found))


def test_an_engine_that_dies_on_everything_says_so_and_what_it_said(tmp_path):
    with pytest.raises(UserError, match="dies on 4 rows one by one; the last time: it died") as raised:
        list(ask(inline(Mortal(set(range(600)))), tmp_path, work("complete", SAMPLING), REQUESTS))
    assert raised.value.hint == "look"


def test_a_death_while_the_user_stops_it_is_no_death(tmp_path):
    class Stopped(Mortal):
        def generate(self, requests, sampling, finished):
            entered.pending = True
            super().generate(requests, sampling, finished)

    engine = Stopped(set(range(600)))
    with interrupts.Interrupts(lambda: None) as entered, pytest.raises(KeyboardInterrupt):
        list(ask(inline(engine), tmp_path, work("complete", SAMPLING), REQUESTS))
    assert engine.deaths == 1
    assert not list(tmp_path.glob("*.done"))
