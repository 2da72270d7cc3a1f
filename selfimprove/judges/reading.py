"""From a judge's reply to its verdict: the last well-formed one counts, and what is not well-formed is unknown."""

import json
import re
from collections.abc import Mapping
from typing import Any

LABEL_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {"reason": {"type": "string"}, "verdict": {"type": "string", "enum": ["A", "B", "C"]}},
    "required": ["reason", "verdict"],
    "additionalProperties": False,
}
WORTH = {"A": 1.0, "B": 0.0, "C": 0.5}


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


def output_label(reply: str) -> float | None:
    """1 or 0 by the last `Output (a) is better`, or `Output (a)` at the start of a line (LLMBar, arXiv 2310.07641)."""
    said = re.findall(r"\bOutput \(([ab])\) is better", reply) or re.findall(r"(?m)^ ?Output \(([ab])\)", reply)
    return float(said[-1] == "a") if said else None


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
