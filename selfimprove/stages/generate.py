"""n completions of every prompt by the current policy, and by the initial one where a method asks for it."""

from selfimprove import data, recipe
from selfimprove.records import Generation, Prompt
from selfimprove.stages.io import Ask, StageIO
from selfimprove.store import read_rows

VERSION = 1
TEMPLATES: tuple[str, ...] = ()


def run(io: StageIO, section: recipe.Generate) -> None:
    """Write generations-*.parquet."""
    if "prompts" in io.inputs:
        asks = [Ask(p.prompt_id, p.text) for p in read_rows(io.inputs["prompts"], "prompts", Prompt)]
    else:
        asks = [Ask(seed.prompt_id, seed.prompt) for seed in data.read_seeds(io.inputs["seeds"])]
    rows: list[Generation] = []
    for source, n in (("current", section.n), ("initial", section.initial_n)):
        if n:
            rows += io.complete(f"answering ({source})", io.models[source], asks, n, section.sampling, source)
    io.out.write_rows("generations", Generation, rows)
    io.out.contract("completion", len(asks) * (section.n + section.initial_n), len(rows))
    io.out.metrics["mean tokens"] = sum(len(row.token_ids) for row in rows) / max(1, len(rows))
    io.out.metrics["truncated share"] = sum(row.finish_reason == "length" for row in rows) / max(1, len(rows))
