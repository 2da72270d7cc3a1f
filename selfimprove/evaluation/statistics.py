"""Intervals and paired tests over per-prompt scores, by scipy.

Scores and differences are shares: 1 is every prompt right, 0.01 is one point. Where nothing varied, the bounds take it
that a score lies between 0 and 1. Every interval here is a 95 % one; docs/evaluation.md says what each means.
"""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special, stats

Values = npt.NDArray[np.float64]

TAIL = 0.025  # on each side of a 95 % interval
POWER = 0.8
RESAMPLES = 10_000
CHUNK = 1_000_000  # prompts that the bootstrap draws at once: some 12 MB
ROUNDING = 1e-12  # a difference or a standard error below this is none


class Interval(NamedTuple):
    """A mean with its 95 % interval; n counts what is independent: prompts, or clusters."""

    value: float
    low: float
    high: float
    n: int


class Comparison(NamedTuple):
    """A paired difference (new - old) on the same prompts, with its 95 % interval and two-sided p-value.

    `mde`, the minimum detectable effect, is the smallest true difference that such a comparison shows 4 times in 5.
    """

    difference: float
    low: float
    high: float
    p: float
    test: str
    n: int
    mde: float


# --- one score ---------------------------------------------------------------------------------------------------


def proportion(outcomes: Sequence[float]) -> Interval:
    """Share of ones among 0/1 outcomes with the Wilson interval."""
    wins, n = round(sum(outcomes)), len(outcomes)
    bounds = stats.binomtest(wins, n).proportion_ci(method="wilson")
    return Interval(wins / n, float(bounds.low), float(bounds.high), n)


def clustered_mean(per_prompt: Sequence[float]) -> Interval:
    """Mean of per-prompt means; the interval counts prompts, not samples (arXiv 2411.00640), by Student's t.

    Where every prompt scores 0, or every one 1, there is no spread to go by: Wilson's interval over prompts then. Where
    all have the same score between: as far as prompts that were not seen could move it, by `rule_of_three`.

    Raises:
        ValueError: fewer than two prompts.
    """
    values = np.asarray(per_prompt, dtype=float)
    return _mean(values, _error(values), len(values))


def mean(per_prompt: Sequence[float]) -> Interval:
    """Mean of per-prompt scores that are no shares, such as ratings, by Student's t; without spread, without width.

    Raises:
        ValueError: fewer than two prompts.
    """
    values = np.asarray(per_prompt, dtype=float)
    middle, half = float(values.mean()), float(special.stdtrit(len(values) - 1, 1 - TAIL)) * _error(values)
    return Interval(middle, middle - half, middle + half, len(values))


def mean_of_scores(per_prompt: Sequence[float]) -> Interval:
    """The mean of whatever a judge gives: `clustered_mean` of shares, `mean` of scores that leave 0 to 1."""
    return clustered_mean(per_prompt) if all(0 <= score <= 1 for score in per_prompt) else mean(per_prompt)


def score(one_a_prompt: Sequence[float]) -> Interval:
    """The same of one score a prompt: `proportion` where each is 0 or 1."""
    return proportion(one_a_prompt) if set(one_a_prompt) <= {0, 1} else mean_of_scores(one_a_prompt)


def mean_over_clusters(values: Sequence[float], clusters: Sequence[Hashable]) -> Interval:
    """Mean of values that hang together in clusters: the instructions of one prompt, the turns of a dialogue.

    Student's t with as many degrees of freedom as clusters, less one; the standard error times sqrt(C / (C - 1)),
    like statsmodels and Stata. Clusters of one size give what `clustered_mean` gives on their means. With few clusters
    of very different sizes it is too narrow.

    Raises:
        ValueError: fewer than two clusters.
    """
    array = np.asarray(values, dtype=float)
    number = len(set(clusters))
    return _mean(array, _corrected(array, clusters), number)


