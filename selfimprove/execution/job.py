"""A shard on its way through workers that may die."""

from pathlib import Path

from selfimprove.errors import UserError
from selfimprove.execution.hunt import Hunt
from selfimprove.execution.shard import POISONED, Answering, Lost, Shard


class Job:
    """A shard, and which of its rows a worker is to be given next.

    Args:
        folder: of the shards.
        shard: that is to be carried out.
    """

    def __init__(self, folder: Path, shard: Shard) -> None:
        self.shard = shard
        self._folder = folder
        self._hunt = Hunt(range(len(shard.rows)), len(shard.rows))
        self._given: list[int] = []

    @property
    def more(self) -> bool:
        """Whether rows are left that a worker has not been given."""
        return self._hunt.more

    def give(self) -> list[int] | None:
        """The rows to give to a worker now; None = all. Those that have an answer by then are not asked again."""
        self._given = self._hunt.next() or []
        return None if len(self._given) == len(self.shard.rows) else self._given

    def died(self, error: UserError) -> None:
        """The worker that was given rows is gone: find out what is left, and leave out a row on which workers die.

        Raises:
            UserError: they die on too many rows for them to be the cause.
        """
        answering, before = Answering(self._folder, self.shard), len(self._hunt.lost)
        self._hunt.died(self._given, [i for i in self._given if i not in answering.known], error)
        for number in self._hunt.lost[before:]:
            answering.put(number, Lost(POISONED))
        answering.close()
