"""SAPO's replay buffer (arXiv 2405.20830): pairs drawn with replacement, the less likely the more often they were."""

import random
from collections.abc import Sequence


def weights(counts: Sequence[int]) -> list[float]:
    """How likely each row of the buffer is drawn next: in proportion to 1 / (times drawn + 1)."""
    inverse = [1 / (count + 1) for count in counts]
    total = sum(inverse)
    return [one / total for one in inverse]


def draw(sizes: Sequence[int], capacity: int, draws: int, seeds: Sequence[int]) -> list[int]:
    """The rows drawn in the last of several iterations, as indices into all rows so far.

    Iteration k adds `sizes[k]` rows, and the buffer is the last `capacity` of all. The counts come from drawing
    those of the earlier iterations again from their seeds, so that no artifact has to keep them.

    Args:
        sizes: rows that each iteration added.
        capacity: of the buffer.
        draws: per iteration.
        seeds: of each iteration.
    """
    counts: list[int] = []
    drawn: list[int] = []
    for size, seed in zip(sizes, seeds, strict=True):
        counts += [0] * size
        first = max(0, len(counts) - capacity)
        buffer = range(first, len(counts))
        drawn = random.Random(seed).choices(buffer, weights(counts[first:]), k=draws)
        for index in drawn:
            counts[index] += 1
    return drawn
