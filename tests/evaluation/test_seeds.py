"""Means over seeds and paired tests against scipy, statsmodels and a bootstrap written out."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from selfimprove.evaluation import seeds
from selfimprove.evaluation.statistics import holm


def scores(rng, seeds_of, prompts=300, gain=0.0):
    """Four answers to each prompt; prompts differ in difficulty and seeds in luck."""
    skill = np.random.default_rng(5).beta(2, 2, size=prompts)
    return {
        seed: dict(zip(map(str, range(prompts)), rng.binomial(4, np.clip(skill + gain, 0, 1)) / 4, strict=True))
        for seed in seeds_of
    }


@pytest.mark.parametrize("p", [[0.01, 0.04, 0.03, 0.005], [0.5], [], [0.02, 0.02, 0.9], [1.0, 0.6]])
def test_holm_equals_statsmodels(p):
    assert holm(p) == pytest.approx(list(multipletests(p, method="holm")[1]) if p else [])


def test_the_intervals_are_those_of_a_bootstrap_over_prompts():
    rng = np.random.default_rng(0)
    old, new = scores(rng, (0, 1, 2)), scores(rng, (0, 1, 2), gain=0.05)
    matrix = {name: np.array([list(of[s].values()) for s in of]) for name, of in (("old", old), ("new", new))}
    resampled = [rng.integers(0, 300, 300) for _ in range(20_000)]
    for found, columns in [
        (seeds.pooled(new).interval, matrix["new"].mean(axis=0)),
        (seeds.paired(old, new).comparison, (matrix["new"] - matrix["old"]).mean(axis=0)),
    ]:
        low, high = np.quantile([columns[picked].mean() for picked in resampled], [0.025, 0.975])
        assert found[0] == pytest.approx(columns.mean())
        assert (found.low, found.high) == (pytest.approx(low, abs=0.002), pytest.approx(high, abs=0.002))


def test_only_shared_seeds_are_compared_and_signs_are_counted():
    rng = np.random.default_rng(1)
    old, new = scores(rng, (0, 1, 2)), scores(rng, (1, 2, 3), gain=0.1)
    found = seeds.paired(old, new)
    assert list(found.per_seed) == [1, 2]
    before, after = [[(of[1][p] + of[2][p]) / 2 for p in of[1]] for of in (old, new)]
    assert found.comparison.p == pytest.approx(stats.ttest_rel(after, before).pvalue)
    assert np.mean(list(found.per_seed.values())) == pytest.approx(found.comparison.difference)
    assert found.same_sign == sum(value > 0 for value in found.per_seed.values())
    assert seeds.paired({0: old[0]}, {3: new[3]}) is None


def test_a_prompt_that_a_seed_lacks_counts_nowhere():
    both = {0: {"a": 1.0, "b": 0.0, "c": 1.0}, 1: {"b": 1.0, "c": 0.0}}
    told = seeds.pooled(both)
    assert (told.interval.value, told.interval.n) == (0.5, 2)
    assert told.per_seed == {0: 0.5, 1: 0.5}
