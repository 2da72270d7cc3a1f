"""AlpacaEval 2 against a baseline's outputs: the mean of P(better) over both orders, raw and length-controlled.

Rows: `instruction` and the baseline's `output`. The published length control has difficulties of its 805 instructions
and answers of gamed baselines that belong to its own judge; here it is the variant without both, which fits any
prompts and any judge (length_controlled_minimal).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfimprove.evaluation import length_controlled as lc
from selfimprove.evaluation.benchmarks import fields
from selfimprove.evaluation.kinds.question import Kind, Question, read
from selfimprove.records import Sample


def _read(path: Path, answers: Path | None) -> list[Question]:
    number = iter(range(10**9))

    def turns(row: fields.Row) -> tuple[str, list[str], list[str]]:
        return f"{next(number):05d}", [row.text("instruction")], [row.text("output")]

    return read(path, turns)


def _extras(questions: Mapping[str, Question], samples: Sequence[Sample]) -> dict[str, Any]:
    """The length-controlled win rate, None and why where it cannot be had; lengths are in characters."""
    baseline = [len(questions[sample.prompt_id].answers[0]) for sample in samples]
    own = [len(sample.text) for sample in samples]
    p = np.array([sample.score for sample in samples], dtype=float)
    lengths = {
        "mean_characters": sum(own) / len(own),
        "baseline_mean_characters": sum(baseline) / len(baseline),
        "shorter_share": float(np.mean(np.array(own) < np.array(baseline))),
    }
    delta = np.array(baseline, dtype=float) - np.array(own, dtype=float)
    rows = lc.Rows(delta, p, None)
    if len(samples) < lc.FOLDS:
        return {**lengths, "lc_win_rate": None, "lc_reason": f"fewer than {lc.FOLDS} prompts"}
    try:
        found = lc.length_controlled(rows)
        spread = lc.bootstrap(rows, None, found.c)
    except (ValueError, ArithmeticError) as error:
        return {**lengths, "lc_win_rate": None, "lc_reason": str(error)}
    return {
        **lengths,
        "lc_win_rate": found.win_rate / 100,
        "lc_ci95": [spread.low / 100, spread.high / 100],
        "lc_standard_error": spread.standard_error / 100,
    }


KIND = Kind(_read, judge="compares", extras=_extras)
