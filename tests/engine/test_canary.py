"""The canary tells weights apart."""

import math

import pytest

from selfimprove.engine import canary


def test_sequences_are_fixed_and_in_range():
    assert canary.sequences(460) == canary.sequences(460)
    assert all(0 <= token < 460 for ids in canary.sequences(460) for token in ids)
    assert [len(ids) for ids in canary.sequences(460)] == [24, 24]


def test_difference_is_the_largest():
    one = canary.Canary([[1, 2, 3]], [[-1.0, -2.0]])
    assert canary.difference(one, [[-1.0, -2.5]]) == (0.25, 0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_is_never_within(bad):
    one = canary.Canary([[1, 2, 3]], [[-1.0, -2.0]])
    assert not canary.difference(one, [[-1.0, bad]]).within(canary.tolerance("bfloat16", True))


def test_in_half_precision_one_token_may_be_off_but_not_all():
    one = canary.Canary([list(range(24))], [[-12.0] * 23])
    allowed = canary.tolerance("bfloat16", True)
    assert canary.difference(one, [[-12.3, *[-12.05] * 22]]).within(allowed)
    assert not canary.difference(one, [[-12.3] * 23]).within(allowed)
    assert not canary.difference(one, [[-14.0, *[-12.0] * 22]]).within(allowed)
