"""AlpacaEval 2: raw and length-controlled win rates (arXiv 2404.04475), over arrays with one entry a prompt.

The published figures are those of `alpaca-eval` 0.6.6. Its three generalised linear models are here:

- `length_controlled_v1`: the tanh of the length difference, the instruction's difficulty and a constant, with the
  answers of two gamed baselines as regularisation; a gamma and gamed rows are given.
- `length_controlled_noreg`: without the gamed rows.
- `length_controlled_minimal`: without difficulty either; for prompts of one's own.

The optimum is converged, where the published program's liblinear stops early: at the published C the figures differ by
up to 0.016 points.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from selfimprove.evaluation.soft_logistic import fit, sigmoid

Array = NDArray[np.float64]

LAMBDA = 0.2  # weight of the gamed rows: each has this over the number of gamed baselines
CS = np.logspace(-4, 4, 10)
FOLDS = 5
CHUNK = 4_000_000  # numbers in an array of resamples at a time: 32 MB


class RawWinRate(NamedTuple):
    """The win rate before lengths are looked at, in percent, over the preferences that can be read."""

    win_rate: float
    standard_error: float | None  # of one preference there is none
    n_wins: int
    n_wins_base: int
    n_draws: int
    n_total: int
    discrete_win_rate: float


class Gamed(NamedTuple):
    """The regularisation rows: what the judge makes of answers that are gamed by length alone."""

    scaled: Array  # length difference over its standard deviation, per gamed baseline
    gamma: Array
    p: Array  # P(the gamed answer is better)
    models: int


class Rows(NamedTuple):
    """A model's judged answers; one entry a row, in order."""

    delta: Array  # characters of the baseline's answer minus those of the model's
    p: Array  # P(the model's answer is better); NaN could not be read
    gamma: Array | None  # the instruction's difficulty; None leaves it out of the model


class LengthControlled(NamedTuple):
    """The win rate that would be expected had all answers the baselines' lengths, in percent."""

    win_rate: float
    prediction_spread: float | None  # what is published as lc_standard_error: not the sampling error
    c: float  # inverse strength of the L1 penalty
    coefficients: tuple[float, ...]  # of the length, of gamma where it is there, of the constant


class Bootstrap(NamedTuple):
    """The sampling error of a length-controlled win rate: the model fitted anew to each resample of prompts."""

    standard_error: float
    low: float  # of the 95 % percentile interval
    high: float
    resamples: int


def chance(preference: Array) -> Array:
    """P(the model's answer is better) from AlpacaEval's preferences (1 the baseline, 2 the model, 0 a tie).

    What is outside the scale is NaN.
    """
    p = np.where(preference == 0, 1.5, preference) - 1
    return np.where((p >= 0) & (p <= 1), p, np.nan)


def raw_win_rate(preference: Array) -> RawWinRate:
    """AlpacaEval's own figures.

    Raises:
        ValueError: no preference can be read.
    """
    p = chance(preference)
    p = p[~np.isnan(p)]
    if not len(p):
        raise ValueError("a win rate needs a preference")
    return RawWinRate(
        win_rate=100 * float(p.mean()),
        standard_error=_standard_error(p),
        n_wins=int((p > 0.5).sum()),
        n_wins_base=int((p < 0.5).sum()),
        n_draws=int((p == 0.5).sum()),
        n_total=len(p),
        discrete_win_rate=100 * float(np.mean((p > 0.5) + 0.5 * (p == 0.5))),
    )


def length_controlled(rows: Rows, gamed: Gamed | None = None, c: float | None = None) -> LengthControlled:
    """The length-controlled win rate.

    A row whose preference could not be read has no part in the fit, and one in the mean, as in the published program.

    Args:
        rows: of the model.
        gamed: regularisation rows; they need a gamma in `rows`.
        c: inverse strength of the L1 penalty; by 5-fold cross-validation otherwise.

    Raises:
        ValueError: lengths that all differ by the same, no preference that can be read (fewer than five, without a C),
            or gamed rows without a gamma.
        ArithmeticError: no optimum is found: a few separable rows with hardly a penalty.
    """
    x, p, weight = _design(rows, gamed, np.ones((1, len(rows.p))))
    if c is None:
        c = cross_validated(x[0], p, weight[0])
    found = fit(x, p, weight, c)
    predicted = _predicted(found, rows.gamma)[0]
    spread = _standard_error(predicted)
    return LengthControlled(100 * float(predicted.mean()), spread, float(c), tuple(map(float, found[0])))


