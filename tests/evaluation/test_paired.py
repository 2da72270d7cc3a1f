"""Paired tests of published benchmarks' expected values, beside statsmodels, and the coverage of their intervals."""

import gzip
import json

import numpy as np
import pytest
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar

from selfimprove.evaluation import paired
from selfimprove.evaluation.benchmarks import alpaca_lc, ratings
from selfimprove.evaluation.statistics import clustered_standard_error
from tests.paths import SHARED

DATA = SHARED / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not here")


@needs_data
def test_arena_bench():
    scores = {}
    with gzip.open(DATA / "arena_bench_v1" / "public" / "judgments.jsonl.gz", "rt") as file:
        for line in file:
            row = json.loads(line)
            scores.setdefault(row["model"], {})[row["question_id"]] = ratings.arena_bench_rating(row["judgment"])
    told = json.loads((DATA / "arena_bench_v1" / "public" / "expected_paired_tests.json").read_text())
    assert len(told) == 4
    for names, expected in told.items():
        a, b = (scores[name] for name in names.split("__vs__"))
        shared = [q for q in a if a[q] is not None and b.get(q) is not None]
        found = paired.paired_tests([a[q] for q in shared], [b[q] for q in shared])
        for ours, theirs in [
            ("n", "n"), ("mean_a", "mean_a"), ("mean_b", "mean_b"), ("difference", "mean_diff"),
            ("standard_error", "paired_se"), ("unpaired_standard_error", "unpaired_se"), ("correlation", "pearson_r"),
            ("t", "t"), ("p_t", "p_t"), ("wins", "win"), ("losses", "loss"), ("ties", "tie"), ("p_sign", "sign_test_p"),
            ("p_wilcoxon", "wilcoxon_p_default"),
        ]:  # fmt: skip
            assert getattr(found, ours) == pytest.approx(expected[theirs], rel=1e-9), (names, ours)
        assert (found.low, found.high) == pytest.approx(tuple(expected["bootstrap_ci95_approx"]), abs=0.02)


@needs_data
def test_clustered_error():
    told = json.loads((DATA / "alpaca_lc" / "public" / "clustered_se_example.json").read_text())
    judged = alpaca_lc.read_judged(DATA / "alpaca_lc" / "public" / f"{told['model']}.jsonl")
    lines = (DATA / "alpaca_lc" / "instruction_difficulty.csv").read_text().splitlines()[1:]
    clusters = [line.split(",")[1] for line in lines]
    found = clustered_standard_error(list(judged.preference - 1), clusters)
    assert found == pytest.approx(told["clustered_se_by_dataset"], abs=1e-9)


def test_clusters_of_one_are_no_clusters():
    values = np.random.default_rng(0).random(50)
    found = clustered_standard_error(list(values), range(50))
    assert found == pytest.approx(values.std() / 50**0.5)


@pytest.mark.parametrize(("only_a", "only_b", "both"), [(64, 293, 222), (3, 3, 9), (0, 7, 1)])
def test_mcnemar_is_that_of_statsmodels(only_a, only_b, both):
    a = [True] * only_a + [False] * only_b + [True] * both
    b = [False] * only_a + [True] * only_b + [True] * both
    found = paired.mcnemar(a, b)
    exact = reference_mcnemar([[both, only_a], [only_b, 0]], exact=True)
    chi2 = reference_mcnemar([[both, only_a], [only_b, 0]], exact=False, correction=True)
    assert found.p_exact == pytest.approx(exact.pvalue, rel=1e-9)
    assert (found.chi2, found.p_chi2) == (pytest.approx(chi2.statistic), pytest.approx(chi2.pvalue, rel=1e-9))


def test_no_difference_is_no_test():
    found = paired.paired_tests([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (found.t, found.p_t, found.p_wilcoxon, found.p_sign, found.low, found.high) == (None, None, None, 1.0, 0, 0)
    assert paired.mcnemar([True, False], [True, False])[-3:] == (1.0, None, None)
    for test in (paired.paired_tests, paired.mcnemar):
        with pytest.raises(ValueError, match="at least two"):
            test([1.0], [0.0])


def test_bootstrap_intervals_cover_the_truth_about_95_times_in_100():
    """2,000 experiments of 100 prompts with skewed differences."""
    rng = np.random.default_rng(3)
    differences = rng.exponential(1.0, (2000, 100)) - 0.7
    covered = []
    for seed, row in enumerate(differences):
        low, high = np.percentile(paired.bootstrap_means(row, 400, seed), [2.5, 97.5])
        covered.append(low <= 0.3 <= high)
    assert 0.93 <= np.mean(covered) <= 0.97
