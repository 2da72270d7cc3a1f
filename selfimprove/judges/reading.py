"""From a judge's reply to its verdict: the last well-formed one counts, and what is not well-formed is unknown."""

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

LABEL_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {"reason": {"type": "string"}, "verdict": {"type": "string", "enum": ["A", "B", "C"]}},
    "required": ["reason", "verdict"],
    "additionalProperties": False,
}
WORTH = {"A": 1.0, "B": 0.0, "C": 0.5}

ArenaLabel = Literal["A>>B", "A>B", "A=B", "B>A", "B>>A"]
ARENA: Mapping[str, ArenaLabel] = {
    "A>>B": "A>>B", "A>B": "A>B", "A=B": "A=B", "B>A": "B>A", "B>>A": "B>>A",
    "B<<A": "A>>B", "B<A": "A>B", "B=A": "A=B", "A<B": "B>A", "A<<B": "B>>A",
}  # fmt: skip


def score_schema(lowest: float, highest: float) -> dict[str, Any]:
    """A reply with reasons and a score, for servers that shape replies."""
    number = {"type": "number", "minimum": lowest, "maximum": highest}
    return {
        "type": "object",
        "properties": {"reason": {"type": "string"}, "score": number},
        "required": ["reason", "score"],
        "additionalProperties": False,
    }


def score(reply: str, lowest: float, highest: float) -> float | None:
    """The number after the last `Score:` of a reply, or of a JSON object `score`; None outside the scale."""
    shaped = _json(reply).get("score")
    if isinstance(shaped, int | float) and not isinstance(shaped, bool):
        value = float(shaped)
    else:
        said = re.findall(r"\bscore\b[\s:*]*(-?\d+(?:\.\d+)?)(?!\d|\.\d)", reply, re.IGNORECASE)
        if not said:
            return None
        value = float(said[-1])
    return value if lowest <= value <= highest else None


def first_is_better(reply: str) -> float | None:
    """1, 0 or 0.5 (a tie) by the last [[A]], [[B]] or [[C]] of a reply, or by a JSON object's `verdict`."""
    shaped = _json(reply).get("verdict")
    if isinstance(shaped, str) and shaped in WORTH:
        return WORTH[shaped]
    said = re.findall(r"\[\[([ABC])\]\]", reply)
    return WORTH[said[-1]] if said else None


def bracketed_rating(
    reply: str,
    lowest: float = 1,
    highest: float = 10,
    *,
    which: Literal["first", "last"] = "last",
    whole: bool = False,
    single: bool = False,
) -> float | None:
    """The number in double brackets (MT-bench's `[[7]]`); None outside the scale.

    Args:
        reply: the judge's words.
        lowest: of the scale.
        highest: of the scale.
        which: FastChat takes the first one; of ours the last counts.
        whole: arena-bench v1 reads whole numbers only, so that `[[9.5]]` is none.
        single: FastChat takes `[7]` where no `[[7]]` stands, and reads a rating out of code such as `array[0]`.
    """
    number = r"(\d+)" if whole else r"(\d+\.?\d*)"
    said = re.findall(rf"\[\[{number}\]\]", reply)
    if not said and single:
        said = re.findall(rf"\[{number}\]", reply)
    if not said:
        return None
    value = float(said[0] if which == "first" else said[-1])
    return value if lowest <= value <= highest else None


def output_label(reply: str) -> float | None:
    """1 or 0 by the last `Output (a) is better`, or `Output (a)` at the start of a line (LLMBar, arXiv 2310.07641)."""
    said = re.findall(r"\bOutput \(([ab])\) is better", reply) or re.findall(r"(?m)^ ?Output \(([ab])\)", reply)
    return float(said[-1] == "a") if said else None


def arena_label(reply: str, *, single: bool = False) -> ArenaLabel | None:
    """The last of Arena-Hard's labels, `[[A>>B]]` to `[[B>>A]]`, in any spelling of it that upstream knows.

    Args:
        reply: the judge's words.
        single: take `[A>B]` where no label stands in double brackets, as upstream does.
    """
    label = "|".join(ARENA)
    said = re.findall(rf"\[\[({label})\]\]", reply.upper())
    if not said and single:
        said = re.findall(rf"\[({label})\]", reply.upper())
    return ARENA[said[-1]] if said else None


def _json(reply: str) -> dict[str, Any]:
    """The reply as a JSON object; empty where it is none."""
    text = reply.strip()
    if not (text.startswith("{") and text.endswith("}")):
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
