"""Verdicts on completions, and the preference pairs that follow from them."""

import itertools
import random
from collections.abc import Mapping

from selfimprove import data, judges, recipe
from selfimprove.errors import UserError
from selfimprove.judges import JUDGES, Candidate, Judge, Opinion, acquisition
from selfimprove.judges.pairing import RULES, Dropped, Judged, Rule, as_row
from selfimprove.records import Flip, Generation, Pair, Seed, Verdict
from selfimprove.stages.io import StageIO
from selfimprove.store import read_rows

VERSION = 2
TEMPLATES: tuple[str, ...] = ("rate", "rate_additive")
UNSCORED_RULES = frozenset({"gold_vs_generated"})


def check(section: recipe.Label) -> tuple[Judge | None, Rule]:
    """The judge and the pairing rule that a recipe names.

    Raises:
        UserError: unknown name or parameter, or a rule that lacks the judge it needs.
    """
    rule: Rule = section.pairing.bind("pairing rule", RULES)
    if section.judge is None:
        if section.pairing.name not in UNSCORED_RULES:
            raise UserError(f"pairing '{section.pairing.name}' needs a judge", "add [label.judge]")
        return None, rule
    if section.pairing.name in UNSCORED_RULES:
        raise UserError(f"pairing '{section.pairing.name}' looks at no score", "remove [label.judge]")
    return judges.bind(section.judge), rule


def asks_models(section: recipe.Label) -> bool:
    """Whether labelling needs models of the run, and so an engine."""
    judging = section.judge is not None and section.judge.name in JUDGES and JUDGES[section.judge.name].asks_models
    return judging or (section.acquire is not None and section.acquire.by == "certainty")


def run(io: StageIO, section: recipe.Label) -> None:
    """Write verdicts-*.parquet, pairs-*.parquet, and flips-*.parquet where scores turned labels over."""
    judge, rule = check(section)
    candidates, prompt_ids = _candidates(io)
    if section.acquire:
        acquired = _acquired(io, section.acquire)
        candidates = [c for c in candidates if c.prompt_id in acquired]
    opinions = _opinions(io, judge, section.judge, candidates)

    pairs: list[Pair] = []
    judged = (Judged(c, o.score) for c, o in zip(candidates, opinions, strict=True))
    sources = {s.prompt_id: s.source for s in _seeds(io)}
    paired = 0
    for prompt_id, group in itertools.groupby(judged, key=lambda j: j.candidate.prompt_id):
        found = rule(list(group), random.Random(io.row_seed(prompt_id)))
        if isinstance(found, Dropped):
            io.out.quarantine(prompt_id, found.reason)
        else:
            paired += 1
            source = sources.get(prompt_id, "")
            pairs += [as_row(io.iteration, k, prompt_ids[prompt_id], source, *one) for k, one in enumerate(found)]
    if section.quota is not None:
        pairs, over = _within(pairs, section.quota, random.Random(io.row_seed("quota")))
        for prompt_id in over:
            io.out.quarantine(prompt_id, "over quota")
        paired -= len(over)
        io.out.metrics["pairs short of quota"] = section.quota - len(pairs)
    io.out.write_rows("pairs", Pair, pairs)
    io.out.contract("prompt", len(prompt_ids), paired)
    if section.pairing.name == "dynamic":
        flips = [
            Flip(p.pair_id, p.prompt_id, p.iteration, p.rejected_source, p.rejected_score, p.chosen_score)
            for p in pairs
            if p.chosen_source == "current"
        ]
        io.out.write_rows("flips", Flip, flips)
        io.out.metrics |= {"flipped": len(flips), "flipped share": len(flips) / max(1, len(pairs))}

    scored = [o.score for o in opinions if o.score is not None]
    io.out.metrics |= {
        "pairs": len(pairs),
        "verdicts": len(opinions),
        "verdicts unknown": len(opinions) - len(scored),
        "mean score": sum(scored) / len(scored) if scored else None,
    }
    if not pairs:
        raise UserError(
            f"iteration {io.iteration}: no prompt gave a pair ({_reasons(io)})",
            "more samples (generate.n), another judge or another pairing rule",
        )


def _within(pairs: list[Pair], quota: int, rng: random.Random) -> tuple[list[Pair], list[str]]:
    """As many pairs as the quota, drawn at random, and the prompts that have lost all of theirs."""
    if len(pairs) <= quota:
        return pairs, []
    kept = [pairs[i] for i in sorted(rng.sample(range(len(pairs)), quota))]
    left = {pair.prompt_id for pair in kept}
    return kept, list(dict.fromkeys(pair.prompt_id for pair in pairs if pair.prompt_id not in left))


