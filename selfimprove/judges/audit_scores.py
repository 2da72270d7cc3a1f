"""How far a judge of single answers can be trusted: length, ties, leniency from round to round, a second opinion.

Pure functions over scores; an unknown score is left out of every figure and counted. Lengths are in characters.
"""

import itertools
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from selfimprove.judges.audit import Rate, Winner, kappa, rate, share

if TYPE_CHECKING:
    import numpy as np

    Numbers = np.ndarray[Any, np.dtype[np.float64]]
    Places = np.ndarray[Any, np.dtype[np.int64]]


AT_ONCE = 65_536  # prompts whose answers are ranked at a time


class Scored(NamedTuple):
    """An answer and its score, or None and why."""

    prompt_id: str
    length: int
    score: float | None
    reason: str = ""


class Correlations(NamedTuple):
    """Between score and length; None where one of them does not vary."""

    spearman: float | None
    pearson: float | None


class ScoreAudit(NamedTuple):
    """What `audit` finds."""

    n: int
    mean: float | None
    sd: float | None  # n - 1
    unknown: Rate | None
    reasons: dict[str, int]  # of the unknown ones
    ties: Rate | None  # two answers to a prompt with the same score, among all such two
    length: Correlations  # over all answers
    length_within: Correlations  # within prompts: hard prompts with long answers do not count as bias


class Comparison(NamedTuple):
    """Two scorings of the same answers: by one judge asked twice (A/A), or by two judges."""

    n: int  # answers that both have scored
    unknown: int  # answers that only one of them, or none, has
    differ: Rate | None  # answers with another score
    mean_difference: float | None  # absolute; of two judges only as good as their scales are the same
    order: Rate | None  # two answers to a prompt: the same one is better, or a tie in both
    flipped: Rate | None  # two answers to a prompt: the other one is better
    kappa: float | None  # Cohen's, over better, worse and tie
    spearman: float | None  # of the scores


class Drift(NamedTuple):
    """How a judge's scores of the same answers, the anchors, have moved since an earlier round."""

    n: int  # anchors scored in both rounds
    unknown: int
    before: float | None  # mean score
    after: float | None
    rise: float | None
    effect: float | None  # the rise in standard deviations of the earlier scores
    p: float | None  # of a rise as large by chance: sign-flip permutation, one-sided
    alarm: bool | None  # the judge has grown lenient; None with too few anchors to tell


class Scores:
    """Scores of answers as columns, 24 bytes an answer; those of a prompt come one after the other."""

    def __init__(self) -> None:
        self.prompts, self.lengths, self.scores = array("q"), array("d"), array("d")  # of the known ones
        self.n = 0
        self.reasons: Counter[str] = Counter()  # of the unknown ones
        self._number, self._prompt = -1, ""  # of the last prompt

    def extend(self, answers: Iterable[Scored]) -> None:
        """Take more."""
        for prompt, length, score, reason in answers:
            self.n += 1
            if prompt != self._prompt or self._number < 0:
                self._number, self._prompt = self._number + 1, prompt
            if score is None:
                self.reasons[reason] += 1
            else:
                self.prompts.append(self._number)
                self.lengths.append(length)
                self.scores.append(score)

    def audit(self) -> "ScoreAudit":
        """Audit them."""
        import numpy as np

        scores, lengths, prompts = np.array(self.scores), np.array(self.lengths), np.array(self.prompts)
        known, unknown = len(scores), self.reasons.total()
        groups = list(_by_size(prompts))
        pairs = sum(rows.shape[0] * math.comb(rows.shape[1], 2) for rows in groups)
        ties = sum(_ties(scores[rows]) for rows in groups)
        return ScoreAudit(
            n=self.n,
            mean=float(scores.mean()) if known else None,
            sd=float(scores.std(ddof=1)) if known > 1 else None,
            unknown=share(unknown / self.n, self.n) if self.n else None,
            reasons=dict(self.reasons.most_common()),
            ties=share(ties / pairs, pairs) if pairs else None,
            length=Correlations(_pearson(_ranked(scores), _ranked(lengths)), _pearson(scores, lengths)),
            length_within=Correlations(
                _pearson(_within(groups, scores, ranked=True), _within(groups, lengths, ranked=True)),
                _pearson(_within(groups, scores), _within(groups, lengths)),
            ),
        )


def audit(answers: Sequence[Scored]) -> ScoreAudit:
    """Audit a judge's scores; the answers of a prompt may stand anywhere."""
    by_prompt: dict[str, list[Scored]] = {}
    for answer in answers:
        by_prompt.setdefault(answer.prompt_id, []).append(answer)
    scores = Scores()
    scores.extend(answer for own in by_prompt.values() for answer in own)
    return scores.audit()


