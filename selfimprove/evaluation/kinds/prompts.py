"""Prompts of one's own with a judge of one's choice: rows `prompt`, and where they are there `answer` and `id`."""

from pathlib import Path

from selfimprove import data
from selfimprove.evaluation.kinds.question import Kind, Question


def _read(path: Path, answers: Path | None) -> list[Question]:
    rows = data.read_heldout(path, "prompt")
    return [Question(row.prompt_id, (row.prompt,), () if row.answer is None else (row.answer,)) for row in rows]


KIND = Kind(_read, judge="scores")
