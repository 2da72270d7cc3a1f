"""Preference training of this iteration's policy on the pairs of the iterations that the recipe names.

With `search` beta is chosen first, as SynPO does each round (arXiv 2410.06961, section 4.1): a policy is trained with
each on most of the prompts' pairs, and looked at on the others'. How SynPO judges them is not published. Here it is by
the pairs that a policy ranks right, by log-probs per token; the evaluation set is never touched.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from selfimprove import recipe
from selfimprove.errors import UserError
from selfimprove.records import Pair, Verdict
from selfimprove.stages.io import StageIO
from selfimprove.store import iter_rows, row_seed, write_atomically
from selfimprove.training import replay
from selfimprove.training.job import PairRow

VERSION = 2
TEMPLATES: tuple[str, ...] = ()
POLICY, AVERAGE = "policy", "average"


class Row(NamedTuple):
    """A pair to train on and the prompt it is of."""

    prompt_id: str
    pair: PairRow


class Trial(NamedTuple):
    """A beta, and what the policy trained with it makes of the pairs that it has not seen."""

    beta: float
    accuracy: float  # share of the pairs whose chosen answer has the higher mean log-prob per token
    margin: float  # mean difference, nats per token
    unknown: int  # pairs too long for the engine's context, or with an empty answer


def run(io: StageIO, section: recipe.Train) -> None:
    """Write policy/ (a plain model directory) and metrics.jsonl, a line per step; search.json, average/ where asked."""
    iterations = sorted(int(name.removeprefix("pairs-")) for name in io.inputs if name.startswith("pairs-"))
    known = {k: list(_rows(io.inputs[f"pairs-{k}"])) for k in iterations}
    rows = [row for k in iterations for row in known[k]]
    unit = "pair"
    if section.replay:
        rows, unit = _replayed(io, section.replay, known), "draw"
    if section.search:
        section = search(io, section, rows)
    policy = io.train("training the policy", [row.pair for row in rows], "start", POLICY, section.optimizer, section)
    io.out.contract(unit, len(rows), len(rows) - io.out.quarantined.total())
    if section.average:
        from selfimprove.training import export  # torch takes seconds to import: plans do without

        distance = export.average(io.models["average"], policy, section.average, io.out.path(AVERAGE))
        io.out.metrics["average distance"] = distance


def _replayed(io: StageIO, section: recipe.Replay, known: dict[int, list[Row]]) -> list[Row]:
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


def search(io: StageIO, section: recipe.Train, rows: list[Row]) -> recipe.Train:
    """The section with the beta that ranks most held-out pairs right; of equals the larger margin, the smaller beta."""
    assert section.search is not None
    admitted = {pair.pair_id for pair in io.admit([row.pair for row in rows], section.optimizer)}
    usable = [row for row in rows if row.pair.pair_id in admitted]
    heldout = held_out({row.prompt_id for row in usable}, section.search.heldout_share, io)
    train = [row.pair for row in usable if row.prompt_id not in heldout]
    test = [row.pair for row in usable if row.prompt_id in heldout]
    trials = [_trial(io, with_beta(section, beta), beta, train, test) for beta in section.search.betas]
    best = max(trials, key=lambda trial: (trial.accuracy, trial.margin, -trial.beta))
    pairs = {"trained pairs": len(train), "held-out pairs": len(test), "held-out prompts": len(heldout)}
    io.out.write_json("search.json", {"chosen": best.beta, **pairs, "trials": [trial._asdict() for trial in trials]})
    io.out.metrics["chosen beta"] = best.beta
    io.out.metrics["held-out accuracy by beta"] = {f"{trial.beta:g}": trial.accuracy for trial in trials}
    return with_beta(section, best.beta)


def with_beta(section: recipe.Train, beta: float) -> recipe.Train:
    """The section with its loss's beta settled, and no search any more."""
    assert isinstance(section.loss, recipe.Choice)  # the recipe refuses a search with a mix
    loss = recipe.Choice.model_validate(section.loss.model_dump() | {"beta": beta})
    return section.model_copy(update={"loss": loss, "search": None})


def held_out(prompts: set[str], share: float, io: StageIO) -> set[str]:
    """The share of the prompts that the search trains on none of: at least one, and never all.

    Raises:
        UserError: fewer than two prompts.
    """
    if len(prompts) < 2:
        raise UserError("train.search needs pairs of at least two prompts", "more prompts, or drop train.search")
    number = min(len(prompts) - 1, max(1, round(share * len(prompts))))
    return set(sorted(prompts, key=lambda prompt: (io.row_seed(f"search/{prompt}"), prompt))[:number])


def _trial(io: StageIO, section: recipe.Train, beta: float, train: list[PairRow], test: list[PairRow]) -> Trial:
    """Train with one beta and look at the result; one that a killed process has finished is not made again."""
    name = f"beta-{beta:g}"
    finished = io.scratch / f"{name}.json"
    if finished.exists():
        return Trial(**json.loads(finished.read_text(encoding="utf-8")))
    model = io.train(f"trying beta {beta:g}", train, "start", name, section.optimizer, section, trial=True)
    trial = _look(io, model, beta, test)
    write_atomically(finished, json.dumps(trial._asdict()))
    shutil.rmtree(model.parent)  # weights of many betas would fill a disk
    return trial


def _look(io: StageIO, model: Path, beta: float, test: list[PairRow]) -> Trial:
    chosen = _per_token(io, model, [(pair.prompt_ids, pair.chosen_ids) for pair in test])
    rejected = _per_token(io, model, [(pair.prompt_ids, pair.rejected_ids) for pair in test])
    gaps = [c - r for c, r in zip(chosen, rejected, strict=True) if c is not None and r is not None]
    if not gaps:
        raise UserError("train.search: no held-out pair fits into the engine's context", "raise engine.max_model_len")
    right = sum(gap > 0 for gap in gaps) / len(gaps)
    return Trial(beta, right, sum(gaps) / len(gaps), len(test) - len(gaps))


def _per_token(io: StageIO, model: Path, answers: list[tuple[list[int], list[int]]]) -> list[float | None]:
    return [None if logps is None else sum(logps) / len(logps) for logps in io.score(model, answers)]


def _rows(directory: Path) -> Iterator[Row]:
    scores: dict[str, list[float]] = {}
    for verdict in iter_rows(directory, "verdicts", Verdict):
        if verdict.score is not None and verdict.source == "current":
            scores.setdefault(verdict.prompt_id, []).append(verdict.score)
    for pair in iter_rows(directory, "pairs", Pair):
        rates = win_rates(pair.chosen_score, pair.rejected_score, scores.get(pair.prompt_id, []))
        ids = pair.prompt_token_ids, pair.chosen_token_ids, pair.rejected_token_ids
        yield Row(pair.prompt_id, PairRow(pair.pair_id, *ids, rates, pair.source))


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
