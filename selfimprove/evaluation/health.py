"""Is a run still healthy? Indicators by round, each with a state, and in words what it may mean and what to do.

health.toml is the table of them, with every limit and its reason.
"""

import functools
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from selfimprove.evaluation.round_facts import RoundFacts
from selfimprove.recipe import Section, validated

State = Literal["good", "watch", "bad", "unknown"]
ALONE = "only one round is known: there is nothing to hold it against yet"
NO_BASE = "the base has no value to hold it against"


class Limit(Section):
    """From where on a figure worries."""

    side: Literal["above", "below"]
    watch: float
    bad: float | None = None
    because: str
    cause: str
    remedy: str


class Rule(Section):
    """One row of health.toml."""

    name: str
    fact: str  # field of RoundFacts
    unit: str
    meaning: str
    held: Literal[
        "the value",
        "over the first",
        "less the first",
        "over the noise bound",
        "over the base's entropy",
        "the audit's alarm",
    ]
    unknown: str
    limits: list[Limit]


class Table(Section):
    """health.toml."""

    indicators: list[Rule]


class Indicator(NamedTuple):
    """One figure over the rounds. Its state is that of the last round that has it."""

    name: str
    unit: str
    values: dict[int, float | None]  # by iteration; 0 is the base
    state: State
    cause: str  # what it may come from, or why it is unknown; empty where good
    remedy: str  # empty where good or unknown


@functools.cache
def rules() -> list[Rule]:
    """The table."""
    text = Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
    return validated(Table, tomllib.loads(text), "health.toml").indicators


def panel(facts: Sequence[RoundFacts]) -> list[Indicator]:
    """Every indicator of the table, in its order.

    Args:
        facts: of the rounds, ascending; of a round that is not finished, what is known so far.
    """
    return [_indicator(rule, facts) for rule in rules()]


def _indicator(rule: Rule, facts: Sequence[RoundFacts]) -> Indicator:
    values: dict[int, float | None] = {of.iteration: getattr(of, rule.fact) for of in facts}
    known = [of for of in facts if values[of.iteration] is not None]
    if not known:
        return Indicator(rule.name, rule.unit, values, "unknown", rule.unknown, "")
    first, now = (values[of.iteration] or 0.0 for of in (known[0], known[-1]))
    held = _held(rule, first, now, known)
    if isinstance(held, str):
        return Indicator(rule.name, rule.unit, values, "unknown", held, "")
    state, limit = _state(rule.limits, held)
    if limit is None:
        return Indicator(rule.name, rule.unit, values, "good", "", "")
    return Indicator(
        rule.name, rule.unit, values, state, limit.cause.format(now=now, first=first, held=held), limit.remedy
    )


def _held(rule: Rule, first: float, now: float, known: Sequence[RoundFacts]) -> float | str:
    """What is held against the limits, or why there is nothing."""
    latest = known[-1]
    match rule.held:
        case "the value":
            return now
        case "over the first" | "less the first" if len(known) < 2:
            return ALONE
        case "less the first":
            return now - first
        case "over the first":
            return now / first if first > 0 else "the first value is not above zero"
        case "over the noise bound":
            return now / latest.noise_bound if latest.noise_bound else rule.unknown
        case "over the base's entropy":
            entropy = known[0].surprise if known[0].iteration == 0 else None
            return now / entropy if entropy else NO_BASE
        case "the audit's alarm":
            return rule.unknown if latest.lenient is None else float(latest.lenient)


def _state(limits: Sequence[Limit], held: float) -> tuple[State, Limit | None]:
    for limit in limits:
        sign = 1 if limit.side == "above" else -1
        if limit.bad is not None and sign * held >= sign * limit.bad:
            return "bad", limit
        if sign * held >= sign * limit.watch:
            return "watch", limit
    return "good", None
