"""Active preference learning, a part of the stage label: which prompts are worth a label."""

import itertools
import random
from collections.abc import Container, Iterator, Mapping

from selfimprove import columns, recipe
from selfimprove.errors import UserError
from selfimprove.judges import acquisition
from selfimprove.records import Generation, Verdict
from selfimprove.stages.io import StageIO
from selfimprove.store import iter_rows

SCORED_AT_ONCE = 16_384  # answers


def acquired(io: StageIO, section: recipe.Acquire) -> set[str]:
    """The prompts that are worth a label (active preference learning, arXiv 2402.08114); the others are set aside.

    What an earlier round has labelled is not taken again: the paper's pool shrinks. Where the prompts are new in each
    round there is nothing to leave out.
    """
    known = {
        verdict.prompt_id
        for name, directory in io.inputs.items()
        if name.startswith("acquired-")
        for verdict in iter_rows(directory, "verdicts", Verdict)
    }
    sums: dict[str, list[float]] = {}  # log-probs of the current policy's answers, summed
    for row in iter_rows(io.inputs["generations"], "generations", Generation):
        own = sums.setdefault(row.prompt_id, [])
        if row.source == "current":
            own.append(sum(row.logprobs))
    pool = {prompt_id: own for prompt_id, own in sums.items() if prompt_id not in known}
    if not pool:
        raise UserError(
            f"iteration {io.iteration}: every prompt has been labelled in an earlier round",
            "fewer rounds, a smaller label.acquire.prompts, or more seeds",
        )
    measured = _measured(io, section, pool)
    taken = acquisition.first(measured, section.prompts, random.Random(io.row_seed("acquire")))
    for prompt_id in sums:
        if prompt_id not in taken:
            io.out.quarantine(prompt_id, "acquired in an earlier round" if prompt_id in known else "not acquired")
    io.out.metrics |= {"pool": len(pool), "acquired": len(taken)}
    if section.by != "random":
        name, sign = ("entropy", -1) if section.by == "entropy" else ("uncertainty", 1)
        for which, of in (("pool", measured.keys()), ("acquired", taken)):
            values = [value for prompt_id in of if (value := measured[prompt_id]) is not None]
            io.out.metrics[f"{name} of the {which}"] = sign * sum(values) / len(values) if values else None
    return taken


def _measured(io: StageIO, section: recipe.Acquire, pool: Mapping[str, list[float]]) -> dict[str, float | None]:
    """Smallest first: the uncertainty of the two first answers' order, or the negated entropy."""
    if section.by == "random":
        return dict.fromkeys(pool, 0.0)
    if section.by == "entropy":
        return {name: -acquisition.entropy(sums) if sums else None for name, sums in pool.items()}
    rewards: dict[str, list[float]] = {}
    for rows in columns.batched(_two_each(io, pool), SCORED_AT_ONCE):
        # before any training the gaps are all zero, and what an engine's rounding makes of them is no order
        untrained = rows[0].policy == io.identities["initial"]
        asked = [(row.prompt, row.token_ids) for row in rows]
        initial = [row.logprobs for row in rows] if untrained else io.judging.logps("initial", asked)
        for row, logp in zip(rows, initial, strict=True):
            if logp is not None:
                reward = acquisition.reward(sum(row.logprobs), sum(logp), section.beta)
                rewards.setdefault(row.prompt_id, []).append(reward)
    return {name: acquisition.uncertainty(*pair) if len(pair := rewards.get(name, [])) == 2 else None for name in pool}


def _two_each(io: StageIO, pool: Container[str]) -> Iterator[Generation]:
    """The first two of the current policy's answers to each prompt of the pool; those of a prompt stand together."""
    rows = iter_rows(io.inputs["generations"], "generations", Generation)
    own = (row for row in rows if row.source == "current" and row.prompt_id in pool)
    for _, group in itertools.groupby(own, key=lambda row: row.prompt_id):
        yield from itertools.islice(group, 2)
