"""Ranks that a scheduler has started: this process, rank 0, posts the shards and carries out its share; others follow.

All ranks see the run's directory. What the shards are does not depend on their number: shard i is the share of rank
i mod world, and whoever has done its own share takes what others have not begun: ranks may come late, be slow, or die.
"""

import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import msgspec

from selfimprove import interrupts, recipe
from selfimprove.engine import Engines
from selfimprove.errors import UserError
from selfimprove.execution import board
from selfimprove.execution.carry import carry_out
from selfimprove.execution.inline import rest
from selfimprove.execution.ranks import driver
from selfimprove.execution.shard import Shard, Work, ask, is_done, located

FASTEST, SLOWEST = 0.02, 0.5  # seconds between two looks at the board, the longer the less there is to see
AHEAD = 2  # shards posted for each rank, so that none waits for the driver


class Static:
    """See protocol.Executor.

    Args:
        engines: of this process; the caller closes them.
        machine: how they are built.
        folder: for the board, which the other ranks know.

    Raises:
        UserError: this process is not rank 0, or a training would wait for more ranks than there are.
    """

    def __init__(self, engines: Engines, machine: recipe.Machine, folder: Path) -> None:
        self._engines, self._machine, self._board = engines, machine, folder
        self._world = driver().world
        if machine.nodes > self._world:
            raise UserError(
                f"machine.nodes = {machine.nodes} take part in a training, and there are {self._world} ranks",
                "set machine.nodes to the number of ranks or less",
            )
        folder.mkdir(parents=True, exist_ok=True)
        board.clear(folder)
        session = board.Session(uuid.uuid4().hex, machine.model_dump_json())
        self._voice = board.Voice(folder / board.DRIVER, session)
        self._ears = {rank: board.Ear(folder / f"rank-{rank}", board.Report) for rank in range(1, self._world)}
        self._lost: set[int] = set()
        self._posted = 0
        # one thread for good: an engine's process dies with the thread that started it
        self._hands = ThreadPoolExecutor(1, "rank-0")

    def map_shards(
        self, folder: Path, work: Work, shards: Iterable[Shard | None], heard: Callable[[str, int], None]
    ) -> Iterator[str]:
        """See protocol.Executor."""
        iterator, work, folder = enumerate(filter(None, shards)), located(work), folder.absolute()
        open_shards: dict[int, Shard] = {}  # by the number under which they are posted
        mine: tuple[board.Shown, Future[None]] | None = None
        stop, stopped, pause = interrupts.Stop("the ranks finish the answers that they have begun"), False, FASTEST
        counts: dict[str, int] = {}
        try:
            while True:
                if not stopped and stop.due():
                    stopped = True
                    self._voice.say(stop=True)
                while not stopped and len(open_shards) < AHEAD * self._world:
                    index, shard = next(iterator, (0, None))
                    if shard is None:
                        break
                    ask(folder, work, shard)
                    open_shards[self._post(folder, shard, index % self._world)] = shard
                if not open_shards:
                    break
                moved = False
                if mine and mine[1].done():
                    done, mine, moved = mine, None, True
                    if error := done[1].exception():
                        if not isinstance(error, KeyboardInterrupt):
                            raise error
                        stopped = True
                        board.give_back(done[0], 0)
                    else:
                        done[0].path.unlink(missing_ok=True)
                if mine is None and not stopped and (taken := board.take(self._board, 0)):
                    shard = open_shards[taken[0].number]
                    mine = taken[0], self._hands.submit(self._carry, folder, work, shard, counts)
                self._listen(counts)
                there = {one.number: one for one in board.shown(self._board)}
                self._replace_lost(there)
                for number in open_shards.keys() - there.keys():
                    shard, moved = open_shards.pop(number), True
                    counts.pop(shard.id, None)
                    if is_done(folder, shard.id):
                        heard(shard.id, len(shard.rows))
                        yield shard.id
                    elif not stopped:  # removed with the disk's help
                        ask(folder, work, shard)
                        open_shards[self._post(folder, shard, 0)] = shard
                for name, count in list(counts.items()):
                    heard(name, count)
                if stopped and not mine and not any(one.taken and one.rank not in self._lost for one in there.values()):
                    break
                pause = FASTEST if moved else min(2 * pause, SLOWEST)
                _rest_for(mine and mine[1], pause)
        finally:
            board.clear(self._board)
            if stopped:
                self._voice.say(stop=False)
        if stopped:
            raise KeyboardInterrupt

    def sleep(self, work: Work) -> None:
        """See protocol.Executor."""
        work = located(work)
        number = self._voice.said.sleep + 1
        self._voice.say(sleep=number, work=msgspec.msgpack.encode(work))
        self._hands.submit(rest, self._engines, self._machine, work).result()
        pause = FASTEST
        while self._awake(number):
            interrupts.check()
            time.sleep(pause := min(2 * pause, SLOWEST))

    def close(self) -> None:
        """End the other ranks, too."""
        self._voice.say(ended=True)
        self._voice.close(remove=False)
        self._hands.shutdown(wait=False, cancel_futures=True)

    def _post(self, folder: Path, shard: Shard, rank: int) -> int:
        number = self._posted
        self._posted += 1
        board.post(self._board, number, folder, shard.id, rank)
        return number

    def _carry(self, folder: Path, work: Work, shard: Shard, counts: dict[str, int]) -> None:
        def answered(count: int) -> None:
            counts[shard.id] = count

        carry_out(self._engines, self._machine, folder, work, shard, answered)

    def _listen(self, counts: dict[str, int]) -> None:
        """What the other ranks say.

        Raises:
            UserError: one of them cannot serve.
        """
        for rank, ear in self._ears.items():
            report = ear.hear()
            if report is None or report.session != self._voice.said.id:
                continue
            if report.failed:
                raise UserError(f"rank {rank}: {report.failed}", report.hint or "its own output says more")
            if report.shard:
                counts[report.shard] = report.answered
            if rank in self._lost and ear.silence < board.LOST:
                self._lost.remove(rank)
                print(f"rank {rank} is back", file=sys.stderr)

    def _replace_lost(self, there: dict[int, board.Shown]) -> None:
        """Let others have the shards of ranks that say nothing any more."""
        for one in there.values():
            if one.taken and one.rank in self._ears and self._ears[one.rank].silence > board.LOST:
                if one.rank not in self._lost:
                    self._lost.add(one.rank)
                    silence = f"rank {one.rank} has said nothing for {board.LOST:.0f} s"
                    print(f"{silence}: others do its shards", file=sys.stderr)
                board.give_back(one, 0)

    def _awake(self, number: int) -> list[int]:
        """The ranks that live and have not obeyed yet."""
        self._listen({})
        found = []
        for rank, ear in self._ears.items():
            report = ear.hear()
            if report and report.session == self._voice.said.id and ear.silence < board.LOST and report.slept < number:
                found.append(rank)
        return found


def _rest_for(future: "Future[None] | None", seconds: float) -> None:
    """Wait, but no longer than until our own shard is done."""
    from concurrent.futures import wait

    if future is None:
        time.sleep(seconds)
    else:
        wait([future], seconds)
