"""Verdicts on completions, and the preference pairs that follow from them."""

import itertools
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from selfimprove import data, judges, recipe
from selfimprove.errors import UserError
from selfimprove.judges import Candidate, Opinion, Preference
from selfimprove.judges.pairing import RULES, Rule, shares_won
from selfimprove.records import Comparison, Flip, Generation, Pair, Seed, Verdict
from selfimprove.stages.acquire import acquired
from selfimprove.stages.io import StageIO
from selfimprove.stages.judge_audit import write_audit
from selfimprove.stages.pairs import candidates as gathered
from selfimprove.stages.pairs import flips as flips_of
from selfimprove.stages.pairs import paired, relabelled, within
from selfimprove.store import read_rows

VERSION = 3
TEMPLATES: tuple[str, ...] = (
    "judge/hundred",
    "judge/additive",
    "judge/demo",
    "judge/pairwise",
    "judge/pairwise_label",
)
UNSCORED_RULES = frozenset({"gold_vs_generated"})
Name = tuple[str, str, int]  # prompt_id, source, sample


class Findings(NamedTuple):
    """What a judge made of the candidates, in their order; and of two at a time, where it compares."""

    opinions: list[Opinion]
    preferences: Mapping[tuple[Name, Name], Preference]


def check(section: recipe.Label) -> Rule:
    """The pairing rule that a recipe names, its judge looked at too.

    Raises:
        UserError: unknown name or parameter, or a rule that lacks the judge it needs.
    """
    rule: Rule = section.pairing.bind("pairing rule", RULES)
    if section.judge is None:
        if section.pairing.name not in UNSCORED_RULES:
            raise UserError(f"pairing '{section.pairing.name}' needs a judge", "add [label.judge]")
        for name, given in [("min_margin", section.min_margin), ("relabel", section.relabel), ("audit", section.audit)]:
            if given:
                raise UserError(f"label.{name} needs a judge", "add [label.judge], or remove the key")
        return rule
    if section.pairing.name in UNSCORED_RULES:
        raise UserError(f"pairing '{section.pairing.name}' looks at no score", "remove [label.judge]")
    judges.check(section.judge)
    if section.audit and section.audit.second:
        judges.bind(section.audit.second)
    return rule


def all_judges(section: recipe.Label) -> list[recipe.Choice]:
    """The judge, the members of an ensemble, and the audit's second judge."""
    return judges.everyone([section.judge, section.audit.second if section.audit else None])


def models(section: recipe.Label) -> list[str]:
    """The local models that labelling asks: policies of the run by name, others by directory or hub id."""
    return _asked(section).models


def servers(section: recipe.Label) -> list[str]:
    """The servers of the recipe that labelling asks."""
    return _asked(section).servers


def _asked(section: recipe.Label) -> judges.Asked:
    certainty = section.acquire is not None and section.acquire.by == "certainty"
    return judges.asked(all_judges(section), ["initial"] if certainty else [])


def run(io: StageIO, section: recipe.Label) -> None:
    """Write verdicts-*.parquet, comparisons-*.parquet where the judge compares, pairs-*.parquet and flips-*.parquet."""
    rule = check(section)
    candidates, prompt_ids = _candidates(io)
    if section.acquire:
        worth = acquired(io, section.acquire)
        candidates = [c for c in candidates if c.prompt_id in worth]
    found = _findings(io, section.judge, candidates)
    write_audit(io, section, candidates, found.opinions, found.preferences)
    pairs = _pairs(io, section, rule, candidates, found, prompt_ids)
    flips = flips_of(section, pairs)
    if section.relabel:
        again, turned = _relabelled(io, section)
        pairs, flips = [*again, *pairs], [*turned, *flips]
    io.out.write_rows("pairs", Pair, pairs)
    if section.pairing.name == "dynamic" or section.relabel:
        io.out.write_rows("flips", Flip, flips)
        io.out.metrics |= {"flipped": len(flips), "flipped share": len(flips) / max(1, len(pairs))}
    io.note_judging()
    scores = [o.score for o in found.opinions if o.score is not None]
    io.out.metrics |= {
        "pairs": len(pairs),
        "verdicts": len(found.opinions),
        "verdicts unknown": len(found.opinions) - len(scores),
        "mean score": sum(scores) / len(scores) if scores else None,
    }
    if not pairs:
        raise UserError(
            f"iteration {io.iteration}: no prompt gave a pair ({_reasons(io)})",
            "more samples (generate.n), another judge or another pairing rule",
        )


def _pairs(
    io: StageIO,
    section: recipe.Label,
    rule: Rule,
    candidates: Sequence[Candidate],
    found: Findings,
    prompt_ids: Mapping[str, list[int]],
) -> list[Pair]:
    """What the rule proposes and nothing speaks against; prompts without a pair are quarantined with the reason."""
    golds = {s.prompt_id: s for s in _seeds(io)}
    judged = zip(candidates, found.opinions, strict=True)
    made = paired(section, rule, io.iteration, io.row_seed, judged, found.preferences, prompt_ids, golds)
    pairs = made.pairs
    for prompt_id, reason in made.dropped:
        io.out.quarantine(prompt_id, reason)
    if made.refused:
        io.out.metrics["pairs refused"] = dict(made.refused)
    if section.quota is not None:
        places, over = within([p.prompt_id for p in pairs], section.quota, random.Random(io.row_seed("quota")))
        pairs = [pairs[i] for i in places]
        for prompt_id in over:
            io.out.quarantine(prompt_id, "over quota")
        io.out.metrics["pairs short of quota"] = section.quota - len(pairs)
    io.out.contract("prompt", len(prompt_ids), len({pair.prompt_id for pair in pairs}))
    return pairs


