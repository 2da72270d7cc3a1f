"""What may be trained on: nothing is cut, what is left out is counted, and there is an end token to learn."""

import pytest

from selfimprove.errors import UserError
from selfimprove.recipe import Optimizer
from selfimprove.training.job import PairRow
from selfimprove.training.rows import admit

EOS, BOS = 2, 1


def admitted(rows, **settings):
    dropped = []
    kept = admit(
        rows, Optimizer(learning_rate=1.0, **settings), [EOS], BOS, lambda row, why: dropped.append((row, why))
    )
    return kept, dropped


def row(name, prompt=3, chosen=4, rejected=4, end=EOS):
    return PairRow(name, [BOS] + [9] * (prompt - 1), [5] * (chosen - 1) + [end], [6] * rejected)


def test_long_rows_are_dropped_whole_and_named():
    rows = [row("fits"), row("chosen", chosen=6), row("rejected", rejected=6)]
    kept, dropped = admitted(rows, max_length=7, max_dropped_share=0.7)
    assert kept == rows[:1]
    assert dropped == [("chosen", "longer than max_length"), ("rejected", "longer than max_length")]


def test_an_empty_rejected_answer_is_no_row_of_preferences():
    rows = [row("fits"), row("empty", rejected=0)]
    kept, dropped = admitted(rows, max_dropped_share=0.5)
    assert kept == rows[:1]
    assert dropped == [("empty", "empty rejected answer")]
    settings = Optimizer(learning_rate=1.0)
    assert admit(rows, settings, [EOS], BOS, lambda row, why: None, preferences=False) == rows  # as in SFT


def test_one_in_a_hundred_may_be_dropped_and_no_more():
    short = [row(str(i)) for i in range(99)]
    kept, dropped = admitted([*short, row("long", chosen=60)], max_length=50)
    assert (len(kept), len(dropped)) == (99, 1)
    with pytest.raises(UserError, match="2 of 100 rows cannot be trained on") as raised:
        admitted([*short[:98], row("a", chosen=60), row("b", chosen=60)], max_length=50)
    assert "max_dropped_share" in raised.value.hint


def test_without_an_end_token_the_policy_would_never_learn_to_stop():
    with pytest.raises(UserError, match="no chosen answer ends with an end token"):
        admitted([row("a", end=7), row("b", end=8)])
    assert len(admitted([row("a", end=7), row("b")])[0]) == 2  # one that was cut off is no reason to stop


def test_a_second_bos_is_refused_and_names_the_row():
    twice = PairRow("twice", [BOS, BOS, 9], [5, EOS], [6, EOS])
    with pytest.raises(UserError, match="the prompt of row 'twice' has 2 BOS"):
        admitted([row("once"), twice])


def test_a_bos_that_a_policy_sampled_drops_its_row_and_stops_nothing():
    sampled = PairRow("sampled", [BOS, 9], [5, BOS, EOS], [6, EOS])
    worse = PairRow("worse", [BOS, 9], [5, EOS], [6, BOS, EOS])
    kept, dropped = admitted([row("a"), sampled, worse], max_dropped_share=0.5)
    assert dropped == [("sampled", "BOS inside the chosen answer")]
    assert [r.pair_id for r in kept] == ["a", "worse"]
    with pytest.raises(UserError, match="1 of 2 rows cannot be trained on"):
        admitted([row("a"), sampled])


def test_an_empty_chosen_answer_is_dropped_and_nothing_left_is_an_error():
    empty = PairRow("empty", [BOS, 9], [], [6, EOS])
    kept, dropped = admitted([row("a"), empty], max_dropped_share=0.5)
    assert dropped == [("empty", "empty chosen answer")]
    assert [r.pair_id for r in kept] == ["a"]
    with pytest.raises(UserError, match="no row to train on"):
        admitted([empty], max_dropped_share=1.0)
