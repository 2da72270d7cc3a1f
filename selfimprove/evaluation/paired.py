"""Two models on the same prompts: every test that published comparisons report, by scipy."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CHUNK = 5_000_000  # prompts drawn at a time


class PairedTests(NamedTuple):
    """The difference b - a; a win is a prompt on which b is better. None where there is no spread to test."""

    n: int
    mean_a: float
    mean_b: float
    difference: float
    standard_error: float
    unpaired_standard_error: float
    correlation: float | None
    t: float | None
    p_t: float | None
    wins: int
    losses: int
    ties: int
    p_sign: float
    p_wilcoxon: float | None
    low: float  # of the 95 % bootstrap interval, prompts resampled
    high: float


class McNemar(NamedTuple):
    """Two models' right answers to the same problems."""

    n: int
    only_a: int
    only_b: int
    difference: float  # of accuracies, b - a
    standard_error: float
    unpaired_standard_error: float
    p_exact: float
    chi2: float | None  # with continuity correction; None without discordant problems
    p_chi2: float | None


def paired_tests(a: Sequence[float], b: Sequence[float], resamples: int = 10_000, seed: int = 0) -> PairedTests:
    """Student's, the sign and Wilcoxon's test of b - a, and its bootstrap interval.

    Raises:
        ValueError: fewer than two prompts.
    """
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    difference = second - first
    n = len(difference)
    if n < 2:
        raise ValueError("a paired test needs at least two prompts")
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    varies = bool(difference.std() > 0)
    t = stats.ttest_rel(second, first) if varies else None
    both_vary = first.std() > 0 and second.std() > 0
    low, high = np.percentile(bootstrap_means(difference, resamples, seed), [2.5, 97.5])
    return PairedTests(
        n=n,
        mean_a=float(first.mean()),
        mean_b=float(second.mean()),
        difference=float(difference.mean()),
        standard_error=float(difference.std(ddof=1) / n**0.5),
        unpaired_standard_error=float(((first.var(ddof=1) + second.var(ddof=1)) / n) ** 0.5),
        correlation=float(stats.pearsonr(first, second).statistic) if both_vary else None,
        t=None if t is None else float(t.statistic),
        p_t=None if t is None else float(t.pvalue),
        wins=wins,
        losses=losses,
        ties=n - wins - losses,
        p_sign=float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0,
        p_wilcoxon=float(stats.wilcoxon(difference).pvalue) if wins + losses else None,
        low=float(low),
        high=float(high),
    )


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> McNemar:
    """McNemar's exact test and his chi-squared one with continuity correction.

    Raises:
        ValueError: fewer than two problems.
    """
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    n = len(first)
    if n < 2:
        raise ValueError("a paired test needs at least two problems")
    only_a, only_b = int(((first == 1) & (second == 0)).sum()), int(((first == 0) & (second == 1)).sum())
    chi2 = (abs(only_a - only_b) - 1) ** 2 / (only_a + only_b) if only_a + only_b else None
    return McNemar(
        n=n,
        only_a=only_a,
        only_b=only_b,
        difference=float((second - first).mean()),
        standard_error=float((second - first).std(ddof=1) / n**0.5),
        unpaired_standard_error=float(((first.var(ddof=1) + second.var(ddof=1)) / n) ** 0.5),
        p_exact=float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0,
        chi2=chi2,
        p_chi2=None if chi2 is None else float(stats.chi2.sf(chi2, 1)),
    )


def bootstrap_means(values: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """The means of resamples of prompts."""
    rng = np.random.default_rng(seed)
    size = max(1, CHUNK // len(values))
    parts = [
        values[rng.integers(0, len(values), (min(size, resamples - first), len(values)))].mean(axis=1)
        for first in range(0, resamples, size)
    ]
    return np.concatenate(parts)
