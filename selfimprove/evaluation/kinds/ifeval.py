"""IFEval (arXiv 2311.07911): right where every constraint is kept, strictly.

Rows: `key`, `prompt`, `instruction_id_list`, `kwargs`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfimprove import constraints
from selfimprove.errors import UserError
from selfimprove.evaluation.benchmarks import fields
from selfimprove.evaluation.benchmarks.ifeval import shares
from selfimprove.evaluation.kinds.question import Checked, Kind, Question, read
from selfimprove.records import Sample


def _read(path: Path, answers: Path | None) -> list[Question]:
    return read(path, _turns)


def _turns(row: fields.Row) -> tuple[str, list[str], list[str]]:
    wanted = json.dumps({name: row.any(name) for name in ("instruction_id_list", "kwargs")})
    try:
        constraints.parse(wanted)
    except constraints.ConstraintError as error:
        raise UserError(f"{row.where}: {error}", "instructions and parameters as in IFEval's own file") from None
    return row.name("key"), [row.text("prompt")], [wanted]


def check(question: Question, text: str) -> Checked:
    """Whether all constraints are kept; otherwise which are not."""
    wanted = constraints.parse(question.answers[0])
    broken = [one.name for one, kept in zip(wanted, constraints.strict(text, wanted), strict=True) if not kept]
    return Checked(not broken, f"not kept: {', '.join(broken)}" if broken else "")


def _extras(questions: Mapping[str, Question], samples: Sequence[Sample]) -> dict[str, Any]:
    """The four published figures: strict and loose, by prompt and by instruction."""
    asked = [constraints.parse(questions[sample.prompt_id].answers[0]) for sample in samples]
    verdicts = {
        how: [verdict(sample.text, wanted) for sample, wanted in zip(samples, asked, strict=True)]
        for how, verdict in (("strict", constraints.strict), ("loose", constraints.loose))
    }
    return {how: shares(of) for how, of in verdicts.items()}


KIND = Kind(_read, check=check, extras=_extras)
