"""Supervised fine-tuning before the first round, for methods that begin with one (SAPO, self-rewarding).

With `ratings` the model also learns to rate answers (the evaluation fine-tuning of self-rewarding, arXiv 2401.10020,
section 2.1): the gold answer earns 5; its own answer to the seed earns 5 where it equals the gold, else 0.
"""

from selfimprove import chat, data, recipe
from selfimprove.records import Gold
from selfimprove.stages.io import Ask, StageIO
from selfimprove.training.job import PairRow, example

VERSION = 1
TEMPLATES = ("judge/demo", "judge/demo_reply")
POLICY = "policy"


def run(io: StageIO, section: recipe.Sft) -> None:
    """Write policy/ and metrics.jsonl."""
    seeds = data.read_golds(io.inputs["seeds"])
    rows = [_row(io, f"{seed.prompt_id}/gold", seed.prompt, seed.completion) for seed in seeds]
    if section.ratings:
        rows += _ratings(io, section, seeds)
    io.train("supervised fine-tuning", rows, "initial", POLICY, section.optimizer)
    io.out.contract("example", len(rows), len(rows) - io.out.quarantined.total())


def _ratings(io: StageIO, section: recipe.Sft, seeds: list[Gold]) -> list[PairRow]:
    asks = [Ask(seed.prompt_id, seed.prompt) for seed in seeds]
    own = list(io.complete("answering the seeds", io.models["initial"], asks, 1, section.sampling, "seed answer"))
    golds = {seed.prompt_id: seed.completion for seed in seeds}
    rated = [(f"{seed.prompt_id}/rated gold", seed.prompt, seed.completion, 5) for seed in seeds]
    for row in own:
        right = row.text.split() == golds[row.prompt_id].split()
        rated.append((f"{row.prompt_id}/rated own", row.prompt, row.text, 5 if right else 0))
    return [
        _row(
            io,
            row_id,
            chat.render("judge/demo", {"question": question, "answer": answer}),
            chat.render("judge/demo_reply", {"score": score}),
        )
        for row_id, question, answer, score in rated
    ]


def _row(io: StageIO, row_id: str, prompt: str, completion: str) -> PairRow:
    return example(row_id, io.chat.prompt_ids(prompt), io.chat.completion_ids(prompt, completion))
