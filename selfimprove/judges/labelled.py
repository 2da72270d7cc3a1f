"""Pairs of answers that people have labelled, and recorded verdicts on them, in their published formats."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from selfimprove import jsonl
from selfimprove.errors import UserError
from selfimprove.judges.audit import Winner


class LabelledPair(NamedTuple):
    """Two answers to a prompt, and which one people prefer; None where they have not said, or not agreed."""

    subset: str  # the file's name without its endings
    number: int  # in its file, from 0
    prompt: str
    first: str
    second: str
    human: Winner | None


class RecordedVerdict(NamedTuple):
    """A judge's verdict on a pair: P(first is better); None could not be read."""

    subset: str  # "" where the file has only one
    judge: str
    strategy: str
    number: int  # of the pair in its file, from 0
    human: Winner | None  # as this file has it
    forward: float | None
    swapped: float | None  # shown the other way round, and turned back
    both_orders: bool
    where: str  # file and line


class Format(NamedTuple):
    """Columns of a published format, and what its labels mean."""

    prompt: tuple[str, ...]  # joined by an empty line
    first: str
    second: str
    labels: tuple[str, ...]  # of several annotators the majority counts
    meaning: Mapping[Any, Winner | None]

    @property
    def columns(self) -> tuple[str, ...]:
        """What a row must have."""
        return (*self.prompt, self.first, self.second, *self.labels)


ONE_TWO: Mapping[Any, Winner | None] = {1: "first", 2: "second"}
ANNOTATORS = ("annotator1", "annotator2", "annotator3")
LETTERS: Mapping[Any, Winner | None] = {"a": "first", "b": "second", "tie": "tie", None: None}
PAIRS: Mapping[str, Format] = {
    "llmbar": Format(("input",), "output_1", "output_2", ("label",), ONE_TWO),
    "autoj": Format(("prompt",), "response 1", "response 2", ("label",), {0: "first", 1: "second", 2: "tie"}),
    "pandalm": Format(("instruction", "input"), "response1", "response2", ANNOTATORS, {0: "tie", **ONE_TWO}),
    "plain": Format(("prompt",), "answer_a", "answer_b", ("label",), LETTERS),
}

RECORDED = {"1": 1.0, "2": 0.0, "0": 0.5, "Tie": 0.5, "garbage": None, "None": None}  # PandaLM's and LLMBar's words
ONE_ORDER = {"gpt_result": "idx", "pandalm_result": "idx"}  # column of the verdict -> of the pair
BOTH_ORDERS = ("subset", "judge", "strategy", "index", "label", "fwd_winner", "swp_winner")


def read_pairs(path: Path) -> Iterator[LabelledPair]:
    """The labelled pairs of a JSON, JSONL or .gz file, one by one.

    Raises:
        UserError: the file cannot be read, has a format that is not known, or a row that is wrong.
    """
    chosen: Format | None = None
    for number, (line, row) in enumerate(jsonl.rows(path)):
        where = f"{path}, line {line}"
        if chosen is None:
            chosen = next((one for one in PAIRS.values() if set(one.columns) <= set(row)), None)
            if chosen is None:
                known = "; ".join(f"{name}: {', '.join(one.columns)}" for name, one in PAIRS.items())
                raise UserError(f"{where}: no known format has the columns {_told(row)}", f"known formats: {known}")
        _complete(row, chosen.columns, where)
        prompt = "\n\n".join(text for name in chosen.prompt if (text := _text(row, name, where)).strip())
        first, second = _text(row, chosen.first, where), _text(row, chosen.second, where)
        votes = [_label(row, name, chosen.meaning, where) for name in chosen.labels]
        yield LabelledPair(_subset(path), number, prompt, first, second, _majority(votes))


def read_verdicts(path: Path) -> Iterator[RecordedVerdict]:
    """The recorded verdicts of a JSON, JSONL or .gz file, one by one: LLMBar's both orders, or PandaLM's one.

    Raises:
        UserError: the file cannot be read, has a format that is not known, or a row that is wrong.
    """
    read = None
    for line, row in jsonl.rows(path):
        where = f"{path}, line {line}"
        if read is None:
            read = _reader(row, where)
        yield read(row, path, where)


def _reader(row: Mapping[str, Any], where: str) -> Callable[[Mapping[str, Any], Path, str], RecordedVerdict]:
    if set(BOTH_ORDERS) <= set(row):
        return _both
    for name, pair in ONE_ORDER.items():
        if {name, pair} <= set(row):
            return _one
    known = "; ".join([", ".join(BOTH_ORDERS), *(f"{pair}, {name}" for name, pair in ONE_ORDER.items())])
    raise UserError(f"{where}: no known format of verdicts has the columns {_told(row)}", f"known formats: {known}")


def _both(row: Mapping[str, Any], path: Path, where: str) -> RecordedVerdict:
    _complete(row, BOTH_ORDERS, where)
    human = _label(row, "label", {"1": "first", "2": "second"}, where)
    names = (_text(row, "subset", where), _text(row, "judge", where), _text(row, "strategy", where))
    forward, swapped = _verdict(row, "fwd_winner", where), _verdict(row, "swp_winner", where)
    return RecordedVerdict(*names, _number(row, "index", where), human, forward, swapped, True, where)


def _one(row: Mapping[str, Any], path: Path, where: str) -> RecordedVerdict:
    name = next((name for name in ONE_ORDER if name in row), next(iter(ONE_ORDER)))
    _complete(row, (name, ONE_ORDER[name]), where)
    number = _number(row, ONE_ORDER[name], where)
    return RecordedVerdict("", _subset(path), "", number, None, _verdict(row, name, where), None, False, where)


def _verdict(row: Mapping[str, Any], name: str, where: str) -> float | None:
    said = str(row[name])
    if said not in RECORDED:
        raise UserError(f"{where}: '{name}' is {row[name]!r}", f"known: {', '.join(RECORDED)}")
    return RECORDED[said]


def _label(row: Mapping[str, Any], name: str, meaning: Mapping[Any, Winner | None], where: str) -> Winner | None:
    said = row[name]
    if isinstance(said, bool | list | dict) or said not in meaning:
        raise UserError(f"{where}: '{name}' is {said!r}", f"known: {', '.join(map(str, meaning))}")
    return meaning[said]


def _majority(votes: list[Winner | None]) -> Winner | None:
    """What more than half say."""
    winner, number = Counter(votes).most_common(1)[0]
    return winner if 2 * number > len(votes) else None


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    """An empty answer is one; a number or a truth value, which PandaLM's test set has among its answers, is as JSON."""
    value = row[name]
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if not isinstance(value, str):
        raise UserError(f"{where}: field '{name}' must be a text", "mend the row or remove it")
    return value


def _number(row: Mapping[str, Any], name: str, where: str) -> int:
    value = row[name]
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{where}: field '{name}' must be a whole number", "the number of the pair in its file, from 0")
    return value


def _complete(row: Mapping[str, Any], columns: tuple[str, ...], where: str) -> None:
    if missing := [name for name in columns if name not in row]:
        raise UserError(f"{where}: no field '{missing[0]}'", "every row needs the fields that the first one has")


def _told(row: Mapping[str, Any]) -> str:
    return ", ".join(row) or "none"


def _subset(path: Path) -> str:
    return re.sub(r"(\.jsonl?)?(\.gz)?$", "", path.name)
