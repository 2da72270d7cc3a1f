"""Active preference learning, a part of the stage label: which prompts are worth a label."""

import random
from collections.abc import Mapping

from selfimprove import recipe
from selfimprove.errors import UserError
from selfimprove.judges import acquisition
from selfimprove.records import Generation, Verdict
from selfimprove.stages.io import StageIO
from selfimprove.store import read_rows


def acquired(io: StageIO, section: recipe.Acquire) -> set[str]:
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
    asked = [(row.prompt, row.token_ids) for row in rows]
    initial = [row.logprobs for row in rows] if untrained else io.judging.logps("initial", asked)
    rewards: dict[str, list[float]] = {}
    for row, logp in zip(rows, initial, strict=True):
        if logp is not None:
            rewards.setdefault(row.prompt_id, []).append(acquisition.reward(sum(row.logprobs), sum(logp), section.beta))
    return {name: acquisition.uncertainty(*pair) if len(pair := rewards.get(name, [])) == 2 else None for name in pool}
