"""D2PO's discriminator (arXiv 2405.01511), in its DPO form: few gold labels, then an opinion on every answer.

Each round a judge labels some prompts: those whose answers the last discriminator tells apart least. The discriminator
is trained anew from the initial model on all pairs labelled so far; its implicit reward scores the policy's answers.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from selfimprove import data, judges, recipe
from selfimprove.errors import UserError
from selfimprove.judges import Candidate, Judge, Opinion, acquisition
from selfimprove.judges.pairing import Dropped, Judged, as_row, best_vs_worst
from selfimprove.records import Generation, Pair, Seed, Verdict
from selfimprove.stages.io import StageIO
from selfimprove.store import read_rows
from selfimprove.training.job import PairRow

VERSION = 1
TEMPLATES: tuple[str, ...] = ()
DISCRIMINATOR = "discriminator"
Scores = Mapping[tuple[str, int], float | None]  # by prompt_id and sample


def check(section: recipe.Discriminate) -> Judge:
    """The judge that gives the gold labels.

    Raises:
        UserError: unknown, or one that is no source of gold labels.
    """
    judge = judges.bind(section.judge)
    if section.judge.name == "discriminator" or judges.models(section.judge):
        raise UserError(
            f"discriminate.judge '{section.judge.name}' asks models of the run, and gold labels come from outside",
            'for example discriminate.judge = { name = "verifier", checker = "exact" }',
        )
    return judge


def run(io: StageIO, section: recipe.Discriminate) -> None:
    """Write labels-*.parquet (gold verdicts), pairs-*.parquet (of them), the discriminator, and verdicts-*.parquet."""
    rows = [r for r in read_rows(io.inputs["generations"], "generations", Generation) if r.source == "current"]
    last = io.models.get(DISCRIMINATOR)
    before = _rewards(io, last, section.beta, [row for row in rows if row.sample < 2]) if last else {}
    measured: dict[str, float | None] = dict.fromkeys((row.prompt_id for row in rows), 0.0)
    if last and section.acquisition == "confidence":
        measured = {prompt_id: gap(before, prompt_id) for prompt_id in measured}
    asked = acquisition.first(measured, section.labels, random.Random(io.row_seed("acquire")))
    gold, scores = _gold(io, section, [row for row in rows if row.prompt_id in asked])

    earlier = [
        pair
        for name, directory in io.inputs.items()
        if name.startswith("labels-")
        for pair in read_rows(directory, "pairs", Pair)
    ]
    pairs = [*earlier, *gold]
    if not pairs:
        raise UserError(
            f"iteration {io.iteration}: the gold labels tell no two answers apart, there is nothing to learn from",
            "raise discriminate.labels or generate.n",
        )
    training = recipe.Train(
        loss=recipe.Choice.model_validate({"name": "dpo", "beta": section.beta}),
        reference="initial",
        optimizer=section.optimizer,
    )
    examples = [
        PairRow(p.pair_id, p.prompt_token_ids, p.chosen_token_ids, p.rejected_token_ids, source=p.source) for p in pairs
    ]
    trained = io.train(
        "training the discriminator", examples, "initial", DISCRIMINATOR, section.optimizer, training, quarantine=False
    )

    silver = _rewards(io, trained, section.beta, rows)
    unknown = "too long for the discriminator's context"
    identity = f"discriminator(beta={section.beta})"
    io.out.write_rows(
        "verdicts",
        Verdict,
        (
            Verdict(row.prompt_id, row.source, row.sample, identity, score, "" if score is not None else unknown)
            for row in rows
            for score in [silver[row.prompt_id, row.sample]]
        ),
    )
    io.out.contract("answer", len(rows), len(rows))
    io.out.metrics |= {"gold pairs": len(gold), "gold pairs so far": len(pairs), "prompts labelled": len(asked)}
    io.out.metrics |= {
        "verdicts unknown": sum(score is None for score in silver.values()),
        "agreement with gold": agreement(scores, silver),  # on what it was trained on
        "agreement with gold before": agreement(scores, before),  # of the last discriminator, which had not seen these
    }


def agreement(gold: Scores, silver: Scores) -> float | None:
    """Share of a prompt's answers, two by two and of different gold score, that silver puts in the same order."""
    by_prompt: dict[str, list[tuple[float, float]]] = {}
    for (prompt_id, sample), score in gold.items():
        other = silver.get((prompt_id, sample))
        if score is not None and other is not None:
            by_prompt.setdefault(prompt_id, []).append((score, other))
    agreeing = [
        (a[0] > b[0]) == (a[1] > b[1]) and a[1] != b[1]
        for own in by_prompt.values()
        for a, b in itertools.combinations(own, 2)
        if a[0] != b[0]
    ]
    return sum(agreeing) / len(agreeing) if agreeing else None


