"""Intervals and tests against scipy, statsmodels, and published figures; test_coverage.py has the simulations."""

import gzip
import itertools
import json
import warnings

import numpy as np
import pytest
from scipy import stats
from statsmodels.api import OLS
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.descriptivestats import sign_test
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint

from selfimprove.evaluation import statistics
from selfimprove.evaluation.wording import called, worded
from tests.paths import SHARED

DATA = SHARED / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the data with known answers is not beside the checkout")


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


def test_equal_answers_are_no_change():
    assert statistics.compare_means([0.5, 1.0], [0.5, 1.0]).p == 1.0
    assert statistics.compare_binary([0.0, 1.0], [0.0, 1.0]).p == 1.0


def test_no_spread_is_no_certainty():
    assert statistics.clustered_mean([0.0] * 3) == statistics.proportion([0.0] * 3)
    assert statistics.clustered_mean([1.0] * 3).low < 0.5
    found = statistics.clustered_mean([0.5] * 3)
    assert (found.value, found.low < 0.2, found.high > 0.8) == (0.5, True, True)
    same = statistics.compare_means([0.0] * 20, [0.25] * 20)
    assert same.low < 0.25 < same.high
    assert same.p == pytest.approx(2 * 0.5**20)  # twenty of twenty, by signs
    assert statistics.compare_bootstrap([0.0] * 20, [0.25] * 20)[:3] == same[:3]
    still = statistics.compare_binary([1.0] * 20, [1.0] * 20)
    assert (still.low, still.high) == (pytest.approx(-(1 - 0.025 ** (1 / 20))), pytest.approx(1 - 0.025 ** (1 / 20)))


def test_one_prompt_gives_no_interval():
    with pytest.raises(ValueError, match="two prompts"):
        statistics.clustered_mean([1.0])
    with pytest.raises(ValueError, match="two clusters"):
        statistics.mean_over_clusters([1.0, 0.0], ["a", "a"])
    with pytest.raises(ValueError, match="same prompts"):
        statistics.compare_means([1.0, 0.0], [1.0])


def clustered(rng, clusters=60):
    """Instructions of prompts: one to three of each, hanging together."""
    sizes = rng.integers(1, 4, clusters)
    names = [f"prompt-{c}" for c, size in enumerate(sizes) for _ in range(size)]
    values = (rng.random(len(names)) < np.repeat(rng.random(clusters), sizes)).astype(float)
    return values, names


def test_clustered_intervals_equal_statsmodels():
    rng = np.random.default_rng(2)
    old, names = clustered(rng)
    new = np.clip(old + (rng.random(len(old)) < 0.2), 0, 1)
    groups = {"groups": np.unique(names, return_inverse=True)[1]}
    fit = OLS(new - old, np.ones(len(old))).fit(cov_type="cluster", cov_kwds=groups, use_t=True)
    found = statistics.compare_clustered(old, new, names)
    assert (found.low, found.high) == tuple(pytest.approx(b) for b in fit.conf_int()[0])
    assert (found.p, found.n) == (pytest.approx(fit.pvalues[0]), 60)
    fit = OLS(old, np.ones(len(old))).fit(cov_type="cluster", cov_kwds=groups, use_t=True)
    mean = statistics.mean_over_clusters(old, names)
    assert (mean.value, mean.n) == (pytest.approx(old.mean()), 60)
    assert (mean.low, mean.high) == tuple(pytest.approx(b) for b in fit.conf_int()[0])
    plain = OLS(old, np.ones(len(old))).fit(cov_type="cluster", cov_kwds=groups | {"use_correction": False})
    assert statistics.clustered_standard_error(old, names) == pytest.approx(plain.bse[0])


def test_clusters_of_one_size_are_their_means():
    values = np.random.default_rng(3).integers(0, 2, (50, 4)).astype(float)
    names = [str(row) for row in range(50) for _ in range(4)]
    assert statistics.mean_over_clusters(values.ravel(), names) == pytest.approx(
        statistics.clustered_mean(values.mean(1))
    )


def test_no_spread_in_clusters_counts_clusters():
    assert statistics.mean_over_clusters([1.0] * 6, list("aabbcc")) == statistics.proportion([1.0] * 3)


@needs_data
def test_clustered_standard_error_equals_the_example_on_alpaca_eval():
    expected = json.loads((DATA / "alpaca_lc/public/clustered_se_example.json").read_text())
    rows = [json.loads(line) for line in (DATA / "alpaca_lc/public/claude-2.1.jsonl").read_text().splitlines()]
    wins = [(1.5 if row["preference"] == 0 else row["preference"]) - 1 for row in rows]
    prompts = [json.loads(line) for line in (DATA / "alpaca_eval_805/instructions.jsonl").read_text().splitlines()]
    sources = {prompt["index"]: prompt["dataset"] for prompt in prompts}
    found = statistics.clustered_standard_error(wins, [sources[row["index"]] for row in rows])
    assert found == pytest.approx(expected["clustered_se_by_dataset"], abs=1e-12)
    assert statistics.clustered_standard_error(wins, [str(i) for i in range(805)]) == pytest.approx(
        expected["sem"], rel=1e-3
    )


