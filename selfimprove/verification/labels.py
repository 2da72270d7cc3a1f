"""Pairs made again from answers and verdicts, some prompts at a time, so that a million answers need no memory."""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from selfimprove import data, judges, recipe
from selfimprove.judges import Candidate, Opinion, Preference
from selfimprove.judges.pairing import Key, shares_won
from selfimprove.records import Comparison, Flip, Generation, Pair, Seed, Verdict
from selfimprove.stages import discriminate, given, label
from selfimprove.stages.answers import Window
from selfimprove.stages.pairs import Paired, candidates, flip, paired, relabelled, within
from selfimprove.verification.tables import At, Lazy, dicts, read

if TYPE_CHECKING:
    import pyarrow as pa

ANSWERS = 100_000  # held at once
UNASKED = ("not acquired", "acquired in an earlier round")


class Part(NamedTuple):
    """Some prompts with their answers, what was said of them, and the pairs that are stored."""

    candidates: list[Candidate]
    prompt_ids: Mapping[str, list[int]]
    verdicts: dict[Key, Verdict]
    preferences: dict[tuple[Key, Key], Preference]
    stored: dict[str, Pair]


def check(at: At) -> Iterator[str]:
    """What of a labelling does not follow from its answers and verdicts, a sentence each."""
    section = at.step.section
    assert isinstance(section, recipe.Label)
    rule = label.check(section)
    golds: Mapping[str, Seed] = at.seeds()
    answered: Iterable[Window] = _answered(at, golds)
    if "pairs" in at.step.inputs:
        answers_given = _given(at, section)
        golds, answered = answers_given.golds, answers_given.windows(ANSWERS // 2)
    quarantined = {row["row_id"]: row["reason"] for row in dicts(at.directory, "quarantine", ["row_id", "reason"])}
    made: list[tuple[str, str]] = []  # pair_id and prompt_id of what the rule gives, in order
    dropped: list[tuple[str, str]] = []
    prompts = answers = 0
    for part in _parts(at, answered):
        prompts += len(part.prompt_ids)
        left_out = {p for p in part.prompt_ids if section.acquire and quarantined.get(p) in UNASKED}
        asked = [one for one in part.candidates if one.prompt_id not in left_out]
        answers += len(asked)
        yield from _unlike(at, section, asked, part)
        found = [(one, _opinion(part.verdicts.get(one.key))) for one in asked]
        of = paired(section, rule, at.step.iteration, at.seed, found, part.preferences, part.prompt_ids, golds)
        yield from _changed(at, of, part)
        made += [(pair.pair_id, pair.prompt_id) for pair in of.pairs]
        dropped += [*of.dropped, *((p, quarantined[p]) for p in left_out)]
    said = sum(1 for _ in dicts(at.directory, "verdicts", ["sample"]))
    if said != answers:
        yield f"{at.directory}/verdicts-*.parquet has {said} rows, and {answers} answers were to be judged"
    if section.quota is not None:
        places, over = within([prompt for _, prompt in made], section.quota, random.Random(at.seed("quota")))
        made, dropped = [made[i] for i in places], [*dropped, *((prompt, "over quota") for prompt in over)]
    yield from _listed(at, [pair_id for pair_id, _ in made])
    yield from _set_aside(at, dict(dropped), quarantined, prompts)
    yield from _flips(at, section)


# --- reading -----------------------------------------------------------------------------------------------------


def _parts(at: At, answered: Iterable[Window]) -> Iterator[Part]:
    """Some prompts with their answers, and what the stage has made of them."""
    for answers, prompt_ids in answered:
        keep = _of(list(prompt_ids))
        yield Part(
            answers,
            prompt_ids,
            {(v.prompt_id, v.source, v.sample): v for v in read(at.directory, "verdicts", Verdict, keep)},
            dict(_preference(row) for row in read(at.directory, "comparisons", Comparison, keep)),
            {p.pair_id: p for p in read(at.directory, "pairs", Pair, keep) if p.iteration == at.step.iteration},
        )


def _answered(at: At, golds: Mapping[str, Seed]) -> Iterator[Window]:
    """The prompts in the order in which the stage takes them."""
    chat = Lazy(at)
    tables = [(at.input(name), name) for name in ("generations", "refinements") if name in at.step.inputs]
    numbers: dict[str, int] = {}
    for row in itertools.chain.from_iterable(dicts(place, table, ["prompt_id"]) for place, table in tables):
        numbers[row["prompt_id"]] = numbers.get(row["prompt_id"], 0) + 1
    for names in _split(numbers):
        keep = _of(names)
        rows = itertools.chain.from_iterable(read(place, table, Generation, keep) for place, table in tables)
        yield Window(*candidates(rows, golds, chat.ids))


def _given(at: At, section: recipe.Label) -> given.Answers:
    pairs = given.share(data.read_pairs(at.input("pairs")), section.quota, at.recipe.seed, at.step.iteration)
    chat = Lazy(at).chat
    return given.Answers(pairs, chat.prompt_ids, chat.completion_ids)


def _of(names: Sequence[str]) -> "Callable[[pa.RecordBatch], pa.RecordBatch]":
    """Keeps the rows of these prompts."""
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted = pa.array(names, pa.string())
    return lambda batch: batch.filter(pc.is_in(batch.column("prompt_id"), value_set=wanted))


def _split(numbers: Mapping[str, int]) -> Iterator[list[str]]:
    """Prompts in order, as many at once as have ANSWERS answers."""
    names: list[str] = []
    held = 0
    for name, number in numbers.items():
        names.append(name)
        held += number
        if held >= ANSWERS:
            yield names
            names, held = [], 0
    if names:
        yield names


def _preference(row: Comparison) -> tuple[tuple[Key, Key], Preference]:
    first = row.prompt_id, row.first_source, row.first_sample
    second = row.prompt_id, row.second_source, row.second_sample
    return (first, second), Preference(row.forward, row.swapped, row.reason)


def _opinion(verdict: Verdict | None) -> Opinion:
    return Opinion(None, "no verdict") if verdict is None else Opinion(verdict.score, verdict.reason)


# --- comparing ---------------------------------------------------------------------------------------------------


def _unlike(at: At, section: recipe.Label, asked: Sequence[Candidate], part: Part) -> Iterator[str]:
    """Verdicts that are missing, of no answer, of another judge, or not what the judge says."""
    from selfimprove.verification.derive import again

    file = f"{at.directory}/verdicts-*.parquet"
    identity, known = judges.identity(section.judge), {one.key for one in asked}
    yield from (f"{file}: {_name(key)} is of no answer" for key in part.verdicts if key not in known)
    yield from (f"{file}: the answer {one.name} has no verdict" for one in asked if one.key not in part.verdicts)
    yield from (f"{file}: {_name(k)} is by another judge" for k, v in part.verdicts.items() if v.judge != identity)
    if section.judge is None:
        scores: dict[Key, float | None] = dict.fromkeys(known)
    elif judges.compares(section.judge):
        won = shares_won(part.preferences)
        scores = {key: won[key].score if key in won else None for key in known}
        for pair in part.preferences:
            if not set(pair) <= known:
                names = " against ".join(map(_name, pair))
                yield f"{at.directory}/comparisons-*.parquet: {names} is of no answers"
    elif again(section.judge):
        said = judges.bind(section.judge)(asked, None)  # type: ignore[arg-type]  # a program asks no model
        scores = {one.key: opinion.score for one, opinion in zip(asked, said, strict=True)}
    else:
        return
    for key, verdict in part.verdicts.items():
        if key in scores and scores[key] != verdict.score:
            yield f"{file}: {_name(key)} has the score {verdict.score}, and the judge gives {scores[key]}"


def _changed(at: At, made: Paired, part: Part) -> Iterator[str]:
    """Stored pairs that are not what the rule gives; which pairs there are is looked at elsewhere."""
    for pair in made.pairs:
        stored = part.stored.get(pair.pair_id)
        if stored is not None and stored != pair:
            fields = [name for name in Pair.__struct_fields__ if getattr(pair, name) != getattr(stored, name)]
            yield (
                f"{at.directory}/pairs-*.parquet: {pair.pair_id} is not what verdicts and rule give"
                f" ({', '.join(fields)})"
            )


def _listed(at: At, made: Sequence[str]) -> Iterator[str]:
    """The round's own pairs, each and in order."""
    rows = dicts(at.directory, "pairs", ["pair_id", "iteration"])
    stored = [row["pair_id"] for row in rows if row["iteration"] == at.step.iteration]
    if stored == list(made):
        return
    file = f"{at.directory}/pairs-*.parquet"
    missing, more = set(made) - set(stored), set(stored) - set(made)
    yield from (f"{file}: {name} is missing, verdicts and rule give it" for name in made if name in missing)
    yield from (f"{file}: {name} follows from no verdicts" for name in dict.fromkeys(stored) if name in more)
    if not missing and not more:
        yield f"{file}: the pairs are in another order, or stand twice"


def _set_aside(at: At, made: Mapping[str, str], said: Mapping[str, str], prompts: int) -> Iterator[str]:
    file = f"{at.directory}/quarantine-*.parquet"
    for name in dict.fromkeys([*made, *said]):
        if made.get(name) != said.get(name):
            told, follows = said.get(name, "not there"), made.get(name, "that it has a pair")
            yield f"{file}: {name} is '{told}', and '{follows}' follows"
    if at.manifest.rows.rows_in != prompts:
        yield f"{at.directory / 'manifest.json'} says {at.manifest.rows.rows_in} prompts in, and there are {prompts}"


def _flips(at: At, section: recipe.Label) -> Iterator[str]:
    """flips-*.parquet, and the pairs of earlier rounds that were scored anew."""
    if section.pairing.name != "dynamic" and not section.relabel:
        return
    old = read(at.input("relabelled"), "pairs", Pair, _all) if "relabelled" in at.step.inputs else iter(())
    earlier = {pair.pair_id: pair for pair in old}
    wanted: dict[str, Flip] = {}
    file = f"{at.directory}/pairs-*.parquet"
    seen = set()
    for pair in read(at.directory, "pairs", Pair, _all):
        if pair.iteration == at.step.iteration:
            if section.pairing.name == "dynamic" and pair.chosen_source == "current":
                wanted[pair.pair_id] = flip(pair)
            continue
        before = earlier.get(pair.pair_id)
        if before is None:
            yield f"{file}: {pair.pair_id} is of an earlier round that has no such pair"
            continue
        seen.add(pair.pair_id)
        as_before = pair.chosen_token_ids == before.chosen_token_ids and pair.chosen_source == before.chosen_source
        scores = pair.chosen_score, pair.rejected_score
        new, turned = relabelled(before, *(scores if as_before else scores[::-1]), at.step.iteration)
        if new != pair:
            yield f"{file}: {pair.pair_id} is not what its scores make of it"
        if turned:
            wanted[pair.pair_id] = turned
    yield from (f"{file}: {name} of an earlier round is missing" for name in earlier if name not in seen)
    stored = {row.pair_id: row for row in read(at.directory, "flips", Flip, _all)}
    for name in dict.fromkeys([*wanted, *stored]):
        if wanted.get(name) != stored.get(name):
            yield f"{at.directory}/flips-*.parquet: {name} is not what the pairs show"


def _all(batch: Any) -> Any:
    return batch


def _name(key: Key) -> str:
    return "/".join(map(str, key))


# --- the discriminator's gold labels -----------------------------------------------------------------------------


def check_discriminate(at: At) -> Iterator[str]:
    """Pairs of gold labels that do not follow from them, a sentence each."""
    import pyarrow as pa
    import pyarrow.compute as pc

    section = at.step.section
    assert isinstance(section, recipe.Discriminate)
    from selfimprove.verification.derive import again

    labels = {(v.prompt_id, v.source, v.sample): v for v in read(at.directory, "labels", Verdict, _all)}
    wanted = pa.array(sorted({key[0] for key in labels}), pa.string())
    rows = [
        row
        for row in read(
            at.input("generations"),
            "generations",
            Generation,
            lambda batch: batch.filter(pc.is_in(batch.column("prompt_id"), value_set=wanted)),
        )
        if row.source == "current"
    ]
    golds = at.seeds()
    asked = [judges.candidate(r, golds[r.prompt_id].completion if r.prompt_id in golds else None) for r in rows]
    file = f"{at.directory}/labels-*.parquet"
    yield from (f"{file}: the answer {one.name} has no label" for one in asked if one.key not in labels)
    if again(section.judge):
        said = judges.bind(section.judge)(asked, None)  # type: ignore[arg-type]  # a program asks no model
        for one, opinion in zip(asked, said, strict=True):
            if one.key in labels and labels[one.key].score != opinion.score:
                yield f"{file}: {one.name} has the score {labels[one.key].score}, and the judge gives {opinion.score}"
    found = [(one, _opinion(labels.get(one.key))) for one in asked]
    ids = {row.prompt_id: row.prompt_token_ids for row in rows}
    made, _ = discriminate.paired(at.step.iteration, at.seed, found, ids, golds)
    stored = {pair.pair_id: pair for pair in read(at.directory, "pairs", Pair, _all)}
    yield from _changed(at, Paired(made, [], None), Part(asked, ids, {}, {}, stored))  # type: ignore[arg-type]
    yield from _listed(at, [pair.pair_id for pair in made])
