"""GSM8K (arXiv 2110.14168): right where the number after `#### ` is the gold one's; rows `question`, `answer`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfimprove.evaluation.benchmarks import fields
from selfimprove.evaluation.benchmarks.gsm8k import last_number, marked_answer
from selfimprove.evaluation.kinds.question import Checked, Kind, Question, read
from selfimprove.evaluation.statistics import proportion
from selfimprove.records import Sample


def _read(path: Path, answers: Path | None) -> list[Question]:
    number = iter(range(10**9))

    def turns(row: fields.Row) -> tuple[str, list[str], list[str]]:
        gold = row.text("answer")
        if marked_answer(gold) is None:
            raise row.wrong("answer", "a text with '#### NUMBER'")
        return f"{next(number):05d}", [row.text("question")], [gold]

    return read(path, turns)


def check(question: Question, text: str) -> Checked:
    """Whether the marked number is the gold one; a full stop after it does not count."""
    found = marked_answer(text)
    if found is None:
        return Checked(False, "no #### NUMBER")
    return Checked(found.rstrip(".") == _gold(question), "")


def _extras(questions: Mapping[str, Question], samples: Sequence[Sample]) -> dict[str, Any]:
    """The share whose last number, marked or not, is right: what lm-evaluation-harness calls flexible."""
    found = proportion([float(last_number(s.text) == _gold(questions[s.prompt_id])) for s in samples])
    unmarked = sum(marked_answer(s.text) is None for s in samples) / len(samples)
    return {"last_number": {"value": found.value, "ci95": [found.low, found.high]}, "unmarked_share": unmarked}


def _gold(question: Question) -> str:
    return (marked_answer(question.answers[0]) or "").rstrip(".")


KIND = Kind(_read, check=check, extras=_extras)
