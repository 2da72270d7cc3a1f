"""How far a judge of two answers can be trusted: position, ties, length, agreement with people. Pure functions.

An unreadable verdict stays a class of its own: it is never a tie, never right, and every rate says over how many pairs
it is. What cannot be known is None.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

Winner = Literal["first", "second", "tie"]
CLASSES: tuple[Winner, ...] = ("first", "second", "tie")
UNREADABLE = "unreadable"


class Row(NamedTuple):
    """A pair of answers: what people say of it and what the judge says, P(first is better), both ways round."""

    human: Winner | None
    forward: float | None
    swapped: float | None  # shown the other way round, and turned back
    lengths: tuple[int, int] | None = None  # characters


class Rate(NamedTuple):
    """A share with its 95 % interval (Wilson) over `n` pairs."""

    value: float
    low: float
    high: float
    n: int


class Agreement(NamedTuple):
    """A judge against people, over the pairs with a label of theirs."""

    accuracy: Rate
    kappa: float | None  # Cohen's, over first, second, tie and unreadable
    macro_f1: float | None  # over the classes that people use
    confusion: dict[str, dict[str, int]]  # people -> judge -> pairs


class PairAudit(NamedTuple):
    """What `audit` finds. Of what needs both orders, None where the judge was asked in one."""

    n: int
    labelled: int
    unreadable_verdicts: int
    unreadable: Rate | None  # pairs with a verdict that could not be read
    ties: Rate | None  # among readable verdicts
    consistent: Rate | None  # both orders say the same
    flipped: Rate | None  # both could be read and differ
    first_position: Rate | None  # among verdicts for one answer: for the one shown first
    kappa_orders: float | None  # Cohen's, between the two orders
    forward: Agreement | None
    swapped: Agreement | None
    combined: Agreement | None  # of the mean over both orders; of the only one otherwise
    both_right: Rate | None
    mean_right: Rate | None  # accuracy, averaged over the orders
    half_right: Rate | None  # the combined verdict, where one side's tie and a pair not readable count half
    prefers_longer: Rate | None  # among combined verdicts for one of two answers of different length
    humans_prefer_longer: Rate | None


def audit(rows: Sequence[Row], *, both_orders: bool = True) -> PairAudit:
    """Audit a judge's verdicts.

    Args:
        rows: pairs; a verdict that is None could not be read.
        both_orders: whether the judge was asked both ways round; else `swapped` is not looked at.
    """
    forward = [winner(row.forward) for row in rows]
    swapped = [winner(row.swapped) for row in rows] if both_orders else forward
    combined = [winner(combine(row.forward, row.swapped)) for row in rows] if both_orders else forward
    orders = list(zip(forward, swapped, strict=True))
    labels = [row.human for row in rows]
    of_orders = [(label, f, s) for label, (f, s) in zip(labels, orders, strict=True) if label is not None]
    shown_first = [_shown_first(f, s if both_orders else None) for f, s in orders]
    verdicts = [*forward, *(swapped if both_orders else [])]
    readable = [[w for w in ((f, s) if both_orders else (f,)) if w is not None] for f, s in orders]
    return PairAudit(
        n=len(rows),
        labelled=len(of_orders),
        unreadable_verdicts=sum(w is None for w in verdicts),
        unreadable=rate([float(f is None or s is None) for f, s in orders]),
        ties=pooled([[float(w == "tie") for w in two] for two in readable]),
        consistent=rate([float(f is not None and f == s) for f, s in orders]) if both_orders else None,
        flipped=rate([float(None not in (f, s) and f != s) for f, s in orders]) if both_orders else None,
        first_position=pooled(shown_first) if both_orders else None,
        kappa_orders=kappa([(f or UNREADABLE, s or UNREADABLE) for f, s in orders]) if both_orders else None,
        forward=agreement(labels, forward),
        swapped=agreement(labels, swapped) if both_orders else None,
        combined=agreement(labels, combined),
        both_right=rate([float(label == f == s) for label, f, s in of_orders]) if both_orders else None,
        mean_right=rate([((label == f) + (label == s)) / 2 for label, f, s in of_orders]),
        half_right=rate(
            [_half(label, w) for label, w in zip(labels, combined, strict=True) if label is not None],
        ),
        prefers_longer=_longer(rows, combined),
        humans_prefer_longer=_longer(rows, labels),
    )


def winner(preference: float | None) -> Winner | None:
    """The class of P(first is better): exactly a half is a tie."""
    if preference is None:
        return None
    return "tie" if preference == 0.5 else "first" if preference > 0.5 else "second"


def kind(row: Row) -> object:
    """All that `audit` looks at in a row; rows of one kind can stand for each other."""
    longer = None if row.lengths is None else (row.lengths[0] > row.lengths[1]) - (row.lengths[0] < row.lengths[1])
    return row.human, winner(row.forward), winner(row.swapped), winner(combine(row.forward, row.swapped)), longer


def combine(forward: float | None, swapped: float | None) -> float | None:
    """The mean over both orders, so that a verdict that flips is a tie; None where one is unknown."""
    return None if forward is None or swapped is None else (forward + swapped) / 2


def agreement(human: Sequence[Winner | None], judge: Sequence[Winner | None]) -> Agreement | None:
    """A judge's verdicts against people's, where people have said something; None where they never have."""
    pairs = [(label, verdict or UNREADABLE) for label, verdict in zip(human, judge, strict=True) if label is not None]
    right = rate([float(label == verdict) for label, verdict in pairs])
    if right is None:
        return None
    counted = Counter(pairs)
    confusion: dict[str, dict[str, int]] = {
        label: {verdict: counted[label, verdict] for verdict in (*CLASSES, UNREADABLE)} for label in CLASSES
    }
    return Agreement(right, kappa(pairs), macro_f1(pairs), confusion)


def kappa(pairs: Sequence[tuple[str, str]]) -> float | None:
    """Cohen's kappa between two raters; None where chance alone would make them agree always."""
    n = len(pairs)
    if not n:
        return None
    ones, others = Counter(one for one, _ in pairs), Counter(other for _, other in pairs)
    by_chance = sum(ones[name] * others[name] for name in ones)  # times n^2, so that "always" is told exactly
    if by_chance == n * n:
        return None
    return (n * sum(one == other for one, other in pairs) - by_chance) / (n * n - by_chance)