@needs_data
def test_paired_tests_of_arena_bench_equal_the_expected_ones():
    expected = json.loads((DATA / "arena_bench_v1/public/expected_paired_tests.json").read_text())
    of: dict[str, dict[str, float]] = {}
    with gzip.open(DATA / "arena_bench_v1/public/judgments.jsonl.gz", "rt") as file:
        for row in map(json.loads, file):
            if row["score"] is not None:
                of.setdefault(row["model"], {})[row["question_id"]] = row["score"]
    for pair, wanted in expected.items():
        a, b = (of[name] for name in pair.split("__vs__"))
        shared = [question for question in a if question in b]
        old, new = [a[q] for q in shared], [b[q] for q in shared]
        means, signs = statistics.compare_means(old, new), statistics.compare_signs(old, new)
        assert (means.n, means.difference) == (wanted["n"], pytest.approx(wanted["mean_diff"]))
        assert means.p == pytest.approx(wanted["p_t"], rel=1e-9)
        assert signs.p == pytest.approx(wanted["sign_test_p"], rel=1e-9)
        drawn = statistics.compare_bootstrap(old, new)
        assert (drawn.low, drawn.high) == pytest.approx(
            wanted["bootstrap_ci95_approx"], abs=2 * wanted["bootstrap_tol"]
        )


def test_signs_equal_statsmodels():
    rng = np.random.default_rng(4)
    old, new = rng.integers(0, 5, 80) / 4, rng.integers(1, 5, 80) / 4
    assert statistics.compare_signs(old, new).p == pytest.approx(sign_test(new - old)[1])
    assert statistics.compare_signs([0.1 + 0.2, 1.0], [0.3, 1.0]).p == 1.0  # rounding is no change


def test_the_bootstrap_equals_scipy():
    rng = np.random.default_rng(5)
    old, new = rng.integers(0, 5, 150) / 4, rng.integers(0, 6, 150).clip(0, 4) / 4
    found = statistics.compare_bootstrap(old, new, seed=1)
    reference = stats.bootstrap((new - old,), np.mean, n_resamples=20_000, method="percentile", rng=rng)
    noise = 5 * reference.standard_error * 0.03  # five errors of a .025 quantile of 10,000 draws
    assert (found.low, found.high) == pytest.approx(reference.confidence_interval, abs=noise)
    assert found.p == pytest.approx(stats.ttest_rel(new, old).pvalue, rel=0.3)
    assert found == statistics.compare_bootstrap(old, new, seed=1) != statistics.compare_bootstrap(old, new, seed=2)
    assert statistics.RESAMPLES >= 10_000


def test_the_bootstrap_in_parts_is_the_bootstrap(monkeypatch):
    rng = np.random.default_rng(6)
    old, new = rng.random(90), rng.random(90)
    whole = statistics.compare_bootstrap(old, new)
    monkeypatch.setattr(statistics, "CHUNK", 10_000)
    assert statistics.compare_bootstrap(old, new) == whole


@pytest.mark.parametrize("n", [1, 10, 300])
def test_rule_of_three_is_the_exact_bound_for_none(n):
    exact = stats.binomtest(0, n, alternative="less").proportion_ci(0.95, method="exact").high
    assert statistics.rule_of_three(n) == pytest.approx(exact)
    if n == 300:
        assert statistics.rule_of_three(n) == pytest.approx(3 / n, rel=0.01)


@pytest.mark.parametrize("n", [30, 100, 805])
def test_the_minimum_detectable_effect_equals_the_power_of_statsmodels(n):
    effect = TTestPower().solve_power(nobs=n, alpha=0.05, power=0.8)  # in standard deviations
    found = statistics.minimum_detectable_effect(1 / n**0.5, n - 1)
    assert found == pytest.approx(effect, rel=0.01)
    if n == 805:
        assert found == pytest.approx(2.8 / n**0.5, rel=0.003)
    values = np.random.default_rng(n).normal(size=n)
    mde = statistics.compare_means([0.0] * n, values).mde
    assert mde == pytest.approx(effect * values.std(ddof=1), rel=0.01)


