"""The response improver (SynPO, arXiv 2410.06961, section 3.2).

Trained each iteration from the initial model on (seed prompt, the current policy's own answer) -> gold, where the
gold is better than that answer; it then rewrites the current policy's drafts of the new prompts. The control
`gold_distillation` tells the worth of rewriting from that of the golds: the initial model trained on prompt -> gold
answers the new prompts, and no draft is seen.
"""

from collections import deque
from collections.abc import Iterator
from pathlib import Path

from msgspec.structs import replace

from selfimprove import chat, data, recipe
from selfimprove.errors import UserError
from selfimprove.judges import candidate
from selfimprove.judges.verifiers import verifier
from selfimprove.records import Generation, Gold
from selfimprove.stages.io import Ask, StageIO
from selfimprove.store import iter_rows
from selfimprove.training.job import example

VERSION = 1
TEMPLATES = ("improve",)
IMPROVER = "improver"


def run(io: StageIO, section: recipe.Improve) -> None:
    """Write refinements-*.parquet and the improver."""
    seeds = data.read_golds(io.inputs["seeds"])
    distilled = section.kind == "gold_distillation"
    first = [] if distilled else [Ask(seed.prompt_id, seed.prompt) for seed in seeds]
    own = []
    if first:
        own = list(io.complete("answering the seeds", io.models["current"], first, 1, section.sampling, "seed answer"))
    improver = distil(io, section, seeds) if distilled else train_improver(io, section, seeds, own)

    what = "answering the prompts" if distilled else "rewriting the drafts"
    waiting: deque[Generation] = deque()  # drafts that are being rewritten
    drafts = changed = 0
    with io.out.writer("refinements", Generation) as refinements:
        for row in io.complete(what, improver, _asks(io, section, waiting), 1, section.sampling, "improver"):
            while True:
                draft, drafts = waiting.popleft(), drafts + 1
                if (draft.prompt_id, draft.sample) == (row.prompt_id, row.sample):
                    break
            # the pair's prompt is the question itself, not the request to improve
            rewritten = _asked(row, draft.prompt, draft.prompt_token_ids)
            refinements.add(rewritten)
            io.arrived(rewritten)
            changed += draft.text != row.text
    rows = refinements.rows
    io.out.contract("draft", drafts + len(waiting) + len(first), rows + len(own))
    io.out.metrics["changed share"] = changed / max(1, rows)


def _asks(io: StageIO, section: recipe.Improve, waiting: deque[Generation]) -> Iterator[Ask]:
    """Requests to rewrite the current policy's drafts, or their prompts alone; the drafts are put behind `waiting`."""
    for row in iter_rows(io.inputs["generations"], "generations", Generation):
        if row.source == "current" and row.sample < section.n:
            waiting.append(row)
            values = {"question": row.prompt, "answer": row.text}
            request = row.prompt if section.kind == "gold_distillation" else chat.render("improve", values)
            yield Ask(row.prompt_id, request, row.sample)


def train_improver(io: StageIO, section: recipe.Improve, seeds: list[Gold], own: list[Generation]) -> Path:
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


def distil(io: StageIO, section: recipe.Improve, seeds: list[Gold]) -> Path:
    """SFT of the initial model on every seed's prompt -> gold, without a draft."""
    examples = [
        example(seed.prompt_id, io.chat.prompt_ids(seed.prompt), io.chat.completion_ids(seed.prompt, seed.completion))
        for seed in seeds
    ]
    io.out.metrics["improver examples"] = len(examples)
    return io.train("distilling the golds", examples, "initial", IMPROVER, section.improver, quarantine=False)


def _asked(row: Generation, prompt: str, prompt_token_ids: list[int]) -> Generation:
    return replace(row, prompt=prompt, prompt_token_ids=prompt_token_ids)
