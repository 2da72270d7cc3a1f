"""A small world of short English instructions whose right answers are known.

A prompt is one phrasing of one family (`Sort these words from A to Z: pear cat hat.`), optionally followed by one
demand on the form of the answer (`Use commas.`).  Prompts are parsed, never looked up, so the checker covers prompts
that a model made up as well: `answer` gives the right answer of anything inside the grammar and None outside it.
"""

import random
import re
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

KINDS: Mapping[str, tuple[str, ...]] = {
    "animals": ("cat", "dog", "horse", "sheep", "goat", "lion", "tiger", "rabbit"),
    "fruits": ("apple", "pear", "lemon", "cherry", "grape", "plum", "mango", "melon"),
    "colours": ("red", "blue", "green", "yellow", "black", "white", "brown", "pink"),
    "tools": ("hammer", "saw", "drill", "knife", "spoon", "brush", "rope", "ladder"),
    "clothes": ("hat", "coat", "shirt", "sock", "glove", "scarf", "boot", "belt"),
}
KIND_OF: Mapping[str, str] = {word: kind for kind, words in KINDS.items() for word in words}
WORDS: tuple[str, ...] = tuple(KIND_OF)
POSITIONS = ("first", "second", "third", "last")
TIMES = ("two", "three", "four", "five")
MAX_NUMBER = 20
MAX_ADDEND = 12
MAX_ITEMS = 7

Slots = Mapping[str, str]


@dataclass(frozen=True)
class Family:
    """One kind of task: how it is asked, how it is solved, and how long the lists of its own prompts are."""

    name: str
    phrasings: tuple[str, ...]
    solve: Callable[[Slots], list[str] | None]  # None: the prompt is well formed but has no one answer
    gives_list: bool = False
    sizes: tuple[int, int] = (3, 4)


@dataclass(frozen=True)
class Demand:
    """A sentence that asks for a form of the answer, and that form."""

    text: str
    render: Callable[[list[str]], str]
    lists_only: bool = False


@dataclass(frozen=True)
class Task:
    """A prompt as understood: its family, what fills the phrasing, the form asked for, and the items of the answer."""

    prompt: str
    family: Family
    slots: Slots
    demand: Demand
    items: list[str]

    @property
    def gold(self) -> str:
        """The right answer in the form asked for."""
        return self.demand.render(self.items)


# --- how each family is solved ----------------------------------------------------------------------------------------


def _list(slots: Slots) -> list[str]:
    return slots["words"].split()


def _numbers(slots: Slots) -> list[int]:
    return [int(number) for number in slots["numbers"].split()]


def _nth(slots: Slots) -> list[str] | None:
    words = _list(slots)
    index = len(words) - 1 if slots["position"] == "last" else POSITIONS.index(slots["position"])
    return [words[index]] if index < len(words) else None


def _repeat(slots: Slots) -> list[str]:
    return [slots["word"]] * (TIMES.index(slots["times"]) + 2)


def _count(slots: Slots) -> list[str]:
    return [str(sum(KIND_OF[word] == slots["kind"] for word in _list(slots)))]


def _keep(slots: Slots) -> list[str] | None:
    return [word for word in _list(slots) if KIND_OF[word] == slots["kind"]] or None


def _insert(slots: Slots) -> list[str]:
    words = _list(slots)
    return [slots["new"], *words] if slots["place"] == "start" else [*words, slots["new"]]


def _drop(slots: Slots) -> list[str]:
    words = _list(slots)
    return words[1:] if slots["end"] == "first" else words[:-1]


def _swap(slots: Slots) -> list[str]:
    first, *middle, last = _list(slots)
    return [last, *middle, first]


def _neighbour(slots: Slots) -> list[str] | None:
    words = _list(slots)
    if words.count(slots["word"]) != 1:
        return None
    index = words.index(slots["word"]) + (1 if slots["side"] == "after" else -1)
    return [words[index]] if 0 <= index < len(words) else None


