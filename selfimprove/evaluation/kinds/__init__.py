"""Benchmarks that a recipe names, by kind: how their files are read and how answers become scores."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from selfimprove import chat
from selfimprove.errors import UserError
from selfimprove.evaluation import lm_harness
from selfimprove.evaluation.kinds import alpaca_eval, arena_hard, gsm8k, ifeval, mt_bench, prompts
from selfimprove.evaluation.kinds.question import Checked, Kind, Question
from selfimprove.recipe import Benchmark

__all__ = ["KINDS", "Checked", "Kind", "Question", "Read", "held_out", "questions"]

KINDS: Mapping[str, Kind] = {
    "gsm8k": gsm8k.KIND,
    "ifeval": ifeval.KIND,
    "alpaca_eval": alpaca_eval.KIND,
    "arena_hard": arena_hard.KIND,
    "mt_bench": mt_bench.KIND,
    "prompts": prompts.KIND,
}


class Read(NamedTuple):
    """The questions that are asked, and how many the file has."""

    questions: list[Question]
    total: int


def questions(benchmark: Benchmark, files: Mapping[str, Path]) -> Read:
    """The questions of a benchmark, the first of them where it has a limit.

    Raises:
        UserError: a file that cannot be read, a row that is wrong, fewer than two prompts, or an id that stands twice.
    """
    path, *answers = (files[name] for name in benchmark.files)
    found = KINDS[benchmark.kind].read(path, answers[0] if answers else None)
    seen: set[str] = set()
    for question in found:
        if question.prompt_id in seen:
            raise UserError(f"{path}: id '{question.prompt_id}' stands twice", "give each row an id of its own")
        seen.add(question.prompt_id)
        if not all(chat.is_unicode(text) for text in (*question.turns, *question.answers)):
            raise UserError(f"{path}: '{question.prompt_id}' holds a character that is no text", "mend the row")
        if not all(turn.strip() for turn in question.turns):
            raise UserError(f"{path}: the prompt of '{question.prompt_id}' is empty", "mend the row or remove it")
    if len(found) < 2:
        raise UserError(f"{path} holds {len(found)} prompts, at least 2 are needed", "one JSON object a line")
    return Read(found[: benchmark.limit], len(found))


def held_out(files: Mapping[str, Path]) -> list[tuple[str, str]]:
    """The prompts of all benchmarks among a stage's files, with their ids; of a dialogue the first turn.

    All of a file, whatever the limit: what is left out today may be asked tomorrow.
    """
    found = []
    for name, path in files.items():
        what, *kind_and_name = name.split(":")
        if what == "benchmark":
            kind = kind_and_name[0]
            if kind == lm_harness.KIND:
                found += lm_harness.prompts(path)
            else:
                found += [(question.prompt_id, question.turns[0]) for question in KINDS[kind].read(path, None)]
    return found
