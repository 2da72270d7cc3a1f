"""Which prompts are worth a label. Pure functions; log-probs are sums over an answer, in nats."""

import math
import random
from collections.abc import Mapping, Sequence


def entropy(sums: Sequence[float]) -> float:
    """The policy's predictive entropy of a prompt, from samples at temperature 1 (arXiv 2402.08114, section 3.1).

    The sums are not divided by length, as in the authors' program: a prompt with long answers counts as uncertain.
    """
    return -sum(sums) / len(sums)


def reward(logp: float, initial_logp: float, beta: float) -> float:
    """DPO's implicit reward of an answer (arXiv 2305.18290, equation 5), up to a constant of the prompt."""
    return beta * (logp - initial_logp)


def uncertainty(reward_a: float, reward_b: float) -> float:
    """1 - 2 |sigmoid(a - b) - 1/2|: 1 where the rewards are equal, towards 0 with their gap (arXiv 2402.08114).

    Written as 2 sigmoid(-|gap|), which is the same and does not round large gaps to a tie.
    """
    return 2 / (1 + math.exp(min(abs(reward_a - reward_b), 700)))


def first(measured: Mapping[str, float | None], number: int, rng: random.Random) -> set[str]:
    """The `number` names of smallest value, ties at random; an unknown value comes after every known one."""
    names = list(measured)
    rng.shuffle(names)
    names.sort(key=lambda name: math.inf if (value := measured[name]) is None else value)
    return set(names[:number])
