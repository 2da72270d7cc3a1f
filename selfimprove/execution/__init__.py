"""Who answers what stages ask models: this process, workers on this machine, ranks of a scheduler, a Ray cluster."""

from pathlib import Path

from selfimprove import recipe
from selfimprove.engine import Engines
from selfimprove.execution.asking import ask
from selfimprove.execution.inline import Inline
from selfimprove.execution.protocol import Executor
from selfimprove.execution.shard import Lost, Work

__all__ = ["Executor", "Executors", "Lost", "Work", "ask"]


class Executors:
    """The workers that are open, started when first asked for; they and their engines stay for whole runs.

    Args:
        log: file for the engines of this process; unset = the one that the stage names.
    """

    def __init__(self, log: Path | None = None) -> None:
        self.engines = Engines(log)
        self._workers: tuple[recipe.Machine, Path, Executor] | None = None

    def __enter__(self) -> "Executors":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def get(self, machine: recipe.Machine, logs: Path) -> Executor:
        """Those that a recipe's [machine] asks for; others that are open are closed."""
        if machine.executor == "local" and machine.workers == 1:
            return Inline(self.engines, machine)
        board = logs.parent if machine.executor == "static" else Path()  # ranks follow one run
        if self._workers is None or self._workers[:2] != (machine, board):
            if self._workers:
                self._workers[2].close()
                self._workers = None
            self._workers = machine, board, self._open(machine, logs)
        return self._workers[2]

    def close(self) -> None:
        """End all workers and engines."""
        if self._workers:
            self._workers[2].close()
            self._workers = None
        self.engines.close()

    def _open(self, machine: recipe.Machine, logs: Path) -> Executor:
        match machine.executor:
            case "local":
                from selfimprove.execution.local import Local

                return Local(machine, logs)
            case "static":
                from selfimprove.execution.board import FOLDER
                from selfimprove.execution.static import Static

                return Static(self.engines, machine, logs.parent / FOLDER)
            case "ray":
                from selfimprove.execution.ray_pool import RayPool

                return RayPool(machine, logs)
