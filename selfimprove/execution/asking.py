"""Asking a model about any number of rows: cut into shards, carried out by whoever there is, answered in order."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from selfimprove import interrupts
from selfimprove.errors import UserError
from selfimprove.execution.protocol import Executor
from selfimprove.execution.shard import WINDOW, Shard, Work, answers, cut

TRIES = 3  # of a shard whose file is damaged as soon as it is written


def ask(
    executor: Executor,
    folder: Path,
    work: Work,
    rows: Iterable[Any],
    progress: Callable[[int], None] = lambda answered: None,
) -> Iterator[Any]:
    """The answer to each row, in order; what was answered before a kill is not asked again.

    No more rows are held than are under way. The answer to a row that ends the engine is shard.Lost.

    Args:
        executor: carries out the shards.
        folder: of the shards; removed by the caller, when all that is made of the answers is kept.
        work: what is asked.
        rows: of the kind that shard.ROWS names for this work.
        progress: told how many rows have an answer.

    Raises:
        KeyboardInterrupt: the user asked to stop.
        UserError: the engine cannot serve, or a shard's file is damaged again and again.
    """
    waiting: deque[Shard] = deque()  # in the order of the rows
    again: deque[Shard] = deque()  # were done, and their files are damaged
    damaged: Counter[str] = Counter()
    done: set[str] = set()
    answered: dict[str, int] = {}  # rows of shards that are not passed on yet
    passed = 0

    def heard(name: str, count: int) -> None:
        answered[name] = count
        progress(passed + sum(answered.values()))

    def undone() -> Iterator[Shard]:
        iterator = iter(rows)
        while window := list(islice(iterator, WINDOW)):
            shards = list(cut(work, window))
            waiting.extend(shards)
            for shard in sorted(shards, key=lambda one: -one.weight):  # the longest may not come last
                if answers(folder, work, shard) is None:
                    yield shard
                else:
                    done.add(shard.id)
                    heard(shard.id, len(shard.rows))

    def todo(fresh: Iterator[Shard]) -> Iterator[Shard]:
        for shard in fresh:
            while again:
                yield again.popleft()
            yield shard
        while again:
            yield again.popleft()

    def finished() -> Iterator[Any]:
        nonlocal passed
        while waiting and waiting[0].id in done:
            shard = waiting[0]
            found = answers(folder, work, shard)
            if found is None:
                done.remove(shard.id)
                damaged[shard.id] += 1
                if damaged[shard.id] == TRIES:
                    raise UserError(
                        f"{folder / shard.id}.done is damaged each time that it is written",
                        "look at the disk it lies on",
                    )
                again.append(shard)
                return
            waiting.popleft()
            answered.pop(shard.id, None)
            passed += len(shard.rows)
            yield from found

    fresh = undone()
    while True:
        for name in executor.map_shards(folder, work, todo(fresh), heard):
            done.add(name)
            yield from finished()
        yield from finished()
        if not again:
            break
    if waiting:
        interrupts.check()
        raise RuntimeError(f"{len(waiting)} shards were not carried out")