def _extreme(slots: Slots) -> list[str]:
    return [str(max(_numbers(slots)) if slots["extreme"] == "largest" else min(_numbers(slots)))]


FAMILIES: tuple[Family, ...] = (
    Family(
        "reverse",
        ("Write these words in reverse order: {words}.", "Turn this list around: {words}."),
        lambda slots: _list(slots)[::-1],
        gives_list=True,
    ),
    Family(
        "sort",
        ("Sort these words from A to Z: {words}.", "Put this list in alphabetical order: {words}."),
        lambda slots: sorted(_list(slots)),
        gives_list=True,
        sizes=(3, 3),
    ),
    Family(
        "nth",
        ("Give the {position} word of this list: {words}.", "Which word is {position} in this list: {words}?"),
        _nth,
    ),
    Family(
        "repeat",
        ("Repeat the word {word} {times} times.", "Write the word {word} {times} times."),
        _repeat,
        gives_list=True,
    ),
    Family(
        "count",
        ("How many {kind} are in this list: {words}?", "Count the {kind} among these words: {words}."),
        _count,
    ),
    Family(
        "keep",
        ("Keep only the {kind} in this list: {words}.", "Which of these words are {kind}: {words}?"),
        _keep,
        gives_list=True,
    ),
    Family(
        "insert",
        ("Put {new} at the {place} of this list: {words}.", "Add {new} to the {place} of these words: {words}."),
        _insert,
        gives_list=True,
    ),
    Family(
        "drop",
        ("Remove the {end} word from this list: {words}.", "Write this list without its {end} word: {words}."),
        _drop,
        gives_list=True,
    ),
    Family(
        "swap",
        ("Swap the first and the last word: {words}.", "Exchange the two ends of this list: {words}."),
        _swap,
        gives_list=True,
    ),
    Family(
        "neighbour",
        ("Which word comes {side} {word} in this list: {words}?", "Find the word just {side} {word}: {words}."),
        _neighbour,
    ),
    Family(
        "kinds",
        ("Name the kind of each word: {words}.", "Say what kind of thing each of these is: {words}."),
        lambda slots: [KIND_OF[word] for word in _list(slots)],
        gives_list=True,
        sizes=(2, 4),
    ),
    Family(
        "add",
        ("Add the numbers {a} and {b}.", "What is {a} plus {b}?"),
        lambda slots: [str(int(slots["a"]) + int(slots["b"]))],
    ),
    Family(
        "extreme",
        ("Find the {extreme} of these numbers: {numbers}.", "Which of these numbers is the {extreme}: {numbers}?"),
        _extreme,
    ),
)

DEMANDS: tuple[Demand, ...] = (
    Demand("", " ".join),
    Demand("Use commas.", ", ".join, lists_only=True),
    Demand("Join them with and.", " and ".join, lists_only=True),
    Demand("End with a full stop.", lambda items: " ".join(items) + "."),
    Demand("Start with Answer:", lambda items: "Answer: " + " ".join(items)),
    Demand("End with the word done.", lambda items: " ".join(items) + " done"),
)
PLAIN = DEMANDS[0]


def demands_of(family: Family) -> list[Demand]:
    """The demands that make sense for a family's answers."""
    return [demand for demand in DEMANDS if family.gives_list or not demand.lists_only]


# --- prompt -> task ---------------------------------------------------------------------------------------------------


def _either(words: tuple[str, ...]) -> str:
    return f"(?:{'|'.join(words)})"


