"""The canary tells weights apart."""

from selfimprove.engine import canary


def test_sequences_are_fixed_and_in_range():
    assert canary.sequences(460) == canary.sequences(460)
    assert all(0 <= token < 460 for ids in canary.sequences(460) for token in ids)
    assert [len(ids) for ids in canary.sequences(460)] == [24, 24]


def test_difference_is_the_largest():
    one = canary.Canary([[1, 2, 3]], [[-1.0, -2.0]])
    assert canary.difference(one, [[-1.0, -2.5]]) == 0.5
