"""Preference training of this iteration's policy on the pairs of the iterations that the recipe names."""

from collections.abc import Iterator
from pathlib import Path

from selfimprove import recipe
from selfimprove.records import Pair, Verdict
from selfimprove.stages.io import StageIO
from selfimprove.store import read_rows, row_seed
from selfimprove.training import replay
from selfimprove.training.job import PairRow

VERSION = 2
TEMPLATES: tuple[str, ...] = ()
POLICY, AVERAGE = "policy", "average"


def run(io: StageIO, section: recipe.Train) -> None:
    """Write policy/ (a plain model directory), metrics.jsonl (one line per optimiser step), average/ where asked."""
    iterations = sorted(int(name.removeprefix("pairs-")) for name in io.inputs if name.startswith("pairs-"))
    known = {k: list(_rows(io.inputs[f"pairs-{k}"])) for k in iterations}
    rows = [row for k in iterations for row in known[k]]
    unit = "pair"
    if section.replay:
        rows, unit = _replayed(io, section.replay, known), "draw"
    policy = io.train("training the policy", rows, "start", POLICY, section.optimizer, section)
    io.out.contract(unit, len(rows), len(rows) - len(io.out.quarantined))
    if section.average:
        from selfimprove.training import export  # torch takes seconds to import: plans do without

        distance = export.average(io.models["average"], policy, section.average, io.out.path(AVERAGE))
        io.out.metrics["average distance"] = distance


def _replayed(io: StageIO, section: recipe.Replay, known: dict[int, list[PairRow]]) -> list[PairRow]:
    """SAPO's draws; a pair drawn twice is two rows, which count twice in the loss."""
    rows = [row for own in known.values() for row in own]
    seeds = [row_seed(io.seed, k, io.stage, "replay") for k in known]
    drawn = replay.draw([len(own) for own in known.values()], section.capacity, section.draws, seeds)
    io.out.metrics |= {
        "replay pairs": len(rows),
        "replay buffer": min(len(rows), section.capacity),
        "replay distinct": len(set(drawn)),
    }
    return [rows[i] for i in drawn]


def _rows(directory: Path) -> Iterator[PairRow]:
    scores: dict[str, list[float]] = {}
    for verdict in read_rows(directory, "verdicts", Verdict):
        if verdict.score is not None and verdict.source == "current":
            scores.setdefault(verdict.prompt_id, []).append(verdict.score)
    for pair in read_rows(directory, "pairs", Pair):
        rates = win_rates(pair.chosen_score, pair.rejected_score, scores.get(pair.prompt_id, []))
        ids = (pair.prompt_token_ids, pair.chosen_token_ids, pair.rejected_token_ids)
        yield PairRow(pair.pair_id, *ids, rates, pair.source)


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