def compare(one: Sequence[Scored], other: Sequence[Scored]) -> Comparison:
    """Compare two scorings of the same answers in the same order.

    Raises:
        ValueError: the answers are not the same.
    """
    import numpy as np

    if [a.prompt_id for a in one] != [b.prompt_id for b in other]:
        raise ValueError("the two scorings are of different answers")
    both = [(a.prompt_id, a.score, b.score) for a, b in zip(one, other, strict=True) if None not in (a.score, b.score)]
    prompts = [prompt for prompt, *_ in both]
    left, right = np.array([a for _, a, _ in both], dtype=float), np.array([b for *_, b in both], dtype=float)
    orders = list(zip(_orders(prompts, left), _orders(prompts, right), strict=True))
    return Comparison(
        n=len(both),
        unknown=len(one) - len(both),
        differ=rate([float(a != b) for _, a, b in both]),
        mean_difference=float(np.abs(left - right).mean()) if both else None,
        order=rate([float(a == b) for a, b in orders]),
        flipped=rate([float({a, b} == {"first", "second"}) for a, b in orders]),
        kappa=kappa(orders),
        spearman=_pearson(_ranked(left), _ranked(right)),
    )


def drift(
    before: Sequence[float | None], after: Sequence[float | None], *, level: float = 0.01, min_effect: float = 0.2
) -> Drift:
    """Whether a judge scores the same answers higher than in an earlier round.

    Args:
        before: the anchors' scores in the earlier round.
        after: their scores now, in the same order.
        level: of the test. .01 and not .05, since it is made anew in every round: ten rounds then raise a false alarm
            with a probability below .1.
        min_effect: the smallest rise that matters, in standard deviations of the earlier scores. .2 is Cohen's small
            effect; with many anchors less than that is told from chance, but moves hardly a label.
    """
    import numpy as np

    both = [(a, b) for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    unknown = len(before) - len(both)
    if len(both) < 2:
        return Drift(len(both), unknown, None, None, None, None, None, None)
    old, new = np.array([a for a, _ in both]), np.array([b for _, b in both])
    rise, spread = float((new - old).mean()), float(old.std(ddof=1))
    effect = rise / spread if spread else None
    p = _chance_of_rise(new - old)
    told = 2.0 ** -len(both) < level  # all signs alike is the smallest p there is
    alarm = p < level and rise > 0 and (effect is None or effect >= min_effect)
    return Drift(len(both), unknown, float(old.mean()), float(new.mean()), rise, effect, p, alarm if told else None)


def _chance_of_rise(difference: "Numbers") -> float:
    """One-sided: scores are few steps on a scale, often equal, so that signs are flipped instead of trusting a t."""
    from scipy import stats

    if not difference.any():
        return 1.0
    found = stats.permutation_test(
        (difference,),
        lambda values, axis: values.mean(axis=axis),
        permutation_type="samples",
        alternative="greater",
        n_resamples=9999,
        batch=1000,  # keeps the memory of 9,999 copies away
        vectorized=True,
        rng=0,
    )
    return float(found.pvalue)


def _orders(prompts: Sequence[str], scores: Iterable[float]) -> list[Winner]:
    """For every two answers to a prompt, which one scores higher."""
    groups: dict[str, list[float]] = {}
    for prompt, score in zip(prompts, scores, strict=True):
        groups.setdefault(prompt, []).append(score)
    return [
        "tie" if a == b else "first" if a > b else "second"
        for group in groups.values()
        for a, b in itertools.combinations(group, 2)
    ]


def _by_size(prompts: "Places") -> "Iterator[Places]":
    """The places of each prompt's answers, those with as many together: (prompts, answers), some at a time."""
    import numpy as np

    _, first, sizes = np.unique(prompts, return_index=True, return_counts=True)
    for size in np.unique(sizes):
        for begin in range(0, len(starts := first[sizes == size]), AT_ONCE):
            yield starts[begin : begin + AT_ONCE, None] + np.arange(size)


def _ties(scores: "Numbers") -> int:
    """How many two of a row's scores are equal, over all rows."""
    return sum(int((scores[:, k:] == scores[:, :-k]).sum()) for k in range(1, scores.shape[1]))


def _within(groups: "Sequence[Places]", values: "Numbers", *, ranked: bool = False) -> "Numbers":
    """Values, or their ranks within a prompt, less the prompt's mean."""
    import numpy as np
    from scipy import stats

    centred = np.zeros(len(values))
    for rows in groups:
        own = stats.rankdata(values[rows], axis=1) if ranked else values[rows]
        centred[rows] = own - own.mean(axis=1, keepdims=True)
    return centred


def _ranked(values: "Numbers") -> "Numbers":
    from scipy import stats

    ranks: Any = stats.rankdata(values)
    return ranks  # type: ignore[no-any-return]


def _pearson(one: "Numbers", other: "Numbers") -> float | None:
    import numpy as np

    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    a, b = one - one.mean(), other - other.mean()
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
