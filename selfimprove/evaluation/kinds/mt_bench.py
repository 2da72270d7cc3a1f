"""MT-Bench (arXiv 2306.05685): every turn of a dialogue is rated by itself; a question's score is its turns' mean.

Rows: `question_id`, `turns`; reference answers, where there are any, in a file of their own, shown to the judge.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfimprove.errors import UserError
from selfimprove.evaluation.benchmarks import fields
from selfimprove.evaluation.kinds.question import Kind, Question, identifier, read, written
from selfimprove.records import Sample


def _read(path: Path, answers: Path | None) -> list[Question]:
    known = written(answers) if answers else {}

    def turns(row: fields.Row) -> tuple[str, list[str], list[str]]:
        asked = row.any("turns")
        if not isinstance(asked, list) or not asked or not all(isinstance(turn, str) for turn in asked):
            raise row.wrong("turns", "a list of texts")
        prompt_id = identifier(row)
        references = known.get(prompt_id, [])
        if len(references) not in (0, len(asked)):
            raise UserError(f"{row.where}: {len(asked)} turns, and {answers} answers {len(references)}", "one a turn")
        return prompt_id, asked, references

    return read(path, turns)


def _extras(questions: Mapping[str, Question], samples: Sequence[Sample]) -> dict[str, Any]:
    """The mean rating of each turn."""
    turns: dict[str, list[float]] = {}
    for sample in samples:
        turns.setdefault(str(sample.sample + 1), []).append(sample.score or 0.0)
    return {"turns": {turn: {"value": sum(of) / len(of), "n": len(of)} for turn, of in sorted(turns.items())}}


KIND = Kind(_read, judge="scores", answers="optional", extras=_extras)