def clustered_standard_error(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """The standard error of a mean with clusters: the root of the sum of squared cluster sums about the mean, over n.

    Miller 2024, arXiv 2411.00640, equation 4; no correction for a small number of clusters.
    """
    array = np.asarray(values, dtype=float)
    places = {cluster: place for place, cluster in enumerate(dict.fromkeys(clusters))}
    sums = np.bincount([places[cluster] for cluster in clusters], array - array.mean())
    return float(np.sqrt((sums**2).sum())) / len(array)


def rule_of_three(n: int, tail: float = 0.05) -> float:
    """The share that something could have, though none was seen among n; wrong with a chance of at most `tail`.

    1 - tail ** (1 / n), about 3 / n: Hanley and Lippman-Hand, JAMA 249 (1983); Clopper and Pearson's bound for 0 of n.
    """
    return float(1 - tail ** (1 / n))


# --- two scores of the same prompts ------------------------------------------------------------------------------


def compare_binary(old: Sequence[float], new: Sequence[float]) -> Comparison:
    """McNemar's exact test on 0/1 outcomes: two-sided binomial on the discordant pairs; interval as in `compare_means`.

    Raises:
        ValueError: fewer than two prompts.
    """
    return _compared(_differences(old, new), "McNemar exact")


def compare_scores(old: Sequence[float], new: Sequence[float]) -> Comparison:
    """`compare_binary` of one score a prompt where each is 0 or 1, else `compare_means`."""
    return (compare_binary if {*old, *new} <= {0, 1} else compare_means)(old, new)


def compare_means(old: Sequence[float], new: Sequence[float]) -> Comparison:
    """Paired t-test on per-prompt means; where all differences are equal, the sign test's p.

    Raises:
        ValueError: fewer than two prompts.
    """
    return _compared(_differences(old, new), "paired t")


def compare_signs(old: Sequence[float], new: Sequence[float]) -> Comparison:
    """The sign test: two-sided binomial on the prompts that differ, without ties; interval as in `compare_means`.

    Raises:
        ValueError: fewer than two prompts.
    """
    return _compared(_differences(old, new), "sign")


def compare_clustered(old: Sequence[float], new: Sequence[float], clusters: Sequence[Hashable]) -> Comparison:
    """The paired difference where values of a cluster hang together; see `mean_over_clusters`. n counts clusters.

    Raises:
        ValueError: fewer than two clusters.
    """
    difference = _differences(old, new)
    return _compared(difference, "clustered t", _corrected(difference, clusters), len(set(clusters)))


def compare_bootstrap(
    old: Sequence[float], new: Sequence[float], seed: int = 0, resamples: int = RESAMPLES
) -> Comparison:
    """Paired bootstrap: prompts are drawn again with all that belongs to them; p by inversion of percentiles.

    The percentiles are those that make the interval as wide as Student's t on normal data, Hesterberg's expanded ones
    (arXiv 1411.5279): the plain 2.5th and 97.5th are too narrow on few prompts.

    Raises:
        ValueError: fewer than two prompts.
    """
    difference = _differences(old, new)
    plain = _compared(difference, "paired bootstrap")
    if _error(difference) < ROUNDING:
        return plain
    rng, n = np.random.default_rng(seed), len(difference)
    rows = max(1, CHUNK // n)
    sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    means = np.concatenate([difference[rng.integers(n, size=(of, n), dtype=np.int32)].mean(axis=1) for of in sizes])
    tail = float(special.ndtr(special.stdtrit(n - 1, TAIL) * math.sqrt(n / (n - 1))))
    low, high = np.quantile(means, [tail, 1 - tail])
    beyond = min(int((means <= 0).sum()), int((means >= 0).sum()))
    p = min(1.0, 2 * (beyond + 1) / (resamples + 1))
    return plain._replace(low=float(low), high=float(high), p=p)


class Bounds(NamedTuple):
    """A paired difference between two bounds, each wrong with a chance of at most the tail that was asked for."""

    difference: float
    low: float
    high: float
    n: int
    mde: float


def bounds(difference: Sequence[float] | Values, tail: float) -> Bounds:
    """Bounds on the mean of paired differences that hold in far tails, on few prompts, and where few of them moved.

    Student's t, with three cautions: the error is taken about zero, not about the mean; the degrees of freedom are the
    differences that are not zero, less one; and the smallest of these is given away, as Edwards' correction does in
    McNemar's test. Where a prompt is as likely to gain as to lose, no bound then leaves zero out more often than `tail`
    (exact, by enumeration: tests/evaluation/test_statistics.py). Where no prompt moved: `rule_of_three`.

    Raises:
        ValueError: fewer than two prompts.
    """
    values: Values = np.asarray(difference, dtype=float)
    n, sizes = len(values), np.abs(values)
    moved = sizes[sizes > ROUNDING]
    if n < 2 or not len(moved):
        still = _compared(values, "none moved", tail=tail)
        return Bounds(still.difference, still.low, still.high, n, still.mde)
    mean, error, freedom = float(values.mean()), math.sqrt(float(values @ values)) / n, max(1, len(moved) - 1)
    step = float(moved.min()) / n
    half = float(special.stdtrit(freedom, 1 - tail)) * error + step
    mde = min(1.0, minimum_detectable_effect(error, freedom, tail) + step)
    return Bounds(mean, max(-1.0, mean - half), min(1.0, mean + half), n, mde)


def minimum_detectable_effect(error: float, freedom: float, tail: float = TAIL, power: float = POWER) -> float:
    """The smallest true difference whose bound at `tail` leaves zero out with the given power, in the units of `error`.

    (t(1 - tail) + t(power)) * error, 2.8 standard errors for 95 % and .8 (arXiv 2411.00640, section 5). Its error comes
    from the data at hand: another data set of the same kind says it a little differently.
    """
    return float(special.stdtrit(freedom, 1 - tail) + special.stdtrit(freedom, power)) * error


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the p-values of a family, each fit to be held against the level of one test."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    corrected, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = highest
    return corrected


# --- the parts ---------------------------------------------------------------------------------------------------


def _differences(old: Sequence[float], new: Sequence[float]) -> Values:
    before: Values = np.asarray(old, dtype=float)
    after: Values = np.asarray(new, dtype=float)
    if before.shape != after.shape:
        raise ValueError("a paired comparison needs the same prompts twice")
    return np.subtract(after, before)


def _error(values: Values) -> float:
    if len(values) < 2:
        raise ValueError("an interval needs at least two prompts")
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def _corrected(values: Values, clusters: Sequence[Hashable]) -> float:
    number = len(set(clusters))
    if number < 2:
        raise ValueError("an interval needs at least two clusters")
    return clustered_standard_error(values.tolist(), clusters) * math.sqrt(number / (number - 1))


def _mean(values: Values, error: float, n: int) -> Interval:
    mean = float(values.mean())
    if error >= ROUNDING:
        half = float(special.stdtrit(n - 1, 1 - TAIL)) * error
        return Interval(mean, max(0.0, mean - half), min(1.0, mean + half), n)
    if mean in (0.0, 1.0):
        return proportion([mean] * n)
    unseen = rule_of_three(n, TAIL)
    return Interval(mean, mean * (1 - unseen), mean + (1 - mean) * unseen, n)


def _compared(
    difference: Values, test: str, error: float | None = None, n: int | None = None, tail: float = TAIL
) -> Comparison:
    error, n = _error(difference) if error is None else error, n or len(difference)
    mean = float(difference.mean())
    if error < ROUNDING:  # every prompt moved alike: those that were not seen could move as far as scores go
        unseen, reach = rule_of_three(n, tail), max(1.0, abs(mean))
        low, high = mean - unseen * (mean + reach), mean + unseen * (reach - mean)
        return Comparison(mean, low, high, _signs(difference), test, n, _mde_without_spread(n, tail))
    half = float(special.stdtrit(n - 1, 1 - tail)) * error
    by_signs = test in ("McNemar exact", "sign")
    p = _signs(difference) if by_signs else 2 * float(special.stdtr(n - 1, -abs(mean) / error))
    return Comparison(mean, mean - half, mean + half, p, test, n, minimum_detectable_effect(error, n - 1, tail))


def _signs(difference: Values) -> float:
    gained, lost = int((difference > ROUNDING).sum()), int((difference < -ROUNDING).sum())
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def _mde_without_spread(n: int, tail: float) -> float:
    """The expected share of gained prompts, none lost, of which the sign test sees enough with POWER (Poisson)."""
    enough = np.ceil(-np.log2(tail))
    return float(min(1.0, stats.chi2.ppf(POWER, 2 * enough) / 2 / n))
