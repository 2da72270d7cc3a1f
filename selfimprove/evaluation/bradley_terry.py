"""Bradley-Terry ratings from battles with ties, anchored at a baseline; the score of Arena-Hard v0.1.

A tie is half a win for each. The likelihood is maximised as the published program has scikit-learn do it (L-BFGS on the
mean loss over a design of ±ln 10), so that its figures come out to 1e-6 Elo and better. A rating is finite only where
wins lead both ways between a model and the baseline (Ford 1957); of the others the limit is known, or nothing is.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse import csgraph
from scipy.special import expit

Array = NDArray[np.float64]
Winner = Literal["first", "second", "tie"]
Label = Literal["A>>B", "A>B", "A=B", "B>A", "B>>A"]

BASELINE_ELO = 1000.0
STRONG = 3  # battles that a strong verdict, A>>B, counts for
OUTCOMES: Mapping[Label, tuple[Winner, int]] = {
    "A>>B": ("first", STRONG), "A>B": ("first", 1), "A=B": ("tie", 1), "B>A": ("second", 1), "B>>A": ("second", STRONG),
}  # fmt: skip
SWAPPED: Mapping[Winner, Winner] = {"first": "second", "second": "first", "tie": "tie"}
WORTH: Mapping[Winner, float] = {"first": 1.0, "second": 0.0, "tie": 0.5}


class Battle(NamedTuple):
    """Two models' answers to a question, and which one won."""

    question: str
    first: str
    second: str
    winner: Winner


class Rating(NamedTuple):
    """What is known of a model: None where nothing is, and an Elo of None where the likelihood has no maximum."""

    win_rate: float | None  # percent, against the baseline
    low: float | None  # of the 95 % interval of the win rate, questions resampled
    high: float | None
    elo: float | None
    battles: int


def battles_of_games(question: str, baseline: str, model: str, games: Sequence[Label | None]) -> list[Battle]:
    """The battles of Arena-Hard's two games: the baseline is A in the first and B in the second; None is no verdict."""
    battles = []
    for number, label in enumerate(games):
        if label is not None:
            winner, weight = OUTCOMES[label]
            battles += weight * [Battle(question, baseline, model, SWAPPED[winner] if number else winner)]
    return battles


def rate(battles: Sequence[Battle], baseline: str, resamples: int = 1000, seed: int = 0) -> dict[str, Rating]:
    """Every model's rating, the baseline's own among them.

    Args:
        battles: at least one.
        baseline: the model whose Elo is 1000.
        resamples: of the questions, with all battles of each, for the intervals: what hangs together stays together.
        seed: of the resamples.

    Raises:
        ValueError: the baseline is in no battle.
    """
    names = models(battles)
    if baseline not in names:
        raise ValueError(f"'{baseline}' is in no battle")
    anchor = names.index(baseline)
    wins = wins_by_question(battles, names)
    strength = strengths(wins.sum(axis=0), anchor)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(wins), np.full(len(wins), 1 / len(wins)), resamples)
    start = np.where(np.isfinite(strength), strength, 0.0)
    spread = np.array([chances(strengths(np.tensordot(draw, wins, 1), anchor, start)) for draw in draws])
    fought = wins.sum(axis=(0, 2)) + wins.sum(axis=(0, 1))
    found = {}
    for i, name in enumerate(names):
        low, high = (None, None) if name == baseline else _percentiles(spread[:, i])
        found[name] = Rating(
            _known(100 * float(chances(strength)[i])), low, high, _elo(float(strength[i])), round(float(fought[i]))
        )
    return found


def models(battles: Sequence[Battle]) -> list[str]:
    """The models that fought, those that came first before the others, in order."""
    return list(dict.fromkeys([*(battle.first for battle in battles), *(battle.second for battle in battles)]))


def wins_by_question(battles: Sequence[Battle], names: Sequence[str]) -> Array:
    """How often each model (second axis) beat each other one (third axis), for each question (first axis)."""
    number = {name: i for i, name in enumerate(names)}
    questions = {question: i for i, question in enumerate(dict.fromkeys(battle.question for battle in battles))}
    wins = np.zeros((len(questions), len(names), len(names)))
    for battle in battles:
        question, first, second = questions[battle.question], number[battle.first], number[battle.second]
        wins[question, first, second] += WORTH[battle.winner]
        wins[question, second, first] += 1 - WORTH[battle.winner]
    return wins


def strengths(wins: Array, anchor: int, start: Array | None = None) -> Array:
    """The models' strengths in decimal logits over the anchor's; ±inf is a limit, NaN is unknown.

    Args:
        wins: how often each model (row) beat each other one (column).
        anchor: the model whose strength is 0.
        start: where the search begins; 0 for everyone otherwise.
    """
    _, component = csgraph.connected_components(wins > 0, directed=True, connection="strong")
    inside = np.flatnonzero(component == component[anchor])
    found = np.full(len(wins), np.nan)
    begin = np.zeros(len(inside)) if start is None else start[inside]
    found[inside] = _maximum(wins[np.ix_(inside, inside)], int(np.flatnonzero(inside == anchor)[0]), begin)
    if len(inside) < len(wins):
        lost_to = np.isin(np.arange(len(wins)), csgraph.breadth_first_order(wins > 0, anchor)[0])
        won_over = np.isin(np.arange(len(wins)), csgraph.breadth_first_order((wins > 0).T, anchor)[0])
        found[lost_to & ~won_over] = -np.inf
        found[won_over & ~lost_to] = np.inf
    return found


def chances(strength: Array) -> Array:
    """P(the model beats the anchor)."""
    return np.asarray(expit(math.log(10) * strength))


def _maximum(wins: Array, anchor: int, start: Array) -> Array:
    """The maximum of the likelihood, which is there because everyone's wins lead to everyone."""
    first, second = np.nonzero(np.triu(wins + wins.T))
    won, total = wins[first, second], wins[first, second] + wins[second, first]
    if not len(first):
        return np.zeros(len(wins))
    design = np.zeros((len(first), len(wins)))
    design[np.arange(len(first)), first], design[np.arange(len(first)), second] = math.log(10), -math.log(10)

    def loss(b: Array) -> tuple[float, Array]:
        z = design @ b
        value = float((total * np.logaddexp(0, z) - won * z).sum() / total.sum())
        return value, np.asarray(design.T @ (total * expit(z) - won) / total.sum())

    options = {"maxiter": 1000, "maxls": 50, "gtol": 1e-8, "ftol": 64 * np.finfo(float).eps}  # scikit-learn's
    found = np.asarray(minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x)
    return np.asarray(found - found[anchor])


def _elo(strength: float) -> float | None:
    return BASELINE_ELO + 400 * strength if math.isfinite(strength) else None


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _percentiles(values: Array) -> tuple[float | None, float | None]:
    """The 95 % interval over the resamples in which something is known."""
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return None, None
    low, high = np.percentile(100 * values, [2.5, 97.5])
    return float(low), float(high)