def _acquired(io: StageIO, section: recipe.Acquire) -> set[str]:
    """The prompts that are worth a label (active preference learning, arXiv 2402.08114); the others are set aside.

    What an earlier round has labelled is not taken again: the paper's pool shrinks. Where the prompts are new in each
    round there is nothing to leave out.
    """
    known = {
        verdict.prompt_id
        for name, directory in io.inputs.items()
        if name.startswith("acquired-")
        for verdict in read_rows(directory, "verdicts", Verdict)
    }
    answers: dict[str, list[Generation]] = {}
    for row in read_rows(io.inputs["generations"], "generations", Generation):
        own = answers.setdefault(row.prompt_id, [])
        if row.source == "current":
            own.append(row)
    pool = {prompt_id: rows for prompt_id, rows in answers.items() if prompt_id not in known}
    if not pool:
        raise UserError(
            f"iteration {io.iteration}: every prompt has been labelled in an earlier round",
            "fewer rounds, a smaller label.acquire.prompts, or more seeds",
        )
    measured = _measured(io, section, pool)
    taken = acquisition.first(measured, section.prompts, random.Random(io.row_seed("acquire")))
    for prompt_id in answers:
        if prompt_id not in taken:
            io.out.quarantine(prompt_id, "acquired in an earlier round" if prompt_id in known else "not acquired")
    io.out.metrics |= {"pool": len(pool), "acquired": len(taken)}
    if section.by != "random":
        name, sign = ("entropy", -1) if section.by == "entropy" else ("uncertainty", 1)
        for which, of in (("pool", measured.keys()), ("acquired", taken)):
            values = [value for prompt_id in of if (value := measured[prompt_id]) is not None]
            io.out.metrics[f"{name} of the {which}"] = sign * sum(values) / len(values) if values else None
    return taken


def _measured(io: StageIO, section: recipe.Acquire, pool: Mapping[str, list[Generation]]) -> dict[str, float | None]:
    """Smallest first: the uncertainty of the two first answers' order, or the negated entropy."""
    if section.by == "random":
        return dict.fromkeys(pool, 0.0)
    if section.by == "entropy":
        return {
            name: -acquisition.entropy([sum(row.logprobs) for row in rows]) if rows else None
            for name, rows in pool.items()
        }
    rows = [row for own in pool.values() for row in own[:2]]
    # before any training the gaps are all zero, and what an engine's rounding makes of them is no order
    untrained = bool(rows) and rows[0].policy == io.identities["initial"]
    initial = (
        [sum(row.logprobs) for row in rows]
        if untrained
        else io.logps("initial", [(row.prompt, row.token_ids) for row in rows])
    )
    rewards: dict[str, list[float]] = {}
    for row, logp in zip(rows, initial, strict=True):
        if logp is not None:
            rewards.setdefault(row.prompt_id, []).append(acquisition.reward(sum(row.logprobs), logp, section.beta))
    return {name: acquisition.uncertainty(*pair) if len(pair := rewards.get(name, [])) == 2 else None for name in pool}


def _opinions(
    io: StageIO, judge: Judge | None, choice: recipe.Choice | None, candidates: list[Candidate]
) -> list[Opinion]:
    """The judge's opinions, written as verdicts; of a gold that a judge which stays has scored before, that score."""
    identity = judges.identity(choice)
    stays = choice is not None and JUDGES[choice.name].fixed  # a policy that judges itself is another each round
    earlier = {
        v.prompt_id: Opinion(v.score, v.reason)
        for v in (read_rows(io.inputs["earlier"], "verdicts", Verdict) if stays and "earlier" in io.inputs else [])
        if v.source == "gold" and v.judge == identity and v.score is not None
    }
    known = (
        {(c.prompt_id, "gold", 0): earlier[c.prompt_id] for c in candidates if c.prompt_id in earlier} if judge else {}
    )
    new = [c for c in candidates if (c.prompt_id, c.source, c.sample) not in known]
    asked = judge(new, io) if judge else [Opinion(None, "no judge asked")] * len(new)
    known |= {(c.prompt_id, c.source, c.sample): opinion for c, opinion in zip(new, asked, strict=True)}
    opinions = [known[c.prompt_id, c.source, c.sample] for c in candidates]
    io.out.write_rows(
        "verdicts",
        Verdict,
        (
            Verdict(c.prompt_id, c.source, c.sample, identity, o.score, o.reason)
            for c, o in zip(candidates, opinions, strict=True)
        ),
    )
    io.out.metrics["golds scored before"] = len(candidates) - len(new)
    return opinions


def _seeds(io: StageIO) -> list[Seed]:
    return data.read_seeds(io.inputs["seeds"]) if "seeds" in io.inputs else []


def _candidates(io: StageIO) -> tuple[list[Candidate], dict[str, list[int]]]:
    """All completions of a prompt side by side, the gold first where there is one; and each prompt's token ids."""
    rows = read_rows(io.inputs["generations"], "generations", Generation)
    if "refinements" in io.inputs:
        rows += read_rows(io.inputs["refinements"], "refinements", Generation)
    golds = {s.prompt_id: s for s in _seeds(io)}
    by_prompt: dict[str, list[Generation]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt_id, []).append(row)

    candidates: list[Candidate] = []
    for prompt_id, group in by_prompt.items():
        gold = golds.get(prompt_id)
        if gold:
            ids = io.chat.completion_ids(gold.prompt, gold.completion)
            candidates.append(Candidate(prompt_id, gold.prompt, "gold", 0, gold.completion, ids, "stop"))
        answer = gold.completion if gold else None
        candidates += [judges.candidate(row, answer) for row in group]
    return candidates, {prompt_id: group[0].prompt_token_ids for prompt_id, group in by_prompt.items()}


def _reasons(io: StageIO) -> str:
    counts: dict[str, int] = {}
    for row in io.out.quarantined:
        counts[row.reason] = counts.get(row.reason, 0) + 1
    return ", ".join(f"{reason}: {count}" for reason, count in counts.items())
