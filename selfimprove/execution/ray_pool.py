"""Workers on a Ray cluster, or on a local one that lives as long as the run: actors that come and go with its nodes.

Every node sees the run's directory at the same path. Ray places the actors, and starts one anew, perhaps elsewhere,
whose process or node is lost; what it was at is given out again here, so that a row that ends one actor after another
is found.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from selfimprove import interrupts, recipe
from selfimprove.engine import Engines
from selfimprove.errors import UserError
from selfimprove.execution.carry import carry_out
from selfimprove.execution.inline import rest
from selfimprove.execution.job import Job
from selfimprove.execution.shard import Shard, Work, ask, asked, is_done, located

TICK = 0.2  # seconds between two looks at what else there is to do
BEAT = 1.0  # seconds between two questions how far an actor is
DEATHS = 3  # of actors, one after the other before one was there
NOBODY = 600.0  # seconds that the cluster may have room for no actor at all


class Carrier:
    """What an actor runs: one process with engines of its own.

    Args:
        number: of the actor, from 0.
        machine: the recipe's section, as JSON.
        logs: folder for the engines' output.
    """

    def __init__(self, number: int, machine: str, logs: str) -> None:
        self._machine = recipe.Machine.model_validate_json(machine)
        Path(logs).mkdir(parents=True, exist_ok=True)
        self._engines = Engines(Path(logs) / f"ray-{number}.log")
        self._stop = interrupts.Interrupts(lambda: None)
        self._stop.__enter__()
        self._one = threading.Lock()  # a call that was lost on the way back may still be under way when it is repeated
        self._answered = 0

    def ready(self) -> None:
        """Returns once the actor runs."""

    def carry(self, folder: str, name: str, only: list[int] | None) -> tuple[str, str, str | None]:
        """Carry out a shard; how that ended: "done", "stopped", or "failed" and why."""
        try:
            with self._one:
                if is_done(Path(folder), name):
                    return "done", "", None
                self._answered = 0
                work, shard = asked(Path(folder), name)
                carry_out(self._engines, self._machine, Path(folder), work, shard, self._heard, only)
        except KeyboardInterrupt:
            self._stop.pending = False
            return "stopped", "", None
        except UserError as error:
            return "failed", error.message, error.hint
        return "done", "", None

    def rest(self, work: bytes) -> None:
        """Let the engines sleep."""
        rest(self._engines, self._machine, msgspec.msgpack.decode(work, type=Work))

    def answered(self) -> int:
        """Rows of the shard under way that have an answer."""
        return self._answered

    def stop(self) -> None:
        """Begin nothing new in the shard under way."""
        self._stop.pending = True

    def _heard(self, count: int) -> None:
        self._answered = count


@dataclass
class _Worker:
    """An actor, and what is awaited of it."""

    actor: Any
    ready: Any  # until it runs
    job: Job | None = None
    result: Any = None
    count: Any = None


class RayPool:
    """See protocol.Executor; the actors start when there is work for them.

    Args:
        machine: how many, and how engines are built.
        logs: folder for their logs.

    Raises:
        UserError: Ray is not installed, or the cluster is not there.
    """

    def __init__(self, machine: recipe.Machine, logs: Path) -> None:
        self._machine, self._logs = machine, logs.absolute()
        self._ray = _connect(machine)
        self._workers: list[_Worker] = []
        self._deaths = 0  # since one was there
        self._alone = time.monotonic()  # since when there is no actor that runs

    def map_shards(
        self, folder: Path, work: Work, shards: Iterable[Shard | None], heard: Callable[[str, int], None]
    ) -> Iterator[str]:
        """See protocol.Executor."""
        try:
            yield from self._map(folder.absolute(), located(work), filter(None, shards), heard)
        except BaseException:
            self._abandon()
            raise

    def _map(
        self, folder: Path, work: Work, shards: Iterator[Shard], heard: Callable[[str, int], None]
    ) -> Iterator[str]:
        again: list[Job] = []  # not given out yet, or portions of shards on which an actor died
        finished: list[str] = []
        stop, stopped, left, beat = interrupts.Stop("the actors finish the answers they have begun"), False, True, 0.0
        self._alone = time.monotonic()
        while True:
            if stop.due():
                stopped = True
                for worker in self._busy():
                    worker.actor.stop.remote()
            left = not stopped and self._give(shards, again, folder, work)
            yield from finished  # the actors have something to do meanwhile
            finished.clear()
            if not left and not self._busy():
                break
            for worker in self._ready():
                if worker.job is None:
                    self._came(worker)
                    continue
                job, worker.job = worker.job, None
                try:
                    ended, message, hint = self._ray.get(worker.result)
                except self._ray.exceptions.RayActorError as error:
                    worker.ready, worker.count = worker.actor.ready.remote(), None  # once it has come again
                    job.died(UserError(f"an actor died: {error}", f"the engines' logs are in {self._logs}"))
                    again.append(job)
                    continue
                if ended == "failed":
                    raise UserError(message, hint or f"its output is in {self._logs}")
                if ended == "stopped":
                    stopped = True
                elif job.more:
                    again.append(job)
                else:
                    heard(job.shard.id, len(job.shard.rows))
                    finished.append(job.shard.id)
            if time.monotonic() - beat > BEAT:
                beat = time.monotonic()
                self._ask_how_far(heard)
        if stopped:
            raise KeyboardInterrupt

    def sleep(self, work: Work) -> None:
        """See protocol.Executor."""
        said = msgspec.msgpack.encode(located(work))
        self._start()
        for worker in self._workers:
            if worker.ready is None:
                with contextlib.suppress(self._ray.exceptions.RayActorError):  # its memory is free, too
                    self._ray.get(worker.actor.rest.remote(said))

    def close(self) -> None:
        """See protocol.Executor."""
        for worker in self._workers:
            self._ray.kill(worker.actor)
        self._workers = []
        self._ray.shutdown()

    def _start(self) -> None:
        if self._workers:
            return
        gpus = self._machine.tensor_parallel if self._ray.cluster_resources().get("GPU") else 0
        # two threads: one carries out, the other answers how far it is
        kind = self._ray.remote(Carrier).options(
            num_cpus=1, num_gpus=gpus, max_restarts=-1, max_task_retries=0, max_concurrency=2
        )
        settings = self._machine.model_dump_json()
        actors = [kind.remote(number, settings, str(self._logs)) for number in range(self._machine.workers)]
        self._workers = [_Worker(actor, actor.ready.remote()) for actor in actors]

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.job]

    def _ready(self) -> list[_Worker]:
        """Those that have come, or are done with what they were at."""
        awaited = {worker.result if worker.job else worker.ready: worker for worker in self._workers}
        awaited.pop(None, None)
        if not awaited:
            return []
        ready, _ = self._ray.wait(list(awaited), num_returns=len(awaited), timeout=TICK)
        if all(worker.ready is not None for worker in self._workers) and not ready:
            if time.monotonic() - self._alone > NOBODY:
                raise UserError(
                    f"the Ray cluster has had no room for a worker for {NOBODY / 60:.0f} minutes",
                    "ray status shows what it has; a worker takes a CPU, and machine.tensor_parallel GPUs if it can",
                )
        else:
            self._alone = time.monotonic()
        return [awaited[reference] for reference in ready]

    def _came(self, worker: _Worker) -> None:
        try:
            self._ray.get(worker.ready)
            worker.ready, self._deaths = None, 0
        except self._ray.exceptions.ActorUnavailableError:  # Ray is about to notice that its node went
            time.sleep(TICK)
            worker.ready = worker.actor.ready.remote()
        except self._ray.exceptions.RayActorError as error:
            self._deaths += 1
            if self._deaths == DEATHS:
                raise UserError(
                    f"an actor dies before it is there: {str(error).strip().splitlines()[-1]}",
                    "selfimprove must be installed on all nodes of the cluster, in the same version",
                ) from None
            worker.ready = worker.actor.ready.remote()

    def _give(self, iterator: Iterator[Shard], again: list[Job], folder: Path, work: Work) -> bool:
        """Something to do for each free actor; whether there is more to do."""
        while True:
            if not again:
                if (shard := next(iterator, None)) is None:
                    return False
                again.append(Job(folder, shard))
            self._start()
            free = next((worker for worker in self._workers if worker.job is None and worker.ready is None), None)
            if free is None:
                return True
            free.job = job = again.pop()
            ask(folder, work, job.shard)
            free.result = free.actor.carry.remote(str(folder), job.shard.id, job.give())

    def _ask_how_far(self, heard: Callable[[str, int], None]) -> None:
        for worker in self._busy():
            assert worker.job is not None
            if worker.count is not None:
                done, _ = self._ray.wait([worker.count], timeout=0)
                if not done:
                    continue
                with contextlib.suppress(self._ray.exceptions.RayActorError):
                    heard(worker.job.shard.id, self._ray.get(worker.count))
            worker.count = worker.actor.answered.remote()

    def _abandon(self) -> None:
        """Leave no actor in the middle of what nobody waits for."""
        for worker in self._busy():
            self._ray.kill(worker.actor, no_restart=False)
            worker.job, worker.count, worker.ready = None, None, worker.actor.ready.remote()


def _connect(machine: recipe.Machine) -> Any:
    """Ray, connected.

    Raises:
        UserError: it is not installed, or nobody answers at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local: dict[str, Any] = {"num_cpus": machine.workers, "include_dashboard": False}
    if machine.ray_address is None:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else it writes a token into the home folder
        os.environ.setdefault("RAY_worker_niceness", "0")  # 15 otherwise: others would get the CPU
    try:
        import ray
    except ImportError:
        raise UserError("machine.executor = 'ray' needs Ray", "pip install 'selfimprove[ray]'") from None
    try:
        ray.init(
            address=machine.ray_address or "local",
            logging_level=logging.ERROR,
            log_to_driver=False,
            **({} if machine.ray_address else local),
        )
    except (ConnectionError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"no Ray cluster at {machine.ray_address}: {reason}",
            "ray status, on a node of it; or leave ray_address out",
        ) from None
    return ray
