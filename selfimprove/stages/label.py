"""Verdicts on completions, and the preference pairs that follow from them."""

import contextlib
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from selfimprove import columns, data, judges, recipe
from selfimprove.errors import UserError
from selfimprove.judges import Candidate
from selfimprove.judges.pairing import RULES, Rule
from selfimprove.records import Flip, Pair, Seed
from selfimprove.stages import given
from selfimprove.stages.acquire import acquired
from selfimprove.stages.answers import CANDIDATES, Answers, of_round
from selfimprove.stages.io import StageIO
from selfimprove.stages.judge_audit import RoundAudit
from selfimprove.stages.pairs import flips as flips_of
from selfimprove.stages.pairs import paired, relabelled, within
from selfimprove.stages.verdicts import Labels
from selfimprove.store import iter_rows

VERSION = 3
TEMPLATES: tuple[str, ...] = (
    "judge/hundred",
    "judge/additive",
    "judge/demo",
    "judge/pairwise",
    "judge/pairwise_label",
)
UNSCORED_RULES = frozenset({"gold_vs_generated", "given"})


def check(section: recipe.Label) -> Rule:
    """The pairing rule that a recipe names, its judge looked at too.

    Raises:
        UserError: unknown name or parameter, or a rule that lacks the judge it needs.
    """
    rule: Rule = section.pairing.bind("pairing rule", RULES)
    if section.judge is None:
        if section.pairing.name not in UNSCORED_RULES:
            raise UserError(f"pairing '{section.pairing.name}' needs a judge", "add [label.judge]")
        for name, value in [("min_margin", section.min_margin), ("relabel", section.relabel), ("audit", section.audit)]:
            if value:
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
    worth = acquired(io, section.acquire) if section.acquire else None
    answers = given.of_round(io, section) if "pairs" in io.inputs else of_round(io, section.judge, worth)
    writes_flips = section.pairing.name == "dynamic" or bool(section.relabel)
    with contextlib.ExitStack() as stack:
        pairs = stack.enter_context(io.out.writer("pairs", Pair))
        flips = stack.enter_context(io.out.writer("flips", Flip)) if writes_flips else None
        if "relabelled" in io.inputs:
            for again, turned in _relabelled(io, section):
                pairs.extend(again)
                if flips:
                    flips.extend(turned)
            io.out.metrics |= {"pairs relabelled": pairs.rows, "relabelled flips": flips.rows if flips else 0}
        labels = stack.enter_context(Labels(io, section, answers.candidates))
        for pair in _pairs(io, section, rule, answers, labels):
            pairs.add(pair)
            if flips:
                flips.extend(flips_of(section, [pair]))
    if flips:
        io.out.metrics |= {"flipped": flips.rows, "flipped share": flips.rows / max(1, pairs.rows)}
    io.note_judging()
    io.out.metrics |= {
        "pairs": pairs.rows,
        "verdicts": labels.number,
        "verdicts unknown": labels.number - labels.known,
        "mean score": labels.total / labels.known if labels.known else None,
    }
    if not pairs.rows:
        raise UserError(
            f"iteration {io.iteration}: no prompt gave a pair ({_reasons(io, labels)})",
            f"{_ways_out(io, section)}more samples (generate.n), another judge or another pairing rule",
        )


def _ways_out(io: StageIO, section: recipe.Label) -> str:
    """The settings that spoke against pairs, if any."""
    against = {
        "score gap too small": f"a lower label.min_margin than {section.min_margin:g}",
        "chosen answer too long": f"a higher label.max_length_ratio than {section.max_length_ratio or 0:g}",
    }
    return "".join(f"{way}, " for reason, way in against.items() if io.out.quarantined.get(reason))


def _pairs(
    io: StageIO, section: recipe.Label, rule: Rule, answers: Answers | given.Answers, labels: Labels
) -> Iterator[Pair]:
    """What the rule proposes and nothing speaks against; prompts without a pair are quarantined with the reason."""
    if section.quota is None:
        last = ""
        with_a_pair = 0
        for pair in _proposed(io, section, rule, answers, labels):
            with_a_pair += pair.prompt_id != last
            last = pair.prompt_id
            yield pair
        io.out.contract("prompt", labels.prompts, with_a_pair)
        return
    io.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=io.scratch) as folder:  # how many there are decides which of them stay
        prompts = []
        with columns.Writer(lambda shard: Path(folder) / "pairs.parquet", Pair, sys.maxsize) as held:
            for pair in _proposed(io, section, rule, answers, labels):
                prompts.append(pair.prompt_id)
                held.add(pair)
        places, over = within(prompts, section.quota, random.Random(io.row_seed("quota")))
        for prompt_id in over:
            io.out.quarantine(prompt_id, "over quota")
        io.out.metrics["pairs short of quota"] = section.quota - len(places)
        io.out.contract("prompt", labels.prompts, len({prompts[place] for place in places}))
        wanted = iter(places)
        place = next(wanted, None)
        for number, pair in enumerate(columns.read(Path(folder) / "pairs.parquet", Pair, columns.arrow_schema(Pair))):
            if number == place:
                yield pair
                place = next(wanted, None)


def _proposed(
    io: StageIO, section: recipe.Label, rule: Rule, answers: Answers | given.Answers, labels: Labels
) -> Iterator[Pair]:
    """The pairs of all prompts before any quota, a window of prompts judged at a time."""
    audit = RoundAudit(io, section, answers.prompts, answers.candidates) if section.judge else None
    refused: Counter[str] = Counter()
    for window in answers.windows():
        found = labels.judge(window)
        if audit:
            audit.see(window.candidates, found.opinions, found.preferences)
        judged = zip(window.candidates, found.opinions, strict=True)
        made = paired(
            section, rule, io.iteration, io.row_seed, judged, found.preferences, window.prompt_ids, answers.golds
        )
        for prompt_id, reason in made.dropped:
            io.out.quarantine(prompt_id, reason)
        refused += made.refused
        yield from made.pairs
    if audit:
        audit.write()
    if refused:
        io.out.metrics["pairs refused"] = dict(refused)


def _relabelled(io: StageIO, section: recipe.Label) -> Iterator[tuple[list[Pair], list[Flip]]]:
    """The pairs of the round before (its own and those it relabelled), scored anew by this round's judge."""
    assert section.judge is not None  # `check` has seen to it
    for old in columns.batched(iter_rows(io.inputs["relabelled"], "pairs", Pair), CANDIDATES // 2):
        scores = _pair_scores(io, section.judge, old)
        made = [relabelled(pair, *both, io.iteration) for pair, both in zip(old, scores, strict=True)]
        yield [pair for pair, _ in made], [flip for _, flip in made if flip]


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


def _seeds(io: StageIO) -> list[Seed]:
    return data.read_seeds(io.inputs["seeds"]) if "seeds" in io.inputs else []


def _reasons(io: StageIO, labels: Labels) -> str:
    """Why prompts gave no pair, and what was most often the matter with an answer without a score."""
    told = [f"{reason}: {count}" for reason, count in io.out.quarantined.items()]
    for reason, count in labels.unknown.most_common(1):
        told.append(f"judge: {reason} ({count} answers)")
    return ", ".join(told)