_NUMBER = _either(tuple(str(number) for number in range(MAX_NUMBER, -1, -1)))
_ADDEND = _either(tuple(str(number) for number in range(MAX_ADDEND, -1, -1)))
_SLOT_PATTERNS: Mapping[str, str] = {
    "words": f"{_either(WORDS)}(?: {_either(WORDS)}){{1,{MAX_ITEMS - 1}}}",
    "numbers": f"{_NUMBER}(?: {_NUMBER}){{1,{MAX_ITEMS - 1}}}",
    "word": _either(WORDS),
    "new": _either(WORDS),
    "kind": _either(tuple(KINDS)),
    "position": _either(POSITIONS),
    "times": _either(TIMES),
    "side": _either(("before", "after")),
    "extreme": _either(("largest", "smallest")),
    "place": _either(("start", "end")),
    "end": _either(("first", "last")),
    "a": _ADDEND,
    "b": _ADDEND,
}


def _pattern(phrasing: str) -> re.Pattern[str]:
    literal = re.escape(phrasing).replace(r"\{", "{").replace(r"\}", "}")
    return re.compile(re.sub(r"\{(\w+)\}", lambda slot: f"(?P<{slot[1]}>{_SLOT_PATTERNS[slot[1]]})", literal))


_PATTERNS = [(family, _pattern(phrasing)) for family in FAMILIES for phrasing in family.phrasings]


def normalise(text: str) -> str:
    """Surrounding and repeated white space carries no meaning here."""
    return " ".join(text.split())


def parse(prompt: str) -> Task | None:
    """Understand a prompt, or return None if it is outside the grammar or has no one answer."""
    text = normalise(prompt)
    demand = next((demand for demand in DEMANDS[1:] if text.endswith(" " + demand.text)), PLAIN)
    question = text.removesuffix(demand.text).rstrip()
    for family, pattern in _PATTERNS:
        if match := pattern.fullmatch(question):
            slots = match.groupdict()
            items = family.solve(slots)
            if items is None or (demand.lists_only and not family.gives_list):
                return None
            return Task(text, family, slots, demand, items)
    return None


def answer(prompt: str) -> str | None:
    """The right answer to a prompt; None outside the grammar."""
    task = parse(prompt)
    return task.gold if task else None


def check(prompt: str, completion: str) -> bool | None:
    """Whether a completion is exactly right, white space aside; None if the prompt is outside the grammar."""
    gold = answer(prompt)
    return None if gold is None else normalise(completion) == gold


# --- drawing prompts --------------------------------------------------------------------------------------------------


def _draw_slots(rng: random.Random, family: Family) -> dict[str, str]:
    words = rng.sample(WORDS, rng.randint(*family.sizes))
    numbers = rng.sample(range(MAX_NUMBER + 1), rng.randint(*family.sizes))
    return {
        "words": " ".join(words),
        "numbers": " ".join(map(str, numbers)),
        "word": rng.choice(words),
        "new": rng.choice(WORDS),
        "kind": KIND_OF[rng.choice(words)],
        "position": rng.choice(POSITIONS),
        "times": rng.choice(TIMES),
        "side": rng.choice(("before", "after")),
        "extreme": rng.choice(("largest", "smallest")),
        "place": rng.choice(("start", "end")),
        "end": rng.choice(("first", "last")),
        "a": str(rng.randint(0, MAX_ADDEND)),
        "b": str(rng.randint(0, MAX_ADDEND)),
    }


def draw(rng: random.Random, family: Family | None = None) -> Task:
    """A random prompt (of a given family), understood; a third of the prompts demand no form."""
    family = family or rng.choice(FAMILIES)
    demand = PLAIN if rng.random() < 1 / 3 else rng.choice(demands_of(family)[1:])
    while True:
        question = rng.choice(family.phrasings).format(**_draw_slots(rng, family))
        if task := parse(f"{question} {demand.text}"):
            return task


def draw_distinct(rng: random.Random, without: AbstractSet[str] = frozenset()) -> Iterator[Task]:
    """Random prompts, the families in turn, no prompt twice and none of those in `without`."""
    seen = set(without)
    while True:
        for family in FAMILIES:
            task = draw(rng, family)
            while task.prompt in seen:
                task = draw(rng, family)
            seen.add(task.prompt)
            yield task
