"""GSM8K: the answer after `#### ` (or in a line `A: `, as the published solutions have it), against the gold one.

Files: the published solutions (`question`, `ground_truth`, and for each model an object with `solution` and, where it
is there, `is_correct`), or one model's own (`answer`, the gold one as in the test set, and `response`).
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from selfimprove.errors import UserError
from selfimprove.evaluation.benchmarks import fields
from selfimprove.evaluation.paired import mcnemar
from selfimprove.evaluation.statistics import proportion

MARKED = re.compile(r"(?:####|^A:) (-?[0-9.,]+)", re.MULTILINE)
ANYWHERE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
FORMATS = "question, ground_truth, MODEL: {solution, is_correct}; or answer, response"


class Solution(NamedTuple):
    """A model's solution to a problem."""

    gold: str  # the number
    text: str
    flag: bool | None  # whether it was published as right


def marked_answer(text: str) -> str | None:
    """The number after the first `#### ` or, at the start of a line, `A: `, without its commas."""
    found = MARKED.search(text)
    return found[1].replace(",", "") if found else None


def last_number(text: str) -> str | None:
    """The last number anywhere, without `$`, commas and a last full stop: lm-evaluation-harness's flexible one."""
    found = [first or second for first, second in ANYWHERE.findall(text)]
    return re.sub(r"[,$]|\.$", "", found[-1]) if found else None


def is_correct(text: str, gold: str) -> bool:
    """Whether the marked answer is the gold number, digit for digit as the published flags have it."""
    return marked_answer(text) == gold


def score(path: Path) -> dict[str, Any]:
    """Every model's accuracy with Wilson's interval, and McNemar's test of every two.

    Raises:
        UserError: a file that cannot be read, or a row that is wrong.
    """
    rows = fields.read(path)
    solutions, used = _solutions(rows, path)
    right = {name: [is_correct(one.text, one.gold) for one in of] for name, of in solutions.items()}
    return {
        "benchmark": "gsm8k",
        "file": str(path),
        "rows": len(rows),
        "ignored": {},
        "unused_fields": fields.unused(rows, used),
        "models": {name: _model(of, right[name]) for name, of in solutions.items()},
        "paired": [
            {"a": a, "b": b, **mcnemar(right[a], right[b])._asdict()}
            for a, b in itertools.combinations(solutions, 2)
            if len(rows) > 1
        ],
    }


def _model(solutions: Sequence[Solution], right: Sequence[bool]) -> dict[str, Any]:
    shown = proportion([float(one) for one in right])
    flexible = proportion([float(last_number(one.text) == one.gold) for one in solutions])
    flags = [(one.flag, ours) for one, ours in zip(solutions, right, strict=True) if one.flag is not None]
    return {
        "accuracy": shown.value,
        "low": shown.low,
        "high": shown.high,
        "n": shown.n,
        "correct": sum(right),
        "no_answer": sum(marked_answer(one.text) is None for one in solutions),
        "flexible_accuracy": flexible.value,
        "published_flags": len(flags),
        "other_than_published": sum(flag != ours for flag, ours in flags),
        "is_correct": list(right),
    }


def _solutions(rows: Sequence[fields.Row], path: Path) -> tuple[dict[str, list[Solution]], list[str]]:
    """Every model's solutions in the rows' order, and the fields they are read from."""
    first = rows[0]
    if first.has("ground_truth"):
        names = [name for name, value in first.values.items() if isinstance(value, Mapping) and "solution" in value]
        if not names:
            raise UserError(f"{first.where}: no model with a 'solution'", FORMATS)
        return {name: [_published(row, name) for row in rows] for name in names}, ["question", "ground_truth", *names]
    if first.has("answer") and first.has("response"):
        name = re.sub(r"(\.jsonl?)?(\.gz)?$", "", path.name)
        return {name: [_own(row) for row in rows]}, ["question", "answer", "response"]
    raise UserError(f"{first.where}: neither of the known formats", FORMATS)


def _published(row: fields.Row, name: str) -> Solution:
    told = row.any(name, "every row has the models that the first one has")
    if not isinstance(told, Mapping):
        raise row.wrong(name, "an object with 'solution'")
    inner = fields.Row(f"{row.where}, {name}", told)
    flag = inner.any("is_correct") if inner.has("is_correct") else None
    if flag is not None and not isinstance(flag, bool):
        raise inner.wrong("is_correct", "true or false")
    return Solution(_gold(row, "ground_truth"), inner.text("solution"), flag)


def _own(row: fields.Row) -> Solution:
    return Solution(_gold(row, "answer"), row.text("response"), None)


def _gold(row: fields.Row, name: str) -> str:
    found = marked_answer(row.text(name))
    if found is None:
        raise row.wrong(name, "a text with '#### NUMBER' or a line 'A: NUMBER'")
    return found
