"""The response improver (SynPO, arXiv 2410.06961, section 3.2).

Trained each iteration from the initial model on (seed prompt, the current policy's own answer) -> gold, where the
gold is better than that answer; it then rewrites the current policy's drafts of the new prompts. The control
`gold_distillation` tells the worth of rewriting from that of the golds: the initial model trained on prompt -> gold
answers the new prompts, and no draft is seen.
"""

from pathlib import Path

from selfimprove import chat, data, recipe
from selfimprove.errors import UserError
from selfimprove.judges import candidate
from selfimprove.judges.verifiers import verifier
from selfimprove.records import Generation, Seed
from selfimprove.stages.io import Ask, StageIO
from selfimprove.store import read_rows
from selfimprove.training.job import example

VERSION = 1
TEMPLATES = ("improve",)
IMPROVER = "improver"


def run(io: StageIO, section: recipe.Improve) -> None:
    """Write refinements-*.parquet and the improver."""
    seeds = data.read_seeds(io.inputs["seeds"])
    distilled = section.kind == "gold_distillation"
    first = [] if distilled else [Ask(seed.prompt_id, seed.prompt) for seed in seeds]
    own = []
    if first:
        own = list(io.complete("answering the seeds", io.models["current"], first, 1, section.sampling, "seed answer"))
    improver = distil(io, section, seeds) if distilled else train_improver(io, section, seeds, own)

    drafts = [
        row
        for row in read_rows(io.inputs["generations"], "generations", Generation)
        if row.source == "current" and row.sample < section.n
    ]
    requests = [
        row.prompt if distilled else chat.render("improve", {"question": row.prompt, "answer": row.text})
        for row in drafts
    ]
    asks = [Ask(row.prompt_id, request, row.sample) for row, request in zip(drafts, requests, strict=True)]
    what = "answering the prompts" if distilled else "rewriting the drafts"
    rewritten = io.complete(what, improver, asks, 1, section.sampling, "improver")
    # the pair's prompt is the question itself, not the request to improve
    questions = {row.prompt_id: (row.prompt, row.prompt_token_ids) for row in drafts}
    rows = [_asked(row, *questions[row.prompt_id]) for row in rewritten]
    io.out.write_rows("refinements", Generation, rows)
    io.out.contract("draft", len(drafts) + len(first), len(rows) + len(own))
    changed = {(r.prompt_id, r.sample): r.text for r in drafts}
    io.out.metrics["changed share"] = sum(changed[r.prompt_id, r.sample] != r.text for r in rows) / max(1, len(rows))


def train_improver(io: StageIO, section: recipe.Improve, seeds: list[Seed], own: list[Generation]) -> Path:
    """SFT of the initial model on the triples whose gold beats the current policy's own answer."""
    golds = {seed.prompt_id: seed.completion for seed in seeds}
    judged = [candidate(row, golds[row.prompt_id]) for row in own]
    examples = []
    for row, opinion in zip(own, verifier(judged, checker="exact"), strict=True):
        if opinion.score is not None and 1.0 - opinion.score > section.min_gap:
            request = chat.render("improve", {"question": row.prompt, "answer": row.text})
            target = io.chat.completion_ids(request, golds[row.prompt_id])
            examples.append(example(row.prompt_id, io.chat.prompt_ids(request), target))
    io.out.metrics["improver examples"] = len(examples)
    if not examples:
        raise UserError(
            "no gold beats the policy's own answer by more than improve.min_gap: the improver has nothing to learn",
            "lower improve.min_gap, or add harder seeds",
        )
    return io.train("training the response improver", examples, "initial", IMPROVER, section.improver, quarantine=False)


def distil(io: StageIO, section: recipe.Improve, seeds: list[Seed]) -> Path:
    """SFT of the initial model on every seed's prompt -> gold, without a draft."""
    examples = [
        example(seed.prompt_id, io.chat.prompt_ids(seed.prompt), io.chat.completion_ids(seed.prompt, seed.completion))
        for seed in seeds
    ]
    io.out.metrics["improver examples"] = len(examples)
    return io.train("distilling the golds", examples, "initial", IMPROVER, section.improver, quarantine=False)


def _asked(row: Generation, prompt: str, prompt_token_ids: list[int]) -> Generation:
    import dataclasses

    return dataclasses.replace(row, prompt=prompt, prompt_token_ids=prompt_token_ids)