def gap(rewards: Scores, prompt_id: str) -> float | None:
    """|r1 - r2| of a prompt's two first answers: the discriminator is least confident where it is smallest."""
    one, other = rewards.get((prompt_id, 0)), rewards.get((prompt_id, 1))
    return None if one is None or other is None else abs(one - other)


def _rewards(io: StageIO, model: Path, beta: float, rows: Sequence[Generation]) -> dict[tuple[str, int], float | None]:
    """The implicit reward of each answer under a discriminator that was trained from the initial model."""
    pieces = [(row.prompt_token_ids, row.token_ids) for row in rows]
    found: dict[tuple[str, int], float | None] = {}
    for row, logps, initial in zip(rows, io.score(model, pieces), io.score(io.models["initial"], pieces), strict=True):
        value = None
        if logps is not None and initial is not None:
            value = acquisition.reward(sum(logps), sum(initial), beta)
        found[row.prompt_id, row.sample] = value
    return found


def _gold(io: StageIO, section: recipe.Discriminate, rows: Sequence[Generation]) -> tuple[list[Pair], Scores]:
    """The best against the worst answer of each prompt by the judge's verdicts, and these."""
    seeds = {s.prompt_id: s for s in data.read_seeds(io.inputs["seeds"])} if "seeds" in io.inputs else {}
    candidates = [judges.candidate(r, seeds[r.prompt_id].completion if r.prompt_id in seeds else None) for r in rows]
    opinions = check(section)(candidates, io.judging)
    identity = judges.identity(section.judge)
    io.out.write_rows(
        "labels",
        Verdict,
        (
            Verdict(c.prompt_id, c.source, c.sample, identity, o.score, o.reason)
            for c, o in zip(candidates, opinions, strict=True)
        ),
    )
    ids = {row.prompt_id: row.prompt_token_ids for row in rows}
    pairs, unpaired = paired(io.iteration, io.row_seed, zip(candidates, opinions, strict=True), ids, seeds)
    io.out.write_rows("pairs", Pair, pairs)
    io.out.metrics["labelled prompts without a pair"] = unpaired
    return pairs, {(c.prompt_id, c.sample): o.score for c, o in zip(candidates, opinions, strict=True)}


def paired(
    iteration: int,
    row_seed: Callable[[str], int],
    found: Iterable[tuple[Candidate, Opinion]],
    prompt_ids: Mapping[str, list[int]],
    golds: Mapping[str, Seed],
) -> tuple[list[Pair], dict[str, int]]:
    """The best against the worst answer of each prompt, and how many prompts have no pair, by reason. Pure.

    Args:
        iteration: of the stage.
        row_seed: the stage's seed of a row.
        found: answers, those of a prompt together, and what the judge says of them.
        prompt_ids: token ids of each prompt.
        golds: the seeds by prompt_id.
    """
    pairs: list[Pair] = []
    unpaired: dict[str, int] = {}
    judged = (Judged(candidate, opinion.score) for candidate, opinion in found)
    for prompt_id, group in itertools.groupby(judged, key=lambda j: j.candidate.prompt_id):
        best = best_vs_worst(list(group), random.Random(row_seed(prompt_id)))
        if isinstance(best, Dropped):
            unpaired[best.reason] = unpaired.get(best.reason, 0) + 1
        else:
            source = golds[prompt_id].source if prompt_id in golds else ""
            pairs += [as_row(iteration, k, prompt_ids[prompt_id], source, *one) for k, one in enumerate(best)]
    return pairs, unpaired
