"""Intervals and tests against statsmodels, published figures, and simulation."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from selfimprove.evaluation import statistics


@pytest.mark.parametrize(("wins", "n"), [(0, 10), (7, 10), (396, 650), (650, 650)])
def test_wilson_interval_equals_statsmodels(wins, n):
    found = statistics.proportion([1.0] * wins + [0.0] * (n - wins))
    low, high = proportion_confint(wins, n, method="wilson")
    assert (found.value, found.n) == (wins / n, n)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12))


@pytest.mark.parametrize(("gained", "lost", "kept"), [(30, 10, 100), (3, 3, 5), (0, 8, 40), (0, 0, 12)])
def test_mcnemar_equals_statsmodels(gained, lost, kept):
    old = [0.0] * gained + [1.0] * lost + [1.0] * kept
    new = [1.0] * gained + [0.0] * lost + [1.0] * kept
    found = statistics.compare_binary(old, new)
    assert found.p == pytest.approx(mcnemar([[kept, lost], [gained, 0]], exact=True).pvalue, abs=1e-12)
    assert found.difference == pytest.approx((gained - lost) / len(old))


def test_paired_tests_equal_the_figures_of_the_gsm8k_flags():
    """Fine-tuned 6B against 6B with verification, flags published with GSM8K (arXiv 2110.14168), 1,319 problems."""
    gained, lost, both, neither = 293, 64, 222, 740
    old = [0.0] * gained + [1.0] * lost + [1.0] * both + [0.0] * neither
    new = [1.0] * gained + [0.0] * lost + [1.0] * both + [0.0] * neither
    found = statistics.compare_binary(old, new)
    assert found.n == 1319
    assert found.p == pytest.approx(3.928874710490944e-36, rel=1e-9)
    assert found.difference == pytest.approx(0.17361637604245642, abs=1e-12)
    assert (found.high - found.low) / 2 / stats.t.ppf(0.975, 1318) == pytest.approx(0.01350874904966465, abs=1e-9)


def test_paired_means_equal_scipy():
    rng = np.random.default_rng(0)
    old, new = rng.random(200), rng.random(200)
    found = statistics.compare_means(old, new)
    reference = stats.ttest_rel(new, old)
    assert found.p == pytest.approx(reference.pvalue)
    interval = reference.confidence_interval()
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))


def test_intervals_cover_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(1)
    skill = rng.beta(2, 2, size=(2000, 300))  # 2,000 experiments, 300 prompts, each with its own difficulty
    sampled = rng.binomial(4, skill) / 4
    covered = [(i := statistics.clustered_mean(list(row))).low <= 0.5 <= i.high for row in sampled]
    assert 0.93 <= np.mean(covered) <= 0.97
    flips = rng.random((2000, 300)) < 0.6
    covered = [(i := statistics.proportion(list(row.astype(float)))).low <= 0.6 <= i.high for row in flips]
    assert 0.93 <= np.mean(covered) <= 0.97


def test_equal_answers_are_no_change():
    assert statistics.compare_means([0.5, 1.0], [0.5, 1.0]).p == 1.0
    assert statistics.compare_binary([0.0, 1.0], [0.0, 1.0]).p == 1.0


def test_no_spread_is_no_certainty():
    assert statistics.clustered_mean([0.0] * 3) == statistics.proportion([0.0] * 3)
    assert statistics.clustered_mean([1.0] * 3).low < 0.5
    assert statistics.clustered_mean([0.5] * 3).value == 0.5


def test_one_prompt_gives_no_interval():
    with pytest.raises(ValueError, match="two prompts"):
        statistics.clustered_mean([1.0])
