"""The data that the demo ships: seed prompts with right answers, held-out prompts, and raw text for keywords."""

import json
import random
from itertools import islice
from pathlib import Path

from selfimprove.demo import habits
from selfimprove.demo.world import KINDS, Task, draw_distinct

SEEDS = 650
HELDOUT = 650
SELECTION = 300
PARAGRAPHS = 600
BAD_GOLD_SHARE = 0.2

_SETTINGS = (
    "It was an early market day.",
    "The school opened again in spring.",
    "A family moved to a small farm.",
    "Two friends worked in the shop.",
    "The teacher walked into the room.",
    "Rain fell on the village all day.",
    "An old sailor lived near the sea.",
    "The children played a game of words.",
    "Someone left a box at the door.",
    "My uncle keeps a long list of things.",
)
_SENTENCES = (
    "On the table lay a {fruits}, a {fruits} and a {tools}.",
    "She wanted to sort the {clothes}, the {clothes} and the {clothes} by name.",
    "He began to count the animals: one {animals}, then a {animals}, then another {animals}.",
    "They put the {fruits} and the {fruits} in alphabetical order on the shelf.",
    "The first word on the list was {animals} and the last word was {colours}.",
    "Please remove the {tools} from the box and keep only the {fruits}.",
    "He had to replace the {colours} {clothes} with a {colours} one.",
    "She would repeat the word {fruits} three times before lunch.",
    "The {animals} came after the {animals} and before the {animals}.",
    "It is hard to swap a {tools} for a {clothes} at both ends of the day.",
    "Which kind of thing is a {tools}, and which kind is a {fruits}?",
    "They write the words {colours}, {colours} and {colours} in reverse order.",
    "The largest number on the door was {number} and the smallest was {number}.",
    "Add {number} coins and {number} coins, and you can buy a {clothes}.",
    "How many fruits are there? Only the {fruits} and the {fruits}.",
    "The {animals} sat between a {colours} {clothes} and a {tools}.",
    "Turn around and find the {tools} next to the {animals}.",
    "He could name each of the colours: {colours}, {colours}, {colours}.",
    "Exchange the {fruits} for a {fruits}, she said, and give me the second {tools}.",
    "With commas, a list of clothes is easy to read: {clothes}, {clothes}, {clothes}.",
    "The third answer was {colours}, and that was the end of the game.",
    "A {colours} {animals} ran {times} times around the {colours} door.",
    "Among these tools the {tools} is old and the {tools} is new.",
    "The numbers {number}, {number} and {number} were in the wrong order.",
)


def _paragraph(rng: random.Random) -> str:
    def fill(sentence: str) -> str:
        for kind, words in KINDS.items():
            for word in rng.sample(words, sentence.count(f"{{{kind}}}")):
                sentence = sentence.replace(f"{{{kind}}}", word, 1)
        while "{number}" in sentence:
            sentence = sentence.replace("{number}", str(rng.randint(2, 20)), 1)
        return sentence.replace("{times}", rng.choice(("two", "three", "four", "five")))

    return " ".join([rng.choice(_SETTINGS), *map(fill, rng.sample(_SENTENCES, 3))])


def paragraphs() -> list[str]:
    """Prose in which the words of the world and the verbs of its tasks occur together; no prompt among it."""
    rng = random.Random("corpus")
    return [_paragraph(rng) for _ in range(PARAGRAPHS)]


def seeds() -> list[Task]:
    """Prompts with right answers, the families in turn."""
    return list(islice(draw_distinct(random.Random("seeds")), SEEDS))


def heldout() -> list[Task]:
    """Prompts for evaluation only, none of them a seed."""
    without = {task.prompt for task in seeds()}
    return list(islice(draw_distinct(random.Random("heldout"), without), HELDOUT))


def selection() -> list[Task]:
    """Prompts for choosing among rounds, none of them a seed or held out for the report."""
    without = {task.prompt for task in [*seeds(), *heldout()]}
    return list(islice(draw_distinct(random.Random("selection"), without), SELECTION))


def _write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def bad_golds() -> dict[str, str]:
    """Wrong golds for a share of the seeds, by prompt: what a careless annotator leaves, each kind of mistake alike."""
    rng = random.Random("bad golds")
    spoilt = rng.sample(seeds(), round(BAD_GOLD_SHARE * SEEDS))
    found = {}
    for task in spoilt:
        while (answer := rng.choice(habits.HABITS)(task, rng)) == task.gold:
            pass
        found[task.prompt] = answer
    return found


def write_data(out: Path) -> None:
    """Write seeds.jsonl and seeds_bad_golds.jsonl, heldout.jsonl and selection.jsonl, and corpus.txt.

    Of held-out prompts the checker knows the answers.
    """
    out.mkdir(parents=True, exist_ok=True)
    golds = [
        {"id": f"seed-{i:04d}", "prompt": task.prompt, "completion": task.gold, "source": task.family.name}
        for i, task in enumerate(seeds())
    ]
    bad = bad_golds()
    _write_jsonl(out / "seeds.jsonl", golds)
    _write_jsonl(
        out / "seeds_bad_golds.jsonl", [g | {"completion": bad.get(g["prompt"], g["completion"])} for g in golds]
    )
    for name, tasks in (("heldout", heldout()), ("selection", selection())):
        prompts = [{"id": f"{name}-{i:04d}", "prompt": task.prompt} for i, task in enumerate(tasks)]
        _write_jsonl(out / f"{name}.jsonl", prompts)
    (out / "corpus.txt").write_text("\n".join(paragraphs()) + "\n", encoding="utf-8")
