"""Which prompts get a label: against the reference values of the authors' programs."""

import itertools
import json
import random

import pytest

from selfimprove.judges import acquisition
from selfimprove.stages import discriminate
from tests.paths import ROOT

PROCEDURES = json.loads((ROOT / "tests/data/loss_vectors.json").read_text(encoding="utf-8"))["procedures"]


def in_order(measured):
    """Names from first to last taken."""
    taken = [acquisition.first(measured, n, random.Random(0)) for n in range(len(measured) + 1)]
    return [(after - before).pop() for before, after in itertools.pairwise(taken)]


def test_certainty_is_that_of_active_preference_learning():
    case = PROCEDURES["apl_certainty"]
    reward = acquisition.reward
    a = [reward(*logps, case["beta"]) for logps in zip(case["logp_a"], case["ref_logp_a"], strict=True)]
    b = [reward(*logps, case["beta"]) for logps in zip(case["logp_b"], case["ref_logp_b"], strict=True)]
    assert a == pytest.approx(case["r_hat_a"], abs=1e-12)
    found = [acquisition.uncertainty(*pair) for pair in zip(a, b, strict=True)]
    assert found == pytest.approx(case["uncertainty"], abs=1e-12)
    assert in_order({str(i): value for i, value in enumerate(found)}) == [
        str(i) for i in case["order_most_certain_first"]
    ]


def test_large_gaps_do_not_tie():
    values = [acquisition.uncertainty(gap, 0) for gap in (0, 40, 60, 600, 1e6)]
    assert values[0] == 1
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == 5


def test_entropy_is_that_of_active_preference_learning():
    case = PROCEDURES["apl_entropy"]
    found = [acquisition.entropy(sums) for sums in case["sum_logps_of_samples"]]
    assert found == pytest.approx(case["entropy"], abs=1e-12)
    assert in_order({str(i): -value for i, value in enumerate(found)}) == [
        str(i) for i in reversed(case["order_highest_last"])
    ]


def test_gold_labels_go_where_the_discriminator_is_least_confident():
    case = PROCEDURES["d2po_confidence"]
    rewards = {(str(i // 2), i % 2): score for i, score in enumerate(case["rm_scores"])}
    gaps = {name: discriminate.gap(rewards, name) for name, _ in rewards}
    assert list(gaps.values()) == pytest.approx(case["abs_diff"], abs=1e-12)
    assert in_order(gaps) == [str(i) for i in case["order_least_confident_first"]]
    assert discriminate.gap({("p", 0): 1.0, ("p", 1): None}, "p") is None


def test_unknown_comes_last_and_ties_are_drawn():
    measured = {"unknown": None, **{f"p{i}": 0.0 for i in range(20)}}
    drawn = [acquisition.first(measured, 10, random.Random(seed)) for seed in range(20)]
    assert all("unknown" not in names for names in drawn)
    assert len({frozenset(names) for names in drawn}) > 15
    assert acquisition.first(measured, 99, random.Random(0)) == set(measured)


def test_agreement_counts_only_what_gold_tells_apart():
    gold = {("a", 0): 1.0, ("a", 1): 0.0, ("a", 2): 0.0, ("b", 0): 0.0, ("b", 1): None}
    right = {("a", 0): 0.5, ("a", 1): -0.5, ("a", 2): 0.9, ("b", 0): 9.0, ("b", 1): 0.0}
    assert discriminate.agreement(gold, right) == 1 / 2
    assert discriminate.agreement(gold, {**right, ("a", 2): 0.5}) == 1 / 2  # a tie agrees with nothing
    assert discriminate.agreement(gold, {**right, ("a", 2): None}) == 1
    assert discriminate.agreement({("b", 0): 0.0}, right) is None
