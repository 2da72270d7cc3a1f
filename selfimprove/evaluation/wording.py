"""What a comparison may be called: no change is an improvement that the prompts could not have told from chance."""

from typing import Literal

from selfimprove.evaluation.statistics import TAIL, Comparison


def called(comparison: Comparison) -> Literal["better", "worse", "no change that could be told"]:
    """The name of a change.

    It has one where its interval leaves zero out, its p is below .05 (put Holm's there with `_replace` where several
    comparisons are planned), and it is no smaller than the minimum detectable effect.
    """
    sure = (comparison.low > 0 or comparison.high < 0) and comparison.p < 2 * TAIL
    if not sure or abs(comparison.difference) < comparison.mde:
        return "no change that could be told"
    return "better" if comparison.difference > 0 else "worse"


def worded(comparison: Comparison) -> str:
    """A comparison of shares in one sentence, in points: the difference, its interval, n, and what it may be called."""
    name = called(comparison)
    numbers = f"{points(comparison.difference)} points ({points(comparison.low)} to {points(comparison.high)}"
    limit = f": the smallest that could is {100 * comparison.mde:.1f} points" if name.startswith("no") else ""
    return f"{numbers}, n = {comparison.n}): {name}{limit}"


def points(share: float) -> str:
    """A difference of shares in points, with its sign."""
    return f"{100 * share:+.1f}"