def bootstrap(rows: Rows, gamed: Gamed | None, c: float, resamples: int = 1000, seed: int = 0) -> Bootstrap:
    """How far the length-controlled win rate would spread over other prompts.

    Prompts are drawn with replacement; lengths are scaled and the model is fitted anew each time, with the same C and
    the same gamed rows.
    """
    rng = np.random.default_rng(seed)
    n = len(rows.p)
    start = fit(*_design(rows, gamed, np.ones((1, n))), c)
    size = max(1, CHUNK // (4 * (n + (0 if gamed is None else len(gamed.p)))))
    rates: list[Array] = []
    for first in range(0, resamples, size):
        counts = rng.multinomial(n, np.full(n, 1 / n), min(size, resamples - first)).astype(float)
        found = fit(*_design(rows, gamed, counts), c, start)
        rates.append((_predicted(found, rows.gamma) * counts).sum(axis=1) / n)
    every = 100 * np.concatenate(rates)
    low, high = np.percentile(every, [2.5, 97.5])
    return Bootstrap(float(every.std(ddof=1)), float(low), float(high), resamples)


def cross_validated(x: Array, p: Array, weight: Array) -> float:
    """The C of `CS` with the least log-loss over five folds; rows go to folds in turn, gamed rows first.

    Raises:
        ValueError: fewer rows than folds.
    """
    if len(p) < FOLDS:
        raise ValueError(f"cross-validation needs {FOLDS} rows")
    fold = np.arange(len(p)) % FOLDS
    kept = np.stack([weight * (fold != held) for held in range(FOLDS)])
    left = np.stack([(fold == held) / (fold == held).sum() * weight for held in range(FOLDS)])
    every = np.broadcast_to(x, (FOLDS, *x.shape))
    scores, found = [], np.zeros((FOLDS, x.shape[1]))
    for c in CS:
        found = fit(every, p, kept, c, found)
        z = np.einsum("bnk,bk->bn", every, found)
        scores.append(-float((left * (np.logaddexp(0, z) - p * z)).sum()))
    return float(CS[int(np.argmax(scores))])


def scaled_lengths(delta: Array, counts: Array) -> Array:
    """Length differences over their standard deviation (not centred), for each of several weightings of the rows.

    Where a weighting leaves no spread there is nothing to control for, and they are 0.

    Raises:
        ValueError: they are all the same, and not zero.
    """
    if delta.any() and not np.ptp(delta):
        raise ValueError("all answers differ from the baseline's by the same length")
    n = counts.sum(axis=1, keepdims=True)
    mean = (counts * delta).sum(axis=1, keepdims=True) / n
    variance = (counts * (delta - mean) ** 2).sum(axis=1, keepdims=True) / (n - 1)
    spread = np.sqrt(np.where(variance > 0, variance, np.inf))
    return np.asarray(delta / spread)


def _design(rows: Rows, gamed: Gamed | None, counts: Array) -> tuple[Array, Array, Array]:
    """Features (B, n, k), targets (n) and weights (B, n) of B weightings; rows that cannot be read are left out."""
    read = ~np.isnan(rows.p)
    if not read.any():
        raise ValueError("a win rate needs a preference")
    length = np.tanh(scaled_lengths(rows.delta, counts))[:, read]
    columns = [length]
    if rows.gamma is not None:
        columns.append(np.broadcast_to(rows.gamma[read], length.shape))
    x = np.stack([*columns, np.ones(length.shape)], axis=-1)
    if gamed is None:
        return x, rows.p[read], counts[:, read]
    if rows.gamma is None:
        raise ValueError("gamed rows need a gamma")
    own = np.stack([np.tanh(gamed.scaled), gamed.gamma, np.zeros(len(gamed.p))], axis=-1)
    weight = np.full((len(counts), len(gamed.p)), LAMBDA / gamed.models)
    return (
        np.concatenate([np.broadcast_to(own, (len(counts), *own.shape)), x], axis=1),
        np.concatenate([gamed.p, rows.p[read]]),
        np.concatenate([weight, counts[:, read]], axis=1),
    )


def _predicted(coefficients: Array, gamma: Array | None) -> Array:
    """P(the model's answer is better) of each row were its length the baseline's."""
    constant = coefficients[:, -1:]
    return np.asarray(sigmoid(constant if gamma is None else constant + coefficients[:, 1:2] * gamma))


def _standard_error(values: Array) -> float | None:
    return 100 * float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else None
