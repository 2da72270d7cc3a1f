"""Arena-Hard against a baseline's answers: two games a question, one in each order.

Rows: `uid` or `question_id`, and `prompt` (or `turns`, as older files have it); the baseline's answers in a file of
their own. With one opponent the Bradley-Terry win rate is the mean over the games, and Elo is a function of it.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfimprove.errors import UserError
from selfimprove.evaluation import style
from selfimprove.evaluation.benchmarks import fields
from selfimprove.evaluation.bradley_terry import BASELINE_ELO, Battle, Winner
from selfimprove.evaluation.kinds.question import Kind, Question, identifier, read, written
from selfimprove.records import Sample

GAMES: Mapping[float, tuple[Winner, Winner]] = {  # what a mean over two games says of them, their order aside
    0.0: ("second", "second"), 0.25: ("second", "tie"), 0.5: ("tie", "tie"), 0.75: ("first", "tie"),
    1.0: ("first", "first"),
}  # fmt: skip


def _read(path: Path, answers: Path | None) -> list[Question]:
    known = written(answers) if answers else None

    def turns(row: fields.Row) -> tuple[str, list[str], list[str]]:
        prompt_id = identifier(row)
        if known is None:  # the prompts alone are wanted
            return prompt_id, [_prompt(row)], []
        if prompt_id not in known:
            raise UserError(
                f"{row.where}: {answers} has no answer to question {prompt_id}",
                "the baseline must have answered every question; one benchmark for each category with its own baseline",
            )
        return prompt_id, [_prompt(row)], known[prompt_id][:1]

    return read(path, turns)


def _prompt(row: fields.Row) -> str:
    if row.has("prompt"):
        return row.text("prompt")
    turns = row.any("turns")
    if not isinstance(turns, list) or len(turns) != 1 or not isinstance(turns[0], dict):
        raise row.wrong("turns", "a list of one turn")
    return fields.Row(row.where, turns[0]).text("content")


def _extras(questions: Mapping[str, Question], samples: Sequence[Sample]) -> dict[str, Any]:
    mean = sum(sample.score or 0.0 for sample in samples) / len(samples)
    return {
        "elo": BASELINE_ELO + 400 * math.log10(mean / (1 - mean)) if 0 < mean < 1 else None,
        "style_controlled": _controlled(questions, samples),
    }


def _controlled(questions: Mapping[str, Question], samples: Sequence[Sample]) -> dict[str, Any] | None:
    """The win rate at the mean style difference; None where verdicts are no wins, losses and ties, or none is lost.

    Texts are counted in words, where upstream counts tokens of GPT-4o.
    """
    battles, differences = [], []
    for sample in samples:
        if sample.score is None or sample.score not in GAMES:
            return None
        texts = sample.text, questions[sample.prompt_id].answers[0]
        own, other = (style.style(text, len(text.split())) for text in texts)
        for winner in GAMES[sample.score]:
            battles.append(Battle(sample.prompt_id, "model", "baseline", winner))
            differences.append(style.difference(own, other))
    found = style.controlled(battles, differences, "baseline", "both").ratings["model"]
    if found.win_rate is None:
        return None
    bounds = None if found.low is None or found.high is None else [found.low / 100, found.high / 100]
    return {"value": found.win_rate / 100, "ci95": bounds}


KIND = Kind(_read, judge="compares", answers="needed", extras=_extras)
