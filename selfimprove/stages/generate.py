"""n completions of every prompt by the current policy, and by the initial one where a method asks for it.

With `splice` (SAPO, arXiv 2405.20830) the policy writes only a segment of its answer: what stands before and after it
is the gold's.
"""

import random
from collections.abc import Iterable, Iterator, Sequence

from msgspec.structs import replace

from selfimprove import data, recipe
from selfimprove.records import Generation, Prompt, Seed
from selfimprove.stages.io import Ask, StageIO
from selfimprove.store import iter_rows, row_number

VERSION = 1
TEMPLATES: tuple[str, ...] = ()
TAIL = 3  # tokens that SAPO's program keeps behind the segment


def run(io: StageIO, section: recipe.Generate) -> None:
    """Write generations-*.parquet."""
    seeds = data.read_seeds(io.inputs["seeds"]) if "seeds" in io.inputs else []
    tokens = truncated = 0
    with io.out.writer("generations", Generation) as generations:
        for source, n in (("current", section.n), ("initial", section.initial_n)):
            rows: Iterable[Generation] = ()
            if n and source == "current" and section.splice:
                rows = _spliced(io, section, section.splice.segment)
            elif n:
                what = f"answering ({source})"
                rows = io.complete(what, io.models[source], _asks(io, seeds), n, section.sampling, source)
            for row in rows:
                generations.add(row)
                io.arrived(row)
                tokens += len(row.token_ids)
                truncated += row.finish_reason == "length"
    prompts = row_number(io.inputs["prompts"], "prompts") if "prompts" in io.inputs else len(seeds)
    io.out.contract("completion", prompts * (section.n + section.initial_n), generations.rows)
    io.out.metrics["mean tokens"] = tokens / max(1, generations.rows)
    io.out.metrics["truncated share"] = truncated / max(1, generations.rows)


def _asks(io: StageIO, seeds: Sequence[Seed]) -> Iterator[Ask]:
    """The prompts to answer: the round's own, else the seeds'."""
    if "prompts" in io.inputs:
        return (Ask(p.prompt_id, p.text) for p in iter_rows(io.inputs["prompts"], "prompts", Prompt))
    return (Ask(seed.prompt_id, seed.prompt) for seed in seeds)


def cut(length: int, segment: int, room: int, rng: random.Random) -> int:
    """How many tokens of a gold of `length` come before the segment; at most `room`.

    SAPO's program draws from 0 .. length - 3 - segment. A gold too short for that would be written anew from its first
    token each time, so the cut is then anywhere in it.
    """
    last = length - TAIL - segment
    return rng.randint(0, max(0, min(last if last >= 0 else length - 1, room)))


def spliced(gold: Sequence[int], at: int, written: Sequence[int], segment: int, ended: bool) -> tuple[list[int], bool]:
    """The gold with the `segment` tokens from `at` on replaced by what was written, and whether it has its end token.

    Where the end was written inside the segment nothing follows it.
    """
    if ended and len(written) <= segment:
        return [*gold[:at], *written], True
    rest = gold[at + segment :]
    return [*gold[:at], *written[:segment], *rest], bool(rest)


def _spliced(io: StageIO, section: recipe.Generate, longest: int) -> list[Generation]:
    """Each sample has a cut of its own; every token of the whole answer, the gold's too, has the policy's log-prob."""
    seeds = data.read_golds(io.inputs["seeds"])
    golds = {seed.prompt_id: io.chat.completion_ids(seed.prompt, seed.completion) for seed in seeds}
    prompts = {seed.prompt_id: io.chat.prompt_ids(seed.prompt) for seed in seeds}
    asks, cuts = [], {}
    for seed in seeds:
        gold = golds[seed.prompt_id]
        room = io.engine_section.max_model_len - 1 - len(prompts[seed.prompt_id]) - longest
        for k in range(section.n):
            rng = random.Random(io.row_seed(f"cut/{seed.prompt_id}/{k}"))
            at = cut(len(gold), min(longest, len(gold)), room, rng)
            cuts[seed.prompt_id, k] = at
            asks.append(Ask(seed.prompt_id, seed.prompt, k, gold[:at]))
    # a shorter segment is the beginning of a longer one, so that one call serves golds of all lengths
    sampling = section.sampling.model_copy(update={"max_tokens": longest})
    written = list(io.complete("writing segments", io.models["current"], asks, 1, sampling, "current"))
    answers = []
    for row in written:
        gold = golds[row.prompt_id]
        ended = row.finish_reason == "stop"
        segment = min(longest, len(gold))
        answers.append(spliced(gold, cuts[row.prompt_id, row.sample], row.token_ids, segment, ended))
    pieces = [(prompts[row.prompt_id], ids) for row, (ids, _) in zip(written, answers, strict=True)]
    rows = []
    for row, (ids, whole), logprobs in zip(written, answers, io.score(io.models["current"], pieces), strict=True):
        if logprobs is None:
            io.out.quarantine(f"{row.prompt_id}/current/{row.sample}", "spliced answer too long for the context")
            continue
        rows.append(
            replace(
                row,
                text=io.chat.text(ids),
                prompt_token_ids=prompts[row.prompt_id],
                token_ids=ids,
                logprobs=logprobs,
                finish_reason="stop" if whole else "length",
            )
        )
    changed = sum(row.token_ids != golds[row.prompt_id] for row in rows)
    io.out.metrics["spliced answers unlike the gold"] = changed / max(1, len(rows))
    return rows
