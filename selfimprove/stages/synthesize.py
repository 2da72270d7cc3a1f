"""New prompts from keywords (SynPO, arXiv 2410.06961, section 3.1).

A generator, trained once from the initial model, writes a prompt from three keywords of one corpus paragraph. Its
own solution is thrown away. What cannot be read, repeats a prompt exactly or nearly, or shares words with the
evaluation set is quarantined: the paper describes no such check, and without one rounds repeat each other.
"""

import random
from pathlib import Path

from selfimprove import chat, data, dedup, recipe
from selfimprove.errors import UserError
from selfimprove.records import Prompt, Seed
from selfimprove.stages.io import Ask, StageIO
from selfimprove.store import read_rows
from selfimprove.training.job import example

VERSION = 2
TEMPLATES = ("synthesize", "synthesize_answer")
GENERATOR = "generator"  # directory of the generator's weights inside the first iteration's artifact


def run(io: StageIO, section: recipe.Synthesize) -> None:
    """Write prompts-*.parquet, and in the first iteration the generator."""
    from selfimprove.evaluation import kinds  # scipy takes a second to import: plans do without

    seeds = data.read_seeds(io.inputs["seeds"])
    generator = io.models.get(GENERATOR) or train_generator(io, section, seeds)

    rng = random.Random(io.row_seed("keywords"))
    paragraphs = data.read_paragraphs(io.inputs["corpus"])
    drawn = {f"i{io.iteration}-p{k:05d}": data.draw_corpus_keywords(paragraphs, rng) for k in range(section.prompts)}
    asks = [Ask(prompt_id, chat.render("synthesize", {"keywords": words})) for prompt_id, words in drawn.items()]
    written = io.complete("writing prompts", generator, asks, 1, section.sampling, "generator")

    evaluated = [
        row.prompt
        for name in ("heldout", "selection")
        if name in io.inputs
        for row in data.read_heldout(io.inputs[name])
    ]
    evaluated += [prompt for _, prompt in kinds.held_out(io.inputs)]
    heldout = dedup.HeldOut(evaluated, section.decontamination_ngram)
    seen = dedup.Seen(section.max_similarity)
    for seed in seeds:
        seen.add(seed.prompt, "of a seed")
    for name, directory in io.inputs.items():
        for prompt in read_rows(directory, "prompts", Prompt) if name.startswith("prompts") else []:
            seen.add(prompt.text, "of an earlier round")
    prompts = []
    for row in written:
        text = chat.tagged(row.text, "question")
        if text is None or not data.fold(text):
            io.out.quarantine(row.prompt_id, "unreadable", row.text)
        elif reason := heldout.reason(text) or seen.reason(text):
            io.out.quarantine(row.prompt_id, reason, row.text)
        else:
            seen.add(text, "within the round")
            prompts.append(Prompt(row.prompt_id, text, "synthetic", io.iteration, drawn[row.prompt_id]))
    io.out.write_rows("prompts", Prompt, prompts)
    io.out.contract("keyword list", section.prompts, len(prompts))
    io.out.metrics["words per prompt"] = sum(len(p.text.split()) for p in prompts) / max(1, len(prompts))
    if not prompts:
        raise UserError("the generator wrote no usable prompt", "train it longer: synthesize.generator.epochs")


def train_generator(io: StageIO, section: recipe.Synthesize, seeds: list[Seed]) -> Path:
    """SFT of the initial model: keywords -> the seed prompt they are of and its solution.

    Two of the keywords are the prompt's own and one is foreign; without `noise_keyword`, a control, all are its own.
    """
    rng = random.Random(io.row_seed("generator keywords"))
    examples = []
    for seed in seeds:
        words = data.draw_training_keywords(seed, seeds, rng, noise=section.noise_keyword)
        if words is None:
            continue  # too few content words: no example can be made; counted below
        request = chat.render("synthesize", {"keywords": words})
        target = chat.render("synthesize_answer", {"question": seed.prompt, "solution": seed.completion})
        ids = io.chat.prompt_ids(request), io.chat.completion_ids(request, target)
        examples.append(example(seed.prompt_id, *ids))
    needed = "two" if section.noise_keyword else "three"
    if not examples:
        raise UserError(f"no seed prompt has {needed} keywords", "give data.seeds longer prompts")
    io.out.metrics["generator examples"] = len(examples)
    io.out.metrics[f"seeds without {needed} keywords"] = len(seeds) - len(examples)
    return io.train(
        "training the prompt generator", examples, "initial", GENERATOR, section.generator, quarantine=False
    )