def _relabelled(io: StageIO, section: recipe.Label) -> tuple[list[Pair], list[Flip]]:
    """The pairs of the round before (its own and those it relabelled), scored anew by this round's judge."""
    if "relabelled" not in io.inputs:
        return [], []
    old = read_rows(io.inputs["relabelled"], "pairs", Pair)
    pairs: list[Pair] = []
    flips: list[Flip] = []
    scores = _pair_scores(io, section.judge, old) if section.judge else []
    for pair, (chosen, rejected) in zip(old, scores, strict=True):
        again, turned = relabelled(pair, chosen, rejected, io.iteration)
        pairs.append(again)
        flips += [turned] if turned else []
    io.out.metrics |= {"pairs relabelled": len(old), "relabelled flips": len(flips)}
    return pairs, flips


def _pair_scores(io: StageIO, choice: recipe.Choice, pairs: Sequence[Pair]) -> list[tuple[float | None, float | None]]:
    """Scores of chosen and rejected; of a judge that compares, P(better), unknown where its orders disagree."""
    golds = {s.prompt_id: s.completion for s in _seeds(io)}

    def side(pair: Pair, source: str, text: str, ids: list[int], number: int) -> Candidate:
        answer = golds.get(pair.prompt_id)
        return Candidate(pair.prompt_id, pair.prompt[0]["content"], source, number, text, ids, "stop", answer)

    both = [
        (
            side(p, f"{p.pair_id}/chosen", p.chosen[0]["content"], p.chosen_token_ids, 0),
            side(p, f"{p.pair_id}/rejected", p.rejected[0]["content"], p.rejected_token_ids, 1),
        )
        for p in pairs
    ]
    if judges.compares(choice):
        found = judges.bind_comparer(choice)(both, io.judging)
        known = [p.mean if p.consistent else None for p in found]
        return [(None, None) if p is None else (p, 1 - p) for p in known]
    opinions = judges.bind(choice)([one for two in both for one in two], io.judging)
    return [(a.score, b.score) for a, b in zip(opinions[::2], opinions[1::2], strict=True)]


def _findings(io: StageIO, choice: recipe.Choice | None, candidates: list[Candidate]) -> Findings:
    """What the judge finds, written as verdicts and comparisons."""
    preferences: dict[tuple[Name, Name], Preference] = {}
    if choice is not None and judges.compares(choice):
        preferences = _preferences(io, choice, candidates)
        won = shares_won(preferences)
        opinions = [won.get(candidate.key, Opinion(None, "no readable comparison")) for candidate in candidates]
    else:
        opinions = _opinions(io, choice, candidates)
    identity = judges.identity(choice)
    io.out.write_rows(
        "verdicts",
        Verdict,
        (
            Verdict(c.prompt_id, c.source, c.sample, identity, o.score, o.reason, o.reply)
            for c, o in zip(candidates, opinions, strict=True)
        ),
    )
    return Findings(opinions, preferences)


def _preferences(
    io: StageIO, choice: recipe.Choice, candidates: Sequence[Candidate]
) -> dict[tuple[Name, Name], Preference]:
    """Every two answers of a prompt that differ, compared; written as comparisons."""
    pairs = [
        (a, b)
        for _, group in itertools.groupby(candidates, key=lambda c: c.prompt_id)
        for a, b in itertools.combinations(list(group), 2)
        if a.text != b.text
    ]
    found = judges.bind_comparer(choice)(pairs, io.judging)
    identity = judges.identity(choice)
    io.out.write_rows(
        "comparisons",
        Comparison,
        (
            Comparison(
                a.prompt_id,
                a.source,
                a.sample,
                b.source,
                b.sample,
                identity,
                p.forward,
                p.swapped,
                p.reason,
                *p.replies,
            )
            for (a, b), p in zip(pairs, found, strict=True)
        ),
    )
    return {(a.key, b.key): preference for (a, b), preference in zip(pairs, found, strict=True)}


def _opinions(io: StageIO, choice: recipe.Choice | None, candidates: list[Candidate]) -> list[Opinion]:
    """A score of each candidate; of a gold that a judge which stays has scored before, that score."""
    if choice is None:
        return [Opinion(None, "no judge asked")] * len(candidates)
    identity = judges.identity(choice)
    stays = judges.fixed(choice)  # a policy that judges itself is another each round
    earlier = {
        v.prompt_id: Opinion(v.score, v.reason, v.reply)
        for v in (read_rows(io.inputs["earlier"], "verdicts", Verdict) if stays and "earlier" in io.inputs else [])
        if v.source == "gold" and v.judge == identity and v.score is not None
    }
    known = {(c.prompt_id, "gold", 0): earlier[c.prompt_id] for c in candidates if c.prompt_id in earlier}
    new = [c for c in candidates if c.key not in known]
    known |= {c.key: opinion for c, opinion in zip(new, judges.bind(choice)(new, io.judging), strict=True)}
    io.out.metrics["golds scored before"] = len(candidates) - len(new)
    return [known[c.key] for c in candidates]


def _seeds(io: StageIO) -> list[Seed]:
    return data.read_seeds(io.inputs["seeds"]) if "seeds" in io.inputs else []


def _candidates(io: StageIO) -> tuple[list[Candidate], dict[str, list[int]]]:
    """All completions of a prompt side by side, the gold first where there is one; and each prompt's token ids."""
    rows = read_rows(io.inputs["generations"], "generations", Generation)
    if "refinements" in io.inputs:
        rows += read_rows(io.inputs["refinements"], "refinements", Generation)
    return gathered(rows, {s.prompt_id: s for s in _seeds(io)}, io.chat.completion_ids)


def _reasons(io: StageIO) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in io.out.quarantined.items())
