"""New prompts from keywords (SynPO, arXiv 2410.06961, section 3.1).

A generator, trained once from the initial model, writes a prompt from three keywords of one corpus paragraph. Its
own solution is thrown away. What cannot be read, repeats a prompt exactly or nearly, or shares words with the
evaluation set is quarantined: the paper describes no such check, and without one rounds repeat each other.
"""

import random
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from selfimprove import chat, columns, data, dedup, recipe
from selfimprove.errors import UserError
from selfimprove.records import Generation, Gold, Prompt
from selfimprove.stages.io import Ask, StageIO
from selfimprove.store import iter_rows
from selfimprove.training.job import example

VERSION = 2
TEMPLATES = ("synthesize", "synthesize_answer")
GENERATOR = "generator"  # directory of the generator's weights inside the first iteration's artifact


def run(io: StageIO, section: recipe.Synthesize) -> None:
    """Write prompts-*.parquet, and in the first iteration the generator."""
    from selfimprove.evaluation import kinds  # scipy takes a second to import: plans do without

    seeds = data.read_golds(io.inputs["seeds"])
    generator = io.models.get(GENERATOR) or train_generator(io, section, seeds)

    drawn: deque[tuple[str, list[str]]] = deque()  # keywords of the prompts that are being written
    asks = _asks(io, section, drawn)
    written = io.complete("writing prompts", generator, asks, 1, section.sampling, "generator")

    evaluated = [
        row.prompt
        for name in ("heldout", "selection")
        if name in io.inputs
        for row in data.read_heldout(io.inputs[name])
    ]
    evaluated += [prompt for _, prompt in kinds.held_out(io.inputs)]
    heldout = dedup.HeldOut(evaluated, section.decontamination_ngram)
    seen = dedup.Seen(section.max_similarity, io.scratch)
    seen.add([seed.prompt for seed in seeds], "of a seed")
    for name, directory in io.inputs.items():
        if name.startswith("prompts"):
            seen.add((prompt.text for prompt in iter_rows(directory, "prompts", Prompt)), "of an earlier round")
    words = 0
    with io.out.writer("prompts", Prompt) as prompts:
        for part in columns.batched(written, dedup.BATCH):
            for row, text in _new(io, heldout, seen, part):
                while (of := drawn.popleft())[0] != row.prompt_id:
                    pass
                prompts.add(Prompt(row.prompt_id, text, "synthetic", io.iteration, of[1]))
                words += len(text.split())
    io.out.contract("keyword list", section.prompts, prompts.rows)
    io.out.metrics["words per prompt"] = words / max(1, prompts.rows)
    if not prompts.rows:
        raise UserError("the generator wrote no usable prompt", "train it longer: synthesize.generator.epochs")


def _asks(io: StageIO, section: recipe.Synthesize, drawn: deque[tuple[str, list[str]]]) -> Iterator[Ask]:
    """Requests for prompts, each of keywords of its own; these are put behind `drawn`."""
    rng = random.Random(io.row_seed("keywords"))
    paragraphs = [data.keywords(paragraph) for paragraph in data.read_paragraphs(io.inputs["corpus"])]
    for k in range(section.prompts):
        prompt_id, words = f"i{io.iteration}-p{k:05d}", data.draw_corpus_keywords(paragraphs, rng)
        drawn.append((prompt_id, words))
        yield Ask(prompt_id, chat.render("synthesize", {"keywords": words}))


def _new(
    io: StageIO, heldout: dedup.HeldOut, seen: dedup.Seen, written: Sequence[Generation]
) -> Iterator[tuple[Generation, str]]:
    """The prompts that may enter, in order; the others are quarantined."""
    texts = [chat.tagged(row.text, "question") for row in written]
    against = ["unreadable" if text is None or not data.fold(text) else heldout.reason(text) for text in texts]
    left = [text for text, why in zip(texts, against, strict=True) if text and not why]
    repeated = iter(seen.admit(left, "within the round"))
    for row, text, why in zip(written, texts, against, strict=True):
        if reason := why or next(repeated):
            io.out.quarantine(row.prompt_id, reason, row.text)
        elif text:
            yield row, text


def train_generator(io: StageIO, section: recipe.Synthesize, seeds: list[Gold]) -> Path:
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
