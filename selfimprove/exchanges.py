"""One prompt and the answer to it, from a row in any form that other tools write.

| columns | written by |
|---|---|
| `prompt`, `completion`: texts, or lists of one message each | this project, TRL |
| `messages`: role and content | OpenAI, Hugging Face chat datasets |
| `conversations`: from and value | ShareGPT |
| `instruction`, `input` (may be missing or empty), `output` | Alpaca |
| `question`, `answer` | GSM8K and other benchmarks |

A preference has `chosen` and `rejected` beside one of these prompts, as TRL writes them: texts, lists of the answer's
message, or lists of the prompt's and the answer's, beside which the prompt may be missing.

More than one turn, a system's, or a column that says more is refused and not cut: which part should be trained on is
not ours to guess.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from selfimprove.errors import UserError

FORMS = "prompt and completion, messages, conversations, instruction and output, or question and answer"
ELSE = ("system", "history", "tools", "chosen", "rejected")  # columns that change what a row means
CONTRAST = ("chosen", "rejected")
SHOWN = 30  # characters of a name that somebody else gave
PROMPTS = ("prompt", "messages", "conversations", "instruction", "question")  # columns that hold one
PREFERENCES = "prompt, chosen and rejected; or chosen and rejected as lists of the prompt's message and the answer's"
USER, ASSISTANT = ("user", "human"), ("assistant", "gpt")


class Exchange(NamedTuple):
    """What a row says: the column and its value, which nobody has looked at yet."""

    prompt: tuple[str, Any]
    answer: tuple[str, Any] | None  # where the row has one


class Contrast(NamedTuple):
    """What a preference says, likewise."""

    prompt: tuple[str, Any]
    chosen: tuple[str, Any]
    rejected: tuple[str, Any]


def preference(row: Mapping[str, Any], where: str) -> Contrast:
    """The prompt of a row and its two answers.

    Raises:
        UserError: the row has none of the forms, or is a dialogue of another shape.
    """
    if missing := [column for column in CONTRAST if column not in row]:
        raise UserError(f"{where}: no column '{missing[0]}'", f"a pair has {PREFERENCES}")
    before, answers = [], []
    for column in CONTRAST:
        value = row[column]
        if isinstance(value, list) and len(value) > 1:
            prompt, *answer = _dialogue(value, column, where)
            before.append((column, prompt))
            value = answer[0]
        answers.append((column, _one(value, column, ASSISTANT, where)))
    rest = {column: value for column, value in row.items() if column not in CONTRAST}
    beside = [of(rest, where, "completion").prompt] if any(column in rest for column in PROMPTS) else []
    prompts = [*beside, *before]
    if not prompts:
        raise UserError(f"{where}: no prompt beside chosen and rejected", f"a pair has {PREFERENCES}")
    for column, text in prompts[1:]:
        if text != prompts[0][1]:
            raise UserError(
                f"{where}: '{column}' answers another prompt than '{prompts[0][0]}' has",
                "chosen and rejected answer one and the same prompt; mend the row or remove it",
            )
    return Contrast(prompts[0], *answers)


def of(row: Mapping[str, Any], where: str, answer: str) -> Exchange:
    """The prompt and the answer of a row.

    Args:
        row: columns and values.
        where: the row's place, for what is said of it.
        answer: the column beside `prompt` that holds the answer.

    Raises:
        UserError: the row has none of the forms, or is a dialogue of another shape.
    """
    for column in ELSE:
        if row.get(column):
            sentence = f"{where}: column '{column}' says more than one prompt and its answer"
            raise UserError(sentence, "put into the prompt what the model should see of it, and remove the column")
    if row.get("label") is False:
        raise UserError(f"{where}: label is false: its answer is one to avoid", "remove the row")
    dialogue = next((name for name in ("messages", "conversations") if name in row), None)
    given = (answer, _one(row[answer], answer, ASSISTANT, where)) if answer in row else None
    if dialogue and not (given and "prompt" in row):  # some sets have a prompt beside the whole dialogue
        said = _dialogue(row[dialogue], dialogue, where)
        return Exchange((dialogue, said[0]), given or ((dialogue, said[1]) if said[1:] else None))
    if "prompt" in row:
        return Exchange(("prompt", _one(row["prompt"], "prompt", USER, where)), given)
    if "instruction" in row:
        parts = [row["instruction"], *([row["input"]] if row.get("input") else [])]
        if not all(isinstance(part, str) for part in parts):
            raise UserError(f"{where}: instruction and input must be texts", "mend the row or remove it")
        return Exchange(("instruction", "\n\n".join(parts)), ("output", row["output"]) if "output" in row else None)
    if "question" in row:
        return Exchange(("question", row["question"]), ("answer", row["answer"]) if "answer" in row else None)
    raise UserError(
        f"{where}: no prompt among the columns {', '.join(name[:SHOWN] for name in list(row)[:8]) or '(none)'}",
        f"known: {FORMS}",
    )


def _dialogue(value: Any, column: str, where: str) -> list[Any]:
    """What the user says, and what the assistant answers where it does."""
    turns = _turns(value, column, where)
    fits = all(role in roles for (role, _), roles in zip(turns, (USER, ASSISTANT), strict=False))
    if not fits or not 1 <= len(turns) <= 2:
        raise UserError(
            f"{where}: {column} holds {_told(turns)}, and one prompt with its answer is taken",
            "keep an exchange a row, a user's turn and the assistant's; a system's words can stand in the prompt",
        )
    return [text for _, text in turns]


def _one(value: Any, column: str, roles: Sequence[str], where: str) -> Any:
    """A text as it stands, or that of a list of one message."""
    if not isinstance(value, list):
        return value
    turns = _turns(value, column, where)
    if len(turns) != 1 or turns[0][0] not in roles:
        raise UserError(
            f"{where}: {column} holds {_told(turns)}, and one message of the {roles[0]} is taken",
            "what a system or earlier turns say can stand in the prompt; else remove the row",
        )
    return turns[0][1]


def _turns(value: Any, column: str, where: str) -> list[tuple[str, Any]]:
    role, text = ("from", "value") if column == "conversations" else ("role", "content")
    if not isinstance(value, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get(role), str) for turn in value
    ):
        raise UserError(
            f"{where}: {column} is no list of turns with '{role}' and '{text}'", "mend the row or remove it"
        )
    if any(turn.get("weight") == 0 or turn.get("tool_calls") for turn in value):
        raise UserError(f"{where}: {column} has a turn of weight 0, or with tool calls", "remove the row")
    return [(turn[role], turn.get(text)) for turn in value]


def _told(turns: Sequence[tuple[str, Any]]) -> str:
    roles = [role[:SHOWN] for role, _ in turns[:4]] + ["..."] * (len(turns) > 4)
    return f"{len(turns)} turns ({', '.join(roles)})" if turns else "no turn"
