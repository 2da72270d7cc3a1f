"""Who carries out shards: the seam between stages that ask models and the processes that answer."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

from selfimprove.execution.shard import Shard, Work


class Executor(Protocol):
    """Workers that stay for a whole run, and so do their engines."""

    def map_shards(
        self, folder: Path, work: Work, shards: Iterable[Shard | None], heard: Callable[[str, int], None]
    ) -> Iterator[str]:
        """The ids of shards as they are published in `folder`, in whatever order they are done.

        Args:
            folder: of the shards; on a disk that all workers share.
            work: what is asked.
            shards: are taken as workers become free; may be none, and then no engine is started. None in place of one:
                it takes a while yet, and whoever wants to may look at the workers meanwhile.
            heard: told (shard, rows answered so far).

        Raises:
            KeyboardInterrupt: the user asked to stop; what was answered is kept.
            UserError: no worker can do the work.
        """

    def sleep(self, work: Work) -> None:
        """Let all engines give their devices' memory back; that of `work` may begin to start meanwhile."""

    def close(self) -> None:
        """End all workers and their engines."""
