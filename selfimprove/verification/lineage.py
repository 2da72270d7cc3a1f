"""Where rows come from: what they name is there, and says the same."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selfimprove import data, recipe
from selfimprove.evaluation.splits import REPORT
from selfimprove.stages import discriminate, evaluate, generate, improve
from selfimprove.stages.evaluate import SPLITS
from selfimprove.verification.tables import At, batches, dicts


def check(at: At) -> Iterator[str]:
    """What is wrong with the origin of an artifact's rows, a sentence each."""
    if at.step.stage is generate:
        yield from _generations(at)
    elif at.step.stage is improve:
        yield from _refinements(at)
    elif at.step.stage is discriminate:
        yield from _discriminated(at)
    elif at.step.stage is evaluate:
        yield from _samples(at)


def _prompts(at: At) -> dict[str, str]:
    """The text of each prompt that was to be answered."""
    if "prompts" in at.step.inputs:
        rows = dicts(at.input("prompts"), "prompts", ["prompt_id", "text"])
        return {row["prompt_id"]: row["text"] for row in rows}
    return {prompt_id: seed.prompt for prompt_id, seed in at.seeds().items()}


def _generations(at: At) -> Iterator[str]:
    section = at.step.section
    assert isinstance(section, recipe.Generate)
    prompts = _prompts(at)
    asked = {"current": section.n, "initial": section.initial_n}
    if at.manifest.rows.rows_in != len(prompts) * sum(asked.values()):
        file, rows_in = at.directory / "manifest.json", at.manifest.rows.rows_in
        yield f"{file} says {rows_in} completions in, and there are {len(prompts)} prompts"
    policies = at.manifest.ingredients["models"]
    for row in _completions(at.directory, "generations"):
        name = f"{at.directory}/generations-*.parquet: {row['prompt_id']}/{row['source']}/{row['sample']}"
        if row["prompt_id"] not in prompts:
            yield f"{name} answers a prompt that is not there"
        elif row["prompt"] != prompts[row["prompt_id"]]:
            yield f"{name}: its prompt is another one"
        if not 0 <= row["sample"] < asked.get(row["source"], 0):
            yield f"{name}: no such sample was asked for"
        if row["policy"] != policies.get(row["source"]):
            yield f"{name} is by other weights than the stage was given"
        yield from _whole(name, row)


def _refinements(at: At) -> Iterator[str]:
    drafts = {
        (row["prompt_id"], row["sample"]): row["prompt"]
        for row in dicts(at.input("generations"), "generations", ["prompt_id", "sample", "source", "prompt"])
        if row["source"] == "current"
    }
    improver = at.sources.digest(f"{at.step.directory}/{improve.IMPROVER}")
    for row in _completions(at.directory, "refinements"):
        name = f"{at.directory}/refinements-*.parquet: {row['prompt_id']}/{row['source']}/{row['sample']}"
        if drafts.get((row["prompt_id"], row["sample"])) != row["prompt"]:
            yield f"{name} improves an answer that is not there"
        if row["policy"] != improver:
            yield f"{name} is by other weights than {at.directory / improve.IMPROVER}"
        yield from _whole(name, row)


def _completions(directory: Path, table: str) -> Iterator[dict[str, Any]]:
    import pyarrow.compute as pc

    columns = ["prompt_id", "prompt", "source", "sample", "policy", "token_ids", "logprobs", "finish_reason"]
    for batch in batches(directory, table, columns):
        tokens, logprobs = (pc.list_value_length(batch.column(name)).to_pylist() for name in ("token_ids", "logprobs"))
        rest = batch.select([name for name in columns if name not in ("token_ids", "logprobs")]).to_pylist()
        for row, a, b in zip(rest, tokens, logprobs, strict=True):
            yield row | {"tokens": a, "logprobs": b}


def _whole(name: str, row: dict[str, Any]) -> Iterator[str]:
    if row["tokens"] != row["logprobs"]:
        yield f"{name} has {row['tokens']} tokens and {row['logprobs']} log-probs"
    if row["finish_reason"] not in ("stop", "length"):
        yield f"{name}: no such finish_reason: {row['finish_reason']}"


def _discriminated(at: At) -> Iterator[str]:
    own = {
        (row["prompt_id"], row["source"], row["sample"])
        for row in dicts(at.input("generations"), "generations", ["prompt_id", "source", "sample"])
        if row["source"] == "current"
    }
    for table in ("labels", "verdicts"):
        for row in dicts(at.directory, table, ["prompt_id", "source", "sample"]):
            key = row["prompt_id"], row["source"], row["sample"]
            if key not in own:
                yield f"{at.directory}/{table}-*.parquet: {'/'.join(map(str, key))} is of an answer that is not there"


def _samples(at: At) -> Iterator[str]:
    section = at.step.section
    assert isinstance(section, recipe.Evaluate)
    asked = {
        split: {row.prompt_id: row.prompt for row in data.read_heldout(at.input(name), name)}
        for split, name in SPLITS.items()
        if name in at.step.inputs
    }
    for row in dicts(at.directory, "samples", ["prompt_id", "prompt", "mode", "sample", "split"]):
        name = f"{at.directory}/samples-*.parquet: {row['prompt_id']}/{row['mode']}/{row['sample']}"
        split = row["split"] or REPORT
        if asked.get(split, {}).get(row["prompt_id"]) != row["prompt"]:
            yield f"{name} answers a prompt that is not held out"
