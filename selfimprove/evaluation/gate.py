"""The gate's rule: promote, keep or roll back, by scores of the selection split; docs/evaluation.md: what it promises.

Each round asks one question of the primary metric: round t at `rule.level` / (t (t + 1)). These add up to `rule.level`
over any number of rounds, so that a run can be prolonged: by Bonferroni, one whose rounds gain nothing promotes any of
them with a chance of at most `rule.level`, however they hang together.
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, TypedDict

import numpy as np

from selfimprove import recipe
from selfimprove.evaluation import statistics
from selfimprove.evaluation.wording import points

Scores = Mapping[str, float | None]  # of each prompt, the mean over its answers, 0 to 1


class Change(TypedDict):
    """How a metric changed against the best so far, in shares; what is None could not be said."""

    metric: str
    difference: float | None
    low: float | None  # above the true difference with a chance of at most `level`
    high: float | None  # below it likewise
    level: float
    mde: float | None  # the smallest gain that is promoted 4 times in 5; of a guard, the smallest drop it sees so often
    n: int  # prompts scored in both rounds


class Held(TypedDict):
    """A health value against its limit; `ok` is None where the value is unknown."""

    value: float | None
    limit: float
    ok: bool | None


class Decision(NamedTuple):
    """What follows for the policy of this round, and why."""

    decision: Literal["promote", "keep", "roll back"]
    stop: bool
    reasons: list[str]
    primary: Change
    guards: dict[str, Change]
    health: dict[str, Held]


def decide(
    new: Mapping[str, Scores],
    best: Mapping[str, Scores],
    rule: recipe.Gate,
    iteration: int,
    health: Mapping[str, float | None],
    idle: int = 0,
) -> Decision:
    """Judge a round's policy against the best one so far.

    Args:
        new: scores of this round by metric and prompt, on the selection split.
        best: the same of the best round so far.
        rule: the recipe's [gate].
        iteration: the number of this round, from 1.
        health: what `rule.limits` limits, by its name without min_ or max_ (`truncated_share`). None, no entry, or no
            finite number is unknown: it stops a promotion and rolls nothing back.
        idle: rounds since the last promotion, before this one; `stop` where patience ends.

    Raises:
        ValueError: no such round.
    """
    if iteration < 1:
        raise ValueError("rounds are counted from 1")
    level = rule.level / (iteration * (iteration + 1))
    primary = _change(rule.metric, new, best, level, rule.min_gain)
    guarded: list[str] = [name for name in dict.fromkeys(rule.guards) if name != rule.metric]  # it is watched anyway
    guards = {name: _change(name, new, best, level, rule.max_drop) for name in guarded}
    held = _held(rule.limits, health)
    worse = [_worse(change, rule) for change in (primary, *guards.values()) if _surely_worse(change, rule)]
    broken = [_broken(name, of) for name, of in held.items() if of["ok"] is False]
    unknown = [_unmeasured(change) for change in guards.values() if change["low"] is None]
    unknown += [
        f"{_spoken(name)} is unknown, and nothing unknown is promoted." for name, of in held.items() if of["ok"] is None
    ]
    gained = primary["low"] is not None and primary["low"] > rule.min_gain
    decision: Literal["promote", "keep", "roll back"] = "keep"
    if (worse or broken) and rule.roll_back:
        decision = "roll back"
    elif gained and not (worse or broken or unknown):
        decision = "promote"
    reasons = [*([] if _surely_worse(primary, rule) else [_gain(primary, rule)]), *worse, *broken, *unknown]
    reasons += [said for change in (primary, *guards.values()) if (said := _left_out(change, new, best))]
    if (worse or broken) and not rule.roll_back:
        reasons.append("The run goes on from this policy all the same, as gate.roll_back is off.")
    stop = rule.patience is not None and decision != "promote" and idle + 1 >= rule.patience
    if stop:
        reasons.append(f"Rounds in a row without a promotion: {idle + 1}; gate.patience ends here.")
    return Decision(decision, stop, reasons, primary, guards, held)


def _change(metric: str, new: Mapping[str, Scores], best: Mapping[str, Scores], level: float, beyond: float) -> Change:
    before = best.get(metric, {})
    both = np.array([(score, before.get(prompt)) for prompt, score in new.get(metric, {}).items()], dtype=float)
    difference = np.subtract(*both.reshape(-1, 2).T)
    difference = difference[np.isfinite(difference)]  # a score that is missing or None is NaN here
    if len(difference) < 2:
        return Change(metric=metric, difference=None, low=None, high=None, level=level, mde=None, n=len(difference))
    found = statistics.bounds(difference, level)
    return Change(
        metric=metric,
        difference=found.difference,
        low=found.low,
        high=found.high,
        level=level,
        mde=beyond + found.mde,
        n=found.n,
    )


def _surely_worse(change: Change, rule: recipe.Gate) -> bool:
    return change["high"] is not None and change["high"] < -rule.max_drop


def _held(limits: recipe.Limits, health: Mapping[str, float | None]) -> dict[str, Held]:
    held = {}
    for field, limit in limits.model_dump().items():
        if limit is not None:
            side, name = field.split("_", 1)
            value = health.get(name)
            if value is None or not math.isfinite(value):
                held[name] = Held(value=None, limit=limit, ok=None)
            else:
                held[name] = Held(value=value, limit=limit, ok=value <= limit if side == "max" else value >= limit)
    return held


# --- the reasons -------------------------------------------------------------------------------------------------


def _gain(change: Change, rule: recipe.Gate) -> str:
    if change["difference"] is None or change["low"] is None or change["mde"] is None:
        return _unmeasured(change)
    said, asked, seen = _numbers(change), f"{100 * rule.min_gain:g}", f"{100 * change['mde']:.1f}"
    if change["low"] <= rule.min_gain:
        return f"{said}: no gain above {asked} that could be told; one of {seen} would be, 4 times in 5."
    surely = f"{said}: surely a gain of more than {asked}."
    if change["difference"] < change["mde"]:
        surely += f" It is below {seen}, what is told 4 times in 5: it probably looks larger than it is."
    return surely


def _worse(change: Change, rule: recipe.Gate) -> str:
    allowed = f" by more than the {100 * rule.max_drop:g} allowed" if rule.max_drop else ""
    return f"{_numbers(change)}: surely worse{allowed}."


def _numbers(change: Change) -> str:
    moved, low, high = (points(share or 0.0) for share in (change["difference"], change["low"], change["high"]))
    between = f"{100 - 200 * change['level']:.4g} %: {low} to {high}, {change['n']} prompts"
    return f"{_spoken(change['metric'])} against the best: {moved} points ({between})"


def _unmeasured(change: Change) -> str:
    return f"{_spoken(change['metric'])} is unknown: prompts scored in both rounds: {change['n']}; it takes two."


def _broken(name: str, held: Held) -> str:
    return f"{_spoken(name)} is {held['value']:.3g}, beyond the limit of {held['limit']:g}."


def _left_out(change: Change, new: Mapping[str, Scores], best: Mapping[str, Scores]) -> str:
    seen = len({*new.get(change["metric"], {}), *best.get(change["metric"], {})})
    said = f"{_spoken(change['metric'])}: {seen - change['n']} of {seen} prompts lack a score in one of the rounds"
    return f"{said} and do not count." if seen > change["n"] else ""


def _spoken(name: str) -> str:
    return name.replace("_", " ").capitalize()
