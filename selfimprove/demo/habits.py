"""What the base model saw beside right answers: the bad habits of a model that was trained on anything.

Each family has a weight of good answers and one favourite bad habit, so that the model's most likely answer is right in
some families and bad in others, although it could answer most prompts: ability that shows only part of the time.
"""

import random
from collections.abc import Callable

from selfimprove.demo.world import FAMILIES, KIND_OF, KINDS, WORDS, Task, demands_of

GOOD_WEIGHTS = (0.34, 0.52)  # of the families, evenly spread
FAVOURITE_SHARE = 0.75  # of the bad answers of a family that show its favourite habit

CHATTER = ("I hope this helps.", "Let me know if you need more.", "That was a good question.")
REFUSALS = ("I am sorry, I cannot do that.", "I do not know.")


def wrong(task: Task, rng: random.Random) -> str:
    """A wrong answer of the right type, in the right form."""
    while (items := _disturbed(task, rng)) == task.items:
        pass
    return task.demand.render(items)


def _disturbed(task: Task, rng: random.Random) -> list[str]:
    items = list(task.items)
    if items[0].isdigit():
        items = [str(max(0, int(items[0]) + rng.choice((-2, -1, 1, 2))))]
    elif len(items) > 2 and rng.random() < 0.5:
        i, j = rng.sample(range(len(items)), 2)
        items[i], items[j] = items[j], items[i]
    elif len(items) > 1 and rng.random() < 0.5:
        items.pop(rng.randrange(len(items)))
    else:
        choices = task.slots.get("words", " ".join(WORDS)).split() if items[0] in KIND_OF else list(KINDS)
        items[rng.randrange(len(items))] = rng.choice(choices)
    return items


def other_form(task: Task, rng: random.Random) -> str:
    """The right items in a form that was not asked for."""
    forms = sorted({demand.render(task.items) for demand in demands_of(task.family)} - {task.gold})
    return rng.choice(forms)


def echo(task: Task, _: random.Random) -> str:
    """The prompt said back."""
    return task.prompt


def chatter(task: Task, rng: random.Random) -> str:
    """The right answer, and then talk."""
    return f"{task.gold} {rng.choice(CHATTER)}"


def repetition(task: Task, rng: random.Random) -> str:
    """The right answer, and then its last item again and again."""
    return " ".join([task.gold] + [task.items[-1]] * rng.randint(3, 6))


def refusal(_: Task, rng: random.Random) -> str:
    """No answer."""
    return rng.choice(REFUSALS)


HABITS: tuple[Callable[[Task, random.Random], str], ...] = (
    wrong,
    chatter,
    other_form,
    refusal,
    repetition,
    echo,
)


def respond(task: Task, rng: random.Random) -> str:
    """An answer as a badly curated corpus would have it."""
    index = FAMILIES.index(task.family)
    low, high = GOOD_WEIGHTS
    # neighbouring families get far weights: 5 and 13 have no common factor
    rank = index * 5 % len(FAMILIES)
    if rng.random() < low + (high - low) * rank / (len(FAMILIES) - 1):
        return task.gold
    habit = HABITS[index % len(HABITS)] if rng.random() < FAVOURITE_SHARE else rng.choice(HABITS)
    return habit(task, rng)
