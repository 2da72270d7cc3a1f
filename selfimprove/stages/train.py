"""Preference training of this iteration's policy on the pairs of the iterations that the recipe names."""

from collections.abc import Iterator
from pathlib import Path

from selfimprove import recipe
from selfimprove.records import Pair, Verdict
from selfimprove.stages.io import StageIO
from selfimprove.store import read_rows
from selfimprove.training.job import PairRow

VERSION = 2
TEMPLATES: tuple[str, ...] = ()
POLICY, AVERAGE = "policy", "average"


def run(io: StageIO, section: recipe.Train) -> None:
    """Write policy/ (a plain model directory) and metrics.jsonl (one line per optimiser step)."""
    rows = [row for name, directory in io.inputs.items() if name.startswith("pairs") for row in _rows(directory)]
    io.train("training the policy", rows, "start", POLICY, section.optimizer, section)
    io.out.contract("pair", len(rows), len(rows) - len(io.out.quarantined))


def _rows(directory: Path) -> Iterator[PairRow]:
    scores: dict[str, list[float]] = {}
    for verdict in read_rows(directory, "verdicts", Verdict):
        if verdict.score is not None and verdict.source == "current":
            scores.setdefault(verdict.prompt_id, []).append(verdict.score)
    for pair in read_rows(directory, "pairs", Pair):
        rates = win_rates(pair.chosen_score, pair.rejected_score, scores.get(pair.prompt_id, []))
        yield PairRow(pair.pair_id, pair.prompt_token_ids, pair.chosen_token_ids, pair.rejected_token_ids, rates)


def win_rates(chosen: float | None, rejected: float | None, samples: list[float]) -> tuple[float, float, float] | None:
    """How often chosen and rejected win against the prompt's samples, and chosen against rejected (SPPO, 2405.00675).

    A score wins against another with the probability sigmoid(difference), one half against itself. None where a score
    is unknown.
    """
    if chosen is None or rejected is None or not samples:
        return None

    def mean(score: float) -> float:
        return sum(_wins(score, other) for other in samples) / len(samples)

    return mean(chosen), mean(rejected), _wins(chosen, rejected)


def _wins(score: float, other: float) -> float:
    from scipy.special import expit

    return float(expit(score - other))
