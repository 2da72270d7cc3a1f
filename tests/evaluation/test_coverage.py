"""Every 95 % interval holds the truth 93 to 97 times in 100, on data like ours: prompts differ in difficulty.

2,000 experiments each, by which a coverage of 95 % is known to half a point.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from selfimprove.evaluation import statistics

EXPERIMENTS = 2_000
SIZES = [100, 300, 650]
MEAN = {"even": 0.5, "hard": 0.2, "two kinds": 0.6}
SHAPE = {"even": (1, 1), "hard": (0.5, 2), "two kinds": (0.3, 0.2)}
REDRAWN, GAIN = 0.3, 0.1  # a round changes the difficulty of some prompts, and answers so much more of them


class Answers(NamedTuple):
    """By experiment and prompt: greedy answers and means over four sampled ones, of the old and the new policy."""

    greedy: tuple[np.ndarray, np.ndarray]
    sampled: tuple[np.ndarray, np.ndarray]


def answers(kind: str, n: int, seed: int) -> Answers:
    rng = np.random.default_rng(seed)
    old, other = (rng.beta(*SHAPE[kind], size=(EXPERIMENTS, n)) for _ in range(2))
    redrawn = rng.random(old.shape) < REDRAWN
    new = np.where(redrawn, GAIN + (1 - GAIN) * other, old)
    before = rng.random(old.shape) < old
    after = np.where(redrawn, rng.random(old.shape) < new, before)  # the same greedy answer to the other prompts
    return Answers((before.astype(float), after.astype(float)), (rng.binomial(4, old) / 4, rng.binomial(4, new) / 4))


def difference(kind: str) -> float:
    return REDRAWN * GAIN * (1 - MEAN[kind])


def coverage(interval: Callable, data, truth: float) -> float:
    found = [interval(*rows) for rows in zip(*data, strict=True)]
    return float(np.mean([of.low <= truth <= of.high for of in found]))


@pytest.mark.parametrize(("kind", "n"), [("hard", 100), ("two kinds", 300), ("even", 650)])
def test_intervals_of_scores_and_of_paired_differences(kind, n):
    made = answers(kind, n, seed=n)
    for name, interval, data, truth in [
        ("Wilson", statistics.proportion, made.greedy[:1], MEAN[kind]),
        ("t over prompts", statistics.clustered_mean, made.sampled[:1], MEAN[kind]),
        ("paired, greedy", statistics.compare_binary, made.greedy, difference(kind)),
        ("paired, sampled", statistics.compare_means, made.sampled, difference(kind)),
    ]:
        assert 0.93 <= coverage(interval, data, truth) <= 0.97, name


@pytest.mark.parametrize("kind", ["hard"])
def test_the_paired_bootstrap(kind):
    """Fewer resamples than in use, for time; n = 100 is where percentile intervals are at their narrowest."""
    made = answers(kind, 100, seed=1)
    for data in (made.greedy, made.sampled):
        found = coverage(lambda old, new: statistics.compare_bootstrap(old, new, resamples=500), data, difference(kind))
        assert 0.93 <= found <= 0.97


@pytest.mark.parametrize("clusters", SIZES)
def test_intervals_over_clusters(clusters):
    """One to three instructions of a prompt, of one difficulty: rows that are not independent."""
    rng = np.random.default_rng(clusters)
    covered, naive = [], []
    for _ in range(EXPERIMENTS):
        sizes = rng.integers(1, 4, clusters)
        names = np.repeat(np.arange(clusters), sizes)
        skill = rng.beta(0.5, 0.5, clusters)
        old = (rng.random(len(names)) < skill[names]).astype(float)
        new = (rng.random(len(names)) < (GAIN + (1 - GAIN) * skill)[names]).astype(float)
        mean, change = statistics.mean_over_clusters(old, names), statistics.compare_clustered(old, new, names)
        covered.append((mean.low <= 0.5 <= mean.high, change.low <= GAIN / 2 <= change.high))
        row = statistics.clustered_mean(old)
        naive.append(row.low <= 0.5 <= row.high)
    assert all(0.93 <= share <= 0.97 for share in np.mean(covered, axis=0))
    assert np.mean(naive) < 0.9  # what taking rows for independent would do