def macro_f1(pairs: Sequence[tuple[str, str]]) -> float | None:
    """The mean F1 of the classes that stand among the (true, said) pairs' true ones."""
    scores = []
    for name in {true for true, _ in pairs}:
        hit = sum(true == said == name for true, said in pairs)
        either = sum(true == name for true, _ in pairs) + sum(said == name for _, said in pairs)
        scores.append(2 * hit / either)
    return math.fsum(scores) / len(scores) if scores else None


def rate(values: Sequence[float]) -> Rate | None:
    """The mean of values between 0 and 1, one a pair, with Wilson's interval; None of none."""
    return pooled([[value] for value in values])


def pooled(values: Sequence[Sequence[float]]) -> Rate | None:
    """The mean of all values between 0 and 1; Wilson's interval counts the pairs that have any.

    Both verdicts on a pair are about the same answers: counted as two they would make the interval too narrow.
    """
    per_pair = [some for some in values if some]
    return share(sum(map(sum, per_pair)) / sum(map(len, per_pair)), len(per_pair)) if per_pair else None


def share(value: float, n: int) -> Rate:
    """A mean of values between 0 and 1 over `n` with Wilson's interval."""
    z = 1.959963984540054
    centre = (value + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    return Rate(value, max(0.0, centre - half), min(1.0, centre + half), n)


def plain(found: Any) -> Any:
    """An audit as dicts and numbers, ready for JSON."""
    if hasattr(found, "_asdict"):
        return {name: plain(value) for name, value in found._asdict().items()}
    return found


def _shown_first(forward: Winner | None, swapped: Winner | None) -> list[float]:
    """For each verdict on a pair for one of its answers, whether that was the one shown first."""
    seen = [(forward, "first"), (swapped, "second")]
    return [float(verdict == shown) for verdict, shown in seen if verdict in ("first", "second")]


def _half(human: Winner, judge: Winner | None) -> float:
    if human == judge:
        return 1.0
    return 0.5 if judge is None or "tie" in (human, judge) else 0.0


def _longer(rows: Sequence[Row], verdicts: Sequence[Winner | None]) -> Rate | None:
    return rate(
        [
            float((verdict == "first") == (row.lengths[0] > row.lengths[1]))
            for row, verdict in zip(rows, verdicts, strict=True)
            if row.lengths is not None and row.lengths[0] != row.lengths[1] and verdict in ("first", "second")
        ]
    )
