"""New prompts from keywords (SynPO, arXiv 2410.06961, section 3.1).

A generator, trained once from the initial model, writes a prompt from three keywords of one corpus paragraph. Its
own solution is thrown away. What cannot be read, is a duplicate, or stands in the evaluation set is quarantined.
"""

import random
from pathlib import Path

from selfimprove import chat, data, recipe
from selfimprove.errors import UserError
from selfimprove.records import Prompt, Seed
from selfimprove.stages.io import Ask, StageIO
from selfimprove.store import read_rows
from selfimprove.training.job import example

VERSION = 1
TEMPLATES = ("synthesize", "synthesize_answer")
GENERATOR = "generator"  # directory of the generator's weights inside the first iteration's artifact


def run(io: StageIO, section: recipe.Synthesize) -> None:
    """Write prompts-*.parquet, and in the first iteration the generator."""
    seeds = data.read_seeds(io.inputs["seeds"])
    generator = io.models.get(GENERATOR) or train_generator(io, section, seeds)

    rng = random.Random(io.row_seed("keywords"))
    paragraphs = data.read_paragraphs(io.inputs["corpus"])
    drawn = {f"i{io.iteration}-p{k:05d}": data.draw_corpus_keywords(paragraphs, rng) for k in range(section.prompts)}
    asks = [Ask(prompt_id, chat.render("synthesize", {"keywords": words})) for prompt_id, words in drawn.items()]
    written = io.complete("writing prompts", generator, asks, 1, section.sampling, "generator")

    heldout = {data.fold(row.prompt) for row in data.read_heldout(io.inputs["heldout"])}
    known = {data.fold(seed.prompt): "duplicate of a seed" for seed in seeds}
    for name, directory in io.inputs.items():
        if name.startswith("prompts"):
            known |= {
                data.fold(p.text): "duplicate of an earlier round" for p in read_rows(directory, "prompts", Prompt)
            }
    prompts = []
    for row in written:
        text = chat.tagged(row.text, "question")
        folded = data.fold(text or "")
        if not folded:
            io.out.quarantine(row.prompt_id, "unreadable", row.text)
        elif folded in heldout:
            io.out.quarantine(row.prompt_id, "in the evaluation set", row.text)
        elif folded in known:
            io.out.quarantine(row.prompt_id, known[folded], row.text)
        else:
            known[folded] = "duplicate within the round"
            prompts.append(Prompt(row.prompt_id, text or "", "synthetic", io.iteration, drawn[row.prompt_id]))
    io.out.write_rows("prompts", Prompt, prompts)
    io.out.contract("keyword list", section.prompts, len(prompts))
    io.out.metrics["words per prompt"] = sum(len(p.text.split()) for p in prompts) / max(1, len(prompts))
    if not prompts:
        raise UserError("the generator wrote no usable prompt", "train it longer: synthesize.generator.epochs")


def train_generator(io: StageIO, section: recipe.Synthesize, seeds: list[Seed]) -> Path:
    """SFT of the initial model: two of the prompt's keywords and a foreign one -> the prompt and its solution."""
    rng = random.Random(io.row_seed("generator keywords"))
    examples = []
    for seed in seeds:
        words = data.draw_training_keywords(seed, seeds, rng)
        if words is None:
            continue  # fewer than two content words: no example can be made; counted below
        request = chat.render("synthesize", {"keywords": words})
        target = chat.render("synthesize_answer", {"question": seed.prompt, "solution": seed.completion})
        ids = io.chat.prompt_ids(request), io.chat.completion_ids(request, target)
        examples.append(example(seed.prompt_id, *ids))
    if not examples:
        raise UserError("no seed prompt has two keywords", "give data.seeds longer prompts")
    io.out.metrics["generator examples"] = len(examples)
    io.out.metrics["seeds without two keywords"] = len(seeds) - len(examples)
    return io.train(
        "training the prompt generator", examples, "initial", GENERATOR, section.generator, quarantine=False
    )
