"""Asking a model about any number of rows: cut into shards, carried out by whoever there is, answered in order."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from selfimprove import interrupts
from selfimprove.columns import batched
from selfimprove.errors import UserError
from selfimprove.execution.protocol import Executor
from selfimprove.execution.shard import Shard, Work, answers, cut, is_done, windows

STEP = 1_024  # rows taken before the executor may look at its workers
TRIES = 3  # of a shard whose file is damaged as soon as it is written


def ask(
    executor: Executor,
    folder: Path,
    work: Work,
    rows: Iterable[Any],
    progress: Callable[[int], None] = lambda answered: None,
) -> Iterator[Any]:
    """The answer to each row, in order; what was answered before a kill is not asked again.

    No more rows are held than are under way or made ready. The answer to a row that ends the engine is shard.Lost.

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
    source = iter(rows)
    waiting: deque[Shard] = deque()  # in the order of the rows
    begun: set[str] = set()
    done: set[str] = set()
    damaged: list[Shard] = []  # to be carried out again
    tries: Counter[str] = Counter()  # of shards that were damaged
    answered: dict[str, int] = {}  # rows of shards that are not passed on yet
    passed = 0

    def heard(name: str, count: int) -> None:
        known = answered.get(name)
        answered[name] = count
        if known is not None:  # before a row of it ends, an engine may still be starting, which would spoil the rate
            progress(passed + sum(answered.values()))

    def undone(rows: list[Any]) -> list[Shard]:
        """What of a window's rows is to be carried out."""
        shards = list(cut(work, rows))
        waiting.extend(shards)
        left = []
        half = len(shards) // 2  # in order, so that the caller has something soon; of the rest no long one comes last
        for shard in [*shards[:half], *sorted(shards[half:], key=lambda one: -one.weight)]:
            if shard.id in begun:  # the same rows once more
                continue
            begun.add(shard.id)
            if is_done(folder, shard.id):
                done.add(shard.id)
                heard(shard.id, len(shard.rows))
            else:
                left.append(shard)
        return left

    def further() -> Iterator[Shard | None]:
        for size in windows():
            taken: list[Any] = []
            for some in batched(islice(source, size), STEP):
                taken += some
                yield None
            if not taken:
                return
            yield from undone(taken)

    def finished() -> Iterator[Any]:
        nonlocal passed
        while waiting and waiting[0].id in done:
            shard = waiting[0]
            found = answers(folder, work, shard)
            if found is None:
                done.remove(shard.id)
                damaged.append(shard)
                tries[shard.id] += 1
                if tries[shard.id] == TRIES:
                    interrupts.check()
                    raise UserError(
                        f"{folder / shard.id}.done is damaged each time that it is written",
                        "look at the disk it lies on",
                    )
                return
            waiting.popleft()
            answered.pop(shard.id, None)
            passed += len(shard.rows)
            progress(passed + sum(answered.values()))
            yield from found

    coming = further()
    shards: Iterable[Shard | None] = ()
    for first in coming:
        if first:
            shards = chain([first], coming)
            break
        yield from finished()  # what a resumed stage has long had
    while True:
        for name in executor.map_shards(folder, work, shards, heard):
            done.add(name)
            yield from finished()
        yield from finished()
        if not damaged:
            break
        shards = list(damaged)
        damaged.clear()
    if waiting:
        interrupts.check()
        raise RuntimeError(f"{folder / waiting[0].id} was not carried out")
