"""What a benchmark asks, and how each kind of benchmark differs from the others."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from selfimprove.evaluation.benchmarks import fields
from selfimprove.records import Sample


class Question(NamedTuple):
    """A prompt, or the user's turns of a dialogue, with what the answers are held against."""

    prompt_id: str
    turns: tuple[str, ...]
    answers: tuple[str, ...] = ()  # one a turn: the gold one, the constraints, the baseline's or a reference; or none


class Checked(NamedTuple):
    """What a kind that needs no judge says of an answer."""

    right: bool
    reason: str = ""


Extras = Callable[[Mapping[str, Question], Sequence[Sample]], dict[str, Any]]


def no_extras(questions: Mapping[str, Question], samples: Sequence[Sample]) -> dict[str, Any]:
    """Nothing beside the score."""
    return {}


class Kind(NamedTuple):
    """A kind of benchmark."""

    read: Callable[[Path, Path | None], list[Question]]  # the prompts, and the answers where they have a file
    judge: Literal["scores", "compares"] | None = None  # what it needs of one; None checks answers by itself
    answers: Literal["none", "optional", "needed"] = "none"  # a file of answers beside the prompts
    check: Callable[[Question, str], Checked] | None = None
    extras: Extras = no_extras  # further figures, from the questions by id and their scored answers


def read(path: Path, turns: Callable[[fields.Row], tuple[str, Sequence[str], Sequence[str]]]) -> list[Question]:
    """The questions of a file, each row as its id, its turns and what answers are held against.

    Raises:
        UserError: the file cannot be read or a row is wrong.
    """
    found = []
    for row in fields.read(path):
        prompt_id, asked, answers = turns(row)
        found.append(Question(prompt_id, tuple(asked), tuple(answers)))
    return found


def identifier(row: fields.Row) -> str:
    """The id of a question as Arena-Hard and MT-Bench name it.

    Raises:
        UserError: there is none.
    """
    return row.name("uid" if row.has("uid") else "question_id")


def written(path: Path) -> dict[str, list[str]]:
    """A model's answers by question id, one a turn, in FastChat's format (`choices`) or Arena-Hard's (`messages`).

    Raises:
        UserError: the file cannot be read or a row is wrong.
    """
    return {identifier(row): _turns(row) for row in fields.read(path)}


def _turns(row: fields.Row) -> list[str]:
    told: Any
    if row.has("messages"):
        field, messages = "messages", _tables(row, "messages", row.any("messages"))
        told = [message.get("content") for message in messages if message.get("role") == "assistant"]
    else:
        field = "choices"
        choices = _tables(row, field, row.any(field, "an answer has 'messages' or 'choices'"))
        told = choices[0].get("turns") if choices else None
    texts = [_text(one) for one in told] if isinstance(told, list) else []
    if not texts or None in texts:
        raise row.wrong(field, "a model's answers, a text each turn")
    return [text for text in texts if text is not None]


def _text(one: Any) -> str | None:
    found = one.get("answer", one.get("content")) if isinstance(one, dict) else one
    return found if isinstance(found, str) else None


def _tables(row: fields.Row, name: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise row.wrong(name, "a list of objects")
    return value
