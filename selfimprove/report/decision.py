"""What a gate decided, in plain words."""

from collections.abc import Iterator, Mapping
from typing import Any

from selfimprove.report.escape import line
from selfimprove.stages.gate import PROMOTE

WORDS = {
    PROMOTE: "promoted",
    "keep": "kept, not promoted: the next round goes on from it, the best one stays",
    "roll back": "rolled back: the next round starts from the best one again",
}


def told(run: str, iteration: int, decision: Mapping[str, Any]) -> str:
    """The decision, its reasons and its numbers, a line each."""
    return "\n".join(map(line, _lines(run, iteration, decision)))


def _lines(run: str, iteration: int, decision: Mapping[str, Any]) -> Iterator[str]:
    word = decision["decision"]
    yield f"{run}, round {iteration}: {WORDS.get(word, word)}"
    yield from (f"  {reason}" for reason in decision.get("reasons", []))
    yield ""
    yield _change(decision["primary"], "primary")
    yield from (_change({"metric": name, **of}, "guard") for name, of in decision.get("guards", {}).items())
    for name, held in decision.get("health", {}).items():
        state = {True: "ok", False: "beyond it", None: "unknown"}[held["ok"]]
        yield f"{name}: {_number(held['value'])}, limit {_number(held['limit'])}: {state}"
    yield f"best so far: {_round(decision['best'])}"
    if decision.get("stop"):
        yield "the run stops here"
    else:
        yield f"the next round starts from: {_round(decision['goes_on_from'])}"


def _change(change: Mapping[str, Any], role: str) -> str:
    bounds = f"[{_number(change['low'], '+')}, {_number(change['high'], '+')}]"
    level = f"each bound wrong with a chance of at most {change['level']:.3g}"
    seen = f"detectable: {_number(change['mde'])}"
    difference = f"{change['metric']} ({role}) against the best: {_number(change['difference'], '+')} {bounds}"
    return f"{difference}, {level}, {change['n']} prompts, {seen}"


def _round(number: int) -> str:
    return f"round {number}" if number else "what round 1 started with"


def _number(value: float | None, sign: str = "") -> str:
    return "unknown" if value is None else f"{value:{sign}.3g}"
