"""IFEval (arXiv 2311.07911): shares of prompts and of instructions that responses follow, strictly and loosely.

Responses: rows with `response` and `key` (or `prompt`). The prompts' file has `key`, `prompt`, `instruction_id_list`
and `kwargs`; rows of responses may have these themselves.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from selfimprove import constraints
from selfimprove.errors import UserError
from selfimprove.evaluation.benchmarks import fields
from selfimprove.evaluation.statistics import clustered_standard_error, proportion

PROMPTS = "input_data.jsonl"  # its published name
USED = ("key", "prompt", "response", "instruction_id_list", "kwargs")
Check = Callable[[str, Sequence[constraints.Constraint]], list[bool]]


class Verdicts(NamedTuple):
    """Which instructions of a prompt a response follows."""

    key: str
    strict: list[bool]
    loose: list[bool]


def score(path: Path, prompts: Path | None = None) -> dict[str, Any]:
    """Shares at the level of prompts, with Wilson's interval, and of instructions, clustered by prompt.

    Args:
        path: the responses.
        prompts: the prompts; otherwise `input_data.jsonl` beside the responses or one folder up, where the rows have
            no instructions themselves.

    Raises:
        UserError: a file that cannot be read, a row that is wrong, a response to no prompt, or two to one.
    """
    rows = fields.read(path)
    source = prompts if prompts is not None else None if rows[0].has("instruction_id_list") else _beside(path)
    told = None if source is None else {key: row for row in fields.read(source) for key in _keys(row)}
    found: dict[str, Verdicts] = {}
    for row in rows:
        asked = row if told is None else _asked(row, told, source)
        verdicts = _verdicts(row, asked)
        if verdicts.key in found:
            raise UserError(f"{row.where}: a second response to prompt {verdicts.key!r}", "one response a prompt")
        found[verdicts.key] = verdicts
    every = list(found.values())
    asked_for = len(found) if told is None else len({id(row) for row in told.values()})
    return {
        "benchmark": "ifeval",
        "file": str(path),
        "prompts_file": source and str(source),
        "rows": len(rows),
        "ignored": {},
        "prompts_without_response": asked_for - len(found),
        "unused_fields": fields.unused(rows, USED),
        "strict": shares([one.strict for one in every]),
        "loose": shares([one.loose for one in every]),
        "per_prompt": [one._asdict() for one in every],
    }


def shares(verdicts: Sequence[list[bool]]) -> dict[str, Any]:
    """Of prompts whose instructions are all followed, and of instructions, each with its 95 % interval."""
    prompt = proportion([float(all(one)) for one in verdicts])
    flat = [float(followed) for one in verdicts for followed in one]
    clusters = [str(number) for number, one in enumerate(verdicts) for _ in one]
    share = sum(flat) / len(flat)
    error = clustered_standard_error(flat, clusters)
    return {
        "prompt": {"accuracy": prompt.value, "low": prompt.low, "high": prompt.high, "n": prompt.n},
        "instruction": {
            "accuracy": share,
            "standard_error": error,
            "low": max(0.0, share - 1.96 * error),
            "high": min(1.0, share + 1.96 * error),
            "n": len(flat),
        },
    }


def _verdicts(row: fields.Row, asked: fields.Row) -> Verdicts:
    names, parameters = asked.any("instruction_id_list"), asked.any("kwargs")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise asked.wrong("instruction_id_list", "a list of instructions")
    if not isinstance(parameters, list) or not all(isinstance(one, Mapping) for one in parameters):
        raise asked.wrong("kwargs", "a list of objects")
    try:
        wanted = constraints.read(names, parameters)
    except constraints.ConstraintError as error:
        raise UserError(f"{asked.where}: {error}", "instructions and parameters as in IFEval's own file") from None
    text = row.text("response")
    key = asked.name("key") if asked.has("key") else asked.text("prompt")
    return Verdicts(key, constraints.strict(text, wanted), constraints.loose(text, wanted))


def _keys(row: fields.Row) -> list[tuple[str, str]]:
    """By what a response may name the prompt."""
    return [("key", row.name("key")), ("prompt", row.text("prompt"))]


def _asked(row: fields.Row, told: Mapping[tuple[str, str], fields.Row], source: Path | None) -> fields.Row:
    name = "key" if row.has("key") else "prompt"
    value = row.name(name, "a response names its prompt by 'key' or by 'prompt'")
    if (name, value) not in told:
        shown = value if len(value) <= 60 else f"{value[:57]}..."
        raise UserError(f"{row.where}: {source} has no prompt with {name} {shown!r}", "--prompts FILE")
    return told[name, value]


def _beside(path: Path) -> Path:
    for folder in (path.parent, path.parent.parent):
        if (folder / PROMPTS).is_file():
            return folder / PROMPTS
    raise UserError(f"{path} has no instructions, and no {PROMPTS} is beside it", "--prompts FILE, IFEval's own file")
