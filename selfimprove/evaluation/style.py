"""Arena-Hard v2's style control: Bradley-Terry with length and Markdown as covariates.

As the published program has it, with two of its faults mended: control of length alone or of Markdown alone leaves the
other columns of style out (upstream cuts the columns of the models), and intervals resample questions (upstream takes
the two orders of a question and the copies of a strong verdict for independent).
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from selfimprove.evaluation.bradley_terry import (
    BASELINE_ELO,
    SWAPPED,
    WORTH,
    Battle,
    Rating,
    models,
    strengths,
    wins_by_question,
)

Array = NDArray[np.float64]
Control = Literal["length", "markdown", "both"]
Difference = tuple[float, float, float, float]  # of length, headers, lists, bold

COLUMNS: Mapping[Control, slice] = {"length": slice(0, 1), "markdown": slice(1, 4), "both": slice(0, 4)}
CODE = re.compile("```([^`]*)```")
STEPS, TOLERANCE = 100, 1e-9
FARTHEST = 30.0  # logits of a battle; beyond it the likelihood has no maximum


class Style(NamedTuple):
    """An answer's style, as counts; Markdown in code blocks does not count."""

    tokens: int
    headers: int
    lists: int
    bold: int


class Controlled(NamedTuple):
    """Ratings under style control, with the coefficients of the columns that were controlled for, each in logits."""

    ratings: dict[str, Rating]
    coefficients: tuple[float, ...] | None


def style(text: str, tokens: int) -> Style:
    """The style of a text of so many tokens (upstream counts those of GPT-4o)."""
    prose = text
    for block in CODE.findall(text):  # as upstream: what stands between the fences goes, wherever else it stands too
        prose = prose.replace(block, "")
    return Style(
        tokens,
        len(re.findall(r"^#{1,6}\s", prose, re.MULTILINE)),
        len(re.findall(r"^\s*\d+\.\s", prose, re.MULTILINE)) + len(re.findall(r"^\s*[-*+]\s", prose, re.MULTILINE)),
        len(re.findall(r"\*\*[^*\n]+\*\*", prose)) + len(re.findall(r"__[^_\n]+__", prose)),
    )


def difference(first: Style, second: Style) -> Difference:
    """How the first answer's style differs from the second's, each number between -1 and 1: length, then Markdown."""
    both = first.tokens + second.tokens
    length = (first.tokens - second.tokens) / both if both else 0.0
    a, b = (np.array(one[1:]) / (one.tokens + 1) for one in (first, second))
    headers, lists, bold = (a - b) / (a + b + 1)
    return length, float(headers), float(lists), float(bold)


def controlled(
    battles: Sequence[Battle],
    differences: Sequence[Difference],
    baseline: str,
    control: Control,
    resamples: int = 100,
    seed: int = 0,
) -> Controlled:
    """Every model's win rate against the baseline at the mean style difference of all battles, as upstream has it.

    Args:
        battles: at least one; for a strong verdict three alike.
        differences: of the first answer from the second, for each battle.
        baseline: the model to compare with.
        control: which columns of style the model has.
        resamples: of the questions, for the intervals.
        seed: of the resamples.

    Raises:
        ValueError: the baseline is in no battle.
    """
    names = models(battles)
    if baseline not in names:
        raise ValueError(f"'{baseline}' is in no battle")
    finite = np.isfinite(strengths(wins_by_question(battles, names).sum(axis=0), names.index(baseline)))
    rated = [name for name, known in zip(names, finite, strict=True) if known and name != baseline]
    fought = Counter(name for battle in battles for name in (battle.first, battle.second))
    found: dict[str, Rating] = {name: Rating(None, None, None, None, fought[name]) for name in names}
    found[baseline] = Rating(50.0, None, None, BASELINE_ELO, fought[baseline])
    pairs = [
        _oriented(battle, difference, baseline)
        for battle, difference in zip(battles, differences, strict=True)
        if {battle.first, battle.second} <= {baseline, *rated}
    ]
    if not pairs:
        return Controlled(found, None)
    x, y = _design(pairs, rated, COLUMNS[control])
    best = _maximum(x, y, np.ones(len(y)))
    if best is None:
        return Controlled(found, None)
    rates = 100 * expit(_resampled(x, y, [battle.question for battle, _ in pairs], resamples, seed))
    for i, name in enumerate(rated):
        low, high = map(float, np.percentile(rates[:, i], [2.5, 97.5])) if len(rates) > 1 else (None, None)
        elo = BASELINE_ELO + 400 * float(best[i]) / math.log(10)
        found[name] = Rating(100 * float(expit(best[i])), low, high, elo, fought[name])
    return Controlled(found, tuple(map(float, best[len(rated) :])))


def _oriented(battle: Battle, difference: Difference, baseline: str) -> tuple[Battle, Difference]:
    """The same battle with the baseline second: z-scores depend on the side, and upstream has the model first."""
    if battle.first != baseline:
        return battle, difference
    turned = Battle(battle.question, battle.second, battle.first, SWAPPED[battle.winner])
    length, headers, lists, bold = difference
    return turned, (-length, -headers, -lists, -bold)


def _design(pairs: Sequence[tuple[Battle, Difference]], rated: Sequence[str], columns: slice) -> tuple[Array, Array]:
    """One row a battle, +1 and -1 for its models (the baseline has no column), then z-scores of style; who won."""
    column = {name: i for i, name in enumerate(rated)}
    signs = np.zeros((len(pairs), len(rated)))
    for row, (battle, _) in enumerate(pairs):
        signs[row, column[battle.first]] = 1
        if battle.second in column:
            signs[row, column[battle.second]] = -1
    told = np.array([difference for _, difference in pairs])[:, columns]
    spread = told.std(axis=0, ddof=1) if len(pairs) > 1 else np.zeros(told.shape[1])
    scores = np.divide(told - told.mean(axis=0), spread, out=np.zeros_like(told), where=spread > 0)
    return np.hstack([signs, scores]), np.array([WORTH[battle.winner] for battle, _ in pairs])


def _resampled(x: Array, y: Array, questions: Sequence[str], resamples: int, seed: int) -> Array:
    """Coefficients of the resamples of questions that have a maximum."""
    _, question = np.unique(questions, return_inverse=True)
    number = int(question.max()) + 1
    draws = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), resamples)
    found = [_maximum(x, y, draw[question].astype(float)) for draw in draws]
    return np.array([one for one in found if one is not None]).reshape(-1, x.shape[1])


def _maximum(x: Array, y: Array, weight: Array) -> Array | None:
    """The coefficients of a logistic regression without penalty, by Newton's method; None where it has no maximum."""
    b = np.zeros(x.shape[1])
    for _ in range(STEPS):
        q = expit(x @ b)
        hessian = x.T @ (x * (weight * q * (1 - q))[:, None])
        step = np.linalg.lstsq(hessian, x.T @ (weight * (y - q)), rcond=None)[0]
        farthest = float(np.abs(x @ step).max())
        if farthest < TOLERANCE:
            return b
        b = b + step / max(1.0, farthest)  # no battle by more than a logit at a time
        if float(np.abs(x @ b).max()) > FARTHEST:
            return None
    return None
