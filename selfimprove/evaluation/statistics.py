"""Intervals and paired tests over per-prompt scores, by scipy."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


class Comparison(NamedTuple):
    """A paired difference (new - old) on the same prompts, with its 95 % interval and two-sided p-value."""

    difference: float
    low: float
    high: float
    p: float
    test: str
    n: int


def proportion(outcomes: Sequence[float]) -> Interval:
    """Share of ones among 0/1 outcomes with the Wilson interval."""
    wins, n = round(sum(outcomes)), len(outcomes)
    bounds = stats.binomtest(wins, n).proportion_ci(method="wilson")
    return Interval(wins / n, float(bounds.low), float(bounds.high), n)


def clustered_mean(per_prompt: Sequence[float]) -> Interval:
    """Mean of per-prompt means; the interval counts prompts, not samples (arXiv 2411.00640), by Student's t.

    Where every prompt scores 0, or every one 1, there is no spread to go by: Wilson's interval over prompts then.
    """
    values = np.asarray(per_prompt, dtype=float)
    if len(values) >= 2 and (not values.any() or (values.all() and (values == 1).all())):
        return proportion(per_prompt)
    mean, half = _mean_and_half_width(values)
    return Interval(mean, max(0.0, mean - half), min(1.0, mean + half), len(values))


def mean(per_prompt: Sequence[float]) -> Interval:
    """Mean of per-prompt scores on any scale, with Student's interval over prompts."""
    values = np.asarray(per_prompt, dtype=float)
    middle, half = _mean_and_half_width(values)
    return Interval(middle, middle - half, middle + half, len(values))


def compare_binary(old: Sequence[float], new: Sequence[float]) -> Comparison:
    """McNemar's exact test on 0/1 outcomes: two-sided binomial on the discordant pairs."""
    before, after = np.asarray(old), np.asarray(new)
    gained, lost = int(((after == 1) & (before == 0)).sum()), int(((after == 0) & (before == 1)).sum())
    p = float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    mean, half = _mean_and_half_width(after - before)
    return Comparison(mean, mean - half, mean + half, p, "McNemar exact", len(before))


def compare_means(old: Sequence[float], new: Sequence[float]) -> Comparison:
    """Paired t-test on per-prompt means."""
    difference = np.asarray(new, dtype=float) - np.asarray(old, dtype=float)
    mean, half = _mean_and_half_width(difference)
    p = float(stats.ttest_1samp(difference, 0.0).pvalue) if difference.any() else 1.0
    return Comparison(mean, mean - half, mean + half, p, "paired t", len(difference))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the p-values of a family, each fit to be held against the level of one test."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    corrected, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = highest
    return corrected


def clustered_standard_error(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Standard error of a mean whose items hang together in clusters (arXiv 2411.00640, section 2.2).

    Turns of a dialogue, instructions of a prompt, orders of a pair: what shares a cluster is not independent.
    """
    items = np.asarray(values, dtype=float)
    sums: dict[Hashable, float] = {}
    for deviation, cluster in zip(items - items.mean(), clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + float(deviation)
    return float(sum(total**2 for total in sums.values()) ** 0.5 / len(items))


def _mean_and_half_width(values: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> tuple[float, float]:
    n = len(values)
    if n < 2:
        raise ValueError("an interval needs at least two prompts")
    error = float(values.std(ddof=1)) / n**0.5
    return float(values.mean()), float(stats.t.ppf(0.975, n - 1)) * error
