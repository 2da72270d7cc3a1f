"""SAPO's replay buffer: weights against the reference, and a history that is the same whoever tells it."""

import json

import pytest

from selfimprove.training import replay
from tests.paths import ROOT

CASE = json.loads((ROOT / "tests/data/loss_vectors.json").read_text(encoding="utf-8"))["procedures"][
    "sapo_replay_weights"
]


def test_the_weights_are_those_of_sapo():
    assert replay.weights(CASE["sample_counts"]) == pytest.approx(CASE["probabilities"], abs=1e-12)


def test_earlier_rounds_count_against_a_row():
    seeds = list(range(400))
    totals = [0, 0]  # of the row that was drawn forty times in round 1, and of those that came in round 2
    for seed in seeds:
        drawn = replay.draw([1, 1], capacity=9, draws=40, seeds=[seed, seed + 1000])
        totals[0] += drawn.count(0)
        totals[1] += drawn.count(1)
    share = totals[0] / sum(totals)
    assert share == pytest.approx((1 / 41) / (1 + 1 / 41), abs=0.005)


def test_the_buffer_is_the_last_rows_and_rows_come_more_than_once():
    drawn = replay.draw([5, 5], capacity=3, draws=200, seeds=[1, 2])
    assert set(drawn) == {7, 8, 9}
    assert len(drawn) == 200


def test_a_rows_place_in_the_buffer_keeps_its_count():
    """Capacity 2 of three rows: row 1 stays in the buffer with its count while row 0 leaves it."""
    late = [replay.draw([2, 1], capacity=2, draws=100, seeds=[seed, seed + 500]) for seed in range(100)]
    assert {index for drawn in late for index in drawn} == {1, 2}
    assert sum(drawn.count(1) for drawn in late) / 1e4 == pytest.approx(
        1 / 50, abs=0.015
    )  # drawn about 50 times before


def test_earlier_rounds_are_drawn_again_to_the_same_rows():
    sizes, seeds = [10, 7, 4], [3, 4, 5]
    rounds = [replay.draw(sizes[:k], 12, 30, seeds[:k]) for k in (1, 2, 3)]
    assert rounds[0] == replay.draw([10], 12, 30, [3])
    assert rounds[2] != replay.draw([10, 7, 4], 12, 30, [99, 4, 5])  # the past weighs on the present
