"""Batches of rows of like length: little padding, and no batch too large for the memory."""

from collections.abc import Callable, Iterator, Sequence


def by_length(
    lengths: Sequence[int], budget: int, cost: Callable[[int], int] = lambda longest: longest
) -> Iterator[list[int]]:
    """Numbers of rows, short rows first; rows x cost(longest) stays within the budget, or the row is alone."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):  # so the newest is the longest
        if batch and (len(batch) + 1) * cost(lengths[i]) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
