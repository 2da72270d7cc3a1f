"""One worker, which is this process."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from selfimprove import recipe
from selfimprove.engine import Engines
from selfimprove.execution.carry import carry_out
from selfimprove.execution.shard import Shard, Work


class Inline:
    """See protocol.Executor.

    Args:
        engines: of this process; the caller closes them.
        machine: how they are built.
    """

    def __init__(self, engines: Engines, machine: recipe.Machine) -> None:
        self._engines, self._machine = engines, machine

    def map_shards(
        self, folder: Path, work: Work, shards: Iterable[Shard | None], heard: Callable[[str, int], None]
    ) -> Iterator[str]:
        """See protocol.Executor."""
        for shard in filter(None, shards):

            def answered(count: int, name: str = shard.id) -> None:
                heard(name, count)

            carry_out(self._engines, self._machine, folder, work, shard, answered)
            yield shard.id

    def sleep(self, work: Work) -> None:
        """See protocol.Executor."""
        rest(self._engines, self._machine, work)

    def close(self) -> None:
        """End the engines."""
        self._engines.close()


def rest(engines: Engines, machine: recipe.Machine, work: Work) -> None:
    """Let the engines of this process sleep; a policy's engine that is not there yet begins to start on a CPU."""
    import torch

    if torch.cuda.is_available():
        engines.sleep()
        return
    assert work.policy is not None
    section = recipe.Engine.model_validate(work.engine)
    engines.get(section, machine, Path(work.policy), Path(work.logs) / "engine.log").sleep()
