"""Benchmarks of single ratings: MT-Bench and arena-bench v1, from the judge's words and the scores that were stored.

Rows: `question_id`, `model`, `judgment`, and where they are there `turn` and `score` (-1 or null is no score).
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from selfimprove import brackets
from selfimprove.errors import UserError
from selfimprove.evaluation.benchmarks import fields
from selfimprove.evaluation.paired import paired_tests
from selfimprove.evaluation.statistics import clustered_standard_error

Name = Literal["mt_bench", "arena_bench"]
USED = ("question_id", "model", "judgment", "turn", "score")


class Rated(NamedTuple):
    """A judged answer, as its words are read and as its score was stored; None is no rating."""

    model: str
    question: str
    turn: int
    read: float | None
    stored: float | None


def mt_bench_rating(judgment: str) -> float | None:
    """The first `[[n]]` between 1 and 10. FastChat's way back to `[n]` reads ratings out of code, and is not taken."""
    return brackets.bracketed_rating(judgment, which="first")


def arena_bench_rating(judgment: str) -> float | None:
    """The last `[[n]]` between 1 and 10 that is a whole number."""
    return brackets.bracketed_rating(judgment, whole=True)


READERS: dict[Name, Callable[[str], float | None]] = {"mt_bench": mt_bench_rating, "arena_bench": arena_bench_rating}


def score(path: Path, name: Name) -> dict[str, Any]:
    """Every model's mean rating, its standard error clustered by question, and paired tests of every two models.

    Raises:
        UserError: a file that cannot be read, a row that is wrong, or two judgments of one answer.
    """
    rows = fields.read(path)
    rated = [_rated(row, READERS[name]) for row in rows]
    seen: dict[tuple[str, str, int], str] = {}
    for row, one in zip(rows, rated, strict=True):
        key = (one.model, one.question, one.turn)
        if key in seen:
            raise UserError(
                f"{row.where}: {one.model!r}, question {one.question!r}, turn {one.turn} is judged in {seen[key]} too",
                "one judgment of an answer: one judge, one file",
            )
        seen[key] = row.where.rpartition(", ")[2]
    models = {model: [one for one in rated if one.model == model] for model in dict.fromkeys(o.model for o in rated)}
    unread = sum(one.read is None for one in rated)
    return {
        "benchmark": name,
        "file": str(path),
        "rows": len(rows),
        "ignored": {"no rating in the judgment": unread} if unread else {},
        "unused_fields": fields.unused(rows, USED),
        "models": {model: _model(of) for model, of in models.items()},
        "paired": _paired({model: _by_question(of) for model, of in models.items()}),
    }


def _rated(row: fields.Row, reader: Callable[[str], float | None]) -> Rated:
    stored = row.number("score", "a rating, or -1 or null") if row.has("score") else None
    turn = row.whole("turn", lowest=1) if row.has("turn") else 1
    read = reader(row.text("judgment"))
    return Rated(row.name("model"), row.name("question_id"), turn, read, None if stored == -1 else stored)


def _model(rated: Sequence[Rated]) -> dict[str, Any]:
    turns = sorted({one.turn for one in rated})
    stored = [one.stored for one in rated if one.stored is not None]
    return {
        **_mean([one for one in rated if one.read is not None]),
        "answers": len(rated),
        "turns": {str(turn): _mean([o for o in rated if o.read is not None and o.turn == turn]) for turn in turns},
        "stored_mean": sum(stored) / len(stored) if stored else None,
        "stored_n": len(stored),
        "stored_turns": {str(turn): _stored_mean(rated, turn) for turn in turns},
        "other_than_stored": sum(one.read != one.stored for one in rated) if stored else None,
    }


def _mean(rated: Sequence[Rated]) -> dict[str, Any]:
    values = [one.read for one in rated if one.read is not None]
    if not values:
        return {"mean": None, "standard_error": None, "n": 0}
    error = clustered_standard_error(values, [one.question for one in rated]) if len(values) > 1 else None
    return {"mean": sum(values) / len(values), "standard_error": error, "n": len(values)}


def _stored_mean(rated: Sequence[Rated], turn: int) -> float | None:
    values = [one.stored for one in rated if one.turn == turn and one.stored is not None]
    return sum(values) / len(values) if values else None


def _by_question(rated: Sequence[Rated]) -> dict[str, float]:
    """The mean over the turns of each question that could all be read."""
    found: dict[str, list[float | None]] = defaultdict(list)
    for one in rated:
        found[one.question].append(one.read)
    means = {}
    for question, values in found.items():
        read = [value for value in values if value is not None]
        if len(read) == len(values):
            means[question] = sum(read) / len(read)
    return means


def _paired(models: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    tests = []
    for a, b in itertools.combinations(models, 2):
        shared = [question for question in models[a] if question in models[b]]
        if len(shared) > 1:
            found = paired_tests([models[a][q] for q in shared], [models[b][q] for q in shared])
            tests.append({"a": a, "b": b, **found._asdict()})
    return tests