@pytest.mark.parametrize("n", [50, 200, 650])
def test_without_spread_the_minimum_detectable_effect_is_the_sign_tests(n):
    still = statistics.compare_means([1.0] * n, [1.0] * n)
    moved = np.arange(n + 1)
    significant = np.array([stats.binomtest(k, k).pvalue < 0.05 if k else False for k in moved])
    power = stats.binom.pmf(moved, n, still.mde)[significant].sum()
    assert power == pytest.approx(0.8, abs=0.03)


def chance_of_leaving_zero_out(sizes, n, tail):
    """Exact, where every prompt that moves is as likely to gain as to lose: over all signs of the differences."""
    rest, found = [0.0] * (n - len(sizes)), 0.0
    if len(set(sizes)) == 1:  # then the number of gains says it all
        for gains in range(len(sizes) + 1):
            signs = [1.0] * gains + [-1.0] * (len(sizes) - gains)
            if statistics.bounds([*np.multiply(sizes, signs), *rest], tail).low > 0:
                found += stats.binom.pmf(gains, len(sizes), 0.5)
        return found
    every = itertools.product([1.0, -1.0], repeat=len(sizes))
    return np.mean([statistics.bounds([*np.multiply(sizes, signs), *rest], tail).low > 0 for signs in every])


@pytest.mark.parametrize("tail", [0.025, 0.0125, 0.005])
def test_bounds_keep_their_promise_exactly_on_right_and_wrong(tail):
    chances = [
        chance_of_leaving_zero_out([1.0] * moved, moved + still, tail)
        for still in (0, 2, 8, 90, 400)
        for moved in (*range(2, 20), 31, 56, 68, 200)
    ]
    assert max(chances) <= tail * (1 + 1e-9)
    assert max(chances) > 0.5 * tail  # and give little away


def test_bounds_keep_their_promise_exactly_on_few_prompts():
    rng = np.random.default_rng(7)
    for tail in (0.025, 0.0125, 0.005):
        for moved, still in [(3, 0), (5, 0), (7, 3), (9, 1), (10, 40)]:
            for _ in range(2):
                assert chance_of_leaving_zero_out(rng.integers(1, 5, moved) / 4, moved + still, tail) <= tail


def test_bounds_are_nearly_students_on_many_prompts():
    values = np.random.default_rng(7).normal(0.02, 0.3, 650)
    found = statistics.bounds(values, 0.0125)
    reference = stats.ttest_1samp(values, 0).confidence_interval(0.975)
    assert (found.low, found.high) == (pytest.approx(reference.low, rel=0.02), pytest.approx(reference.high, rel=0.02))
    assert found.low < reference.low < reference.high < found.high


def test_bounds_where_nothing_moved_are_the_rule_of_three():
    found = statistics.bounds([0.0] * 40, 0.05)
    assert (found.low, found.high) == (-statistics.rule_of_three(40), statistics.rule_of_three(40))


def of(difference, low, high, p, mde=0.03):
    return statistics.Comparison(difference, low, high, p, "paired t", 650, mde)


@pytest.mark.parametrize(
    ("comparison", "name"),
    [
        (of(0.05, 0.02, 0.08, 0.001), "better"),
        (of(-0.05, -0.08, -0.02, 0.001), "worse"),
        (of(0.01, -0.01, 0.03, 0.4), "no change that could be told"),
        (of(0.05, -0.01, 0.11, 0.1), "no change that could be told"),
        (of(0.025, 0.005, 0.045, 0.01), "no change that could be told"),  # below the minimum detectable effect
        (of(0.05, 0.02, 0.08, 0.06), "no change that could be told"),  # after Holm
        (of(0.0, 0.0, 0.0, 1.0), "no change that could be told"),
    ],
)
def test_only_what_could_be_told_has_a_name(comparison, name):
    assert called(comparison) == name
    assert ("improve" in worded(comparison)) is False


def test_a_comparison_in_words():
    assert worded(of(0.05, 0.02, 0.08, 0.001)) == "+5.0 points (+2.0 to +8.0, n = 650): better"
    assert worded(of(0.01, -0.01, 0.03, 0.4)) == (
        "+1.0 points (-1.0 to +3.0, n = 650): no change that could be told: the smallest that could is 3.0 points"
    )


def test_chance_is_rarely_called_better_or_worse():
    rng = np.random.default_rng(8)
    skill = rng.beta(1, 1, (2000, 200))
    old, new = rng.binomial(4, skill) / 4, rng.binomial(4, skill) / 4
    names = [called(statistics.compare_means(a, b)) for a, b in zip(old, new, strict=True)]
    assert np.mean([name != "no change that could be told" for name in names]) < 0.02


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for old, new in [([0.1] * 3, [0.3] * 3), ([0.0] * 3, [0.0] * 3), ([0.0, 1.0], [1.0, 0.0])]:
            statistics.compare_means(old, new)
            statistics.compare_bootstrap(old, new)
            statistics.bounds(np.subtract(new, old), 0.005)
