"""Several workers on this machine: a process each, on a GPU or a group of GPUs of its own, or on a CPU."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

import msgspec

from selfimprove import children, interrupts, recipe
from selfimprove.errors import UserError
from selfimprove.execution import messages
from selfimprove.execution.job import Job
from selfimprove.execution.shard import Shard, Work, ask

TICK = 0.2  # seconds between looks at what else there is to do
AHEAD = 3  # shards of each worker that are made ready while all are at work
STARTS = 3  # of a worker that answers nothing
GRACE = 60.0  # seconds that a worker may be silent beyond an engine's own patience


class _Worker:
    """A worker process; starts at once.

    Args:
        number: of the worker, from 0.
        machine: how engines are built.
        log: takes its output and its engines'.
        devices: of it, as CUDA_VISIBLE_DEVICES names them; None = all, or a CPU.
    """

    def __init__(self, number: int, machine: recipe.Machine, log: Path, devices: str | None) -> None:
        self.number, self.log = number, log
        self._machine, self._devices = machine, devices
        self.job: Job | None = None
        self.silent_starts = 0  # one after the other, of processes that ended before they said a word
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        environment = {"TOKENIZERS_PARALLELISM": "false", **os.environ}  # the other cores are others'
        if self._devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self._devices
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as file, theirs:
            command = [sys.executable, "-m", "selfimprove.execution.worker", str(theirs.fileno()), str(os.getpid())]
            self.process: subprocess.Popen[bytes] = children.start(
                [*command, self._machine.model_dump_json(), str(self.log)],
                pass_fds=[theirs.fileno()],
                stdin=children.NOTHING,
                stdout=file,
                stderr=file,
                env=environment,
            )
        self.connection = Connection(ours.detach())
        self.heard, self.spoke = time.monotonic(), False

    def send(self, call: messages.Call) -> None:
        """Say something; a worker that is gone is noticed by who listens."""
        with contextlib.suppress(OSError):
            self.connection.send_bytes(msgspec.msgpack.encode(call))
        self.heard = time.monotonic()

    def reply(self) -> messages.Reply | None:
        """What it says; None where it is gone."""
        try:
            reply: messages.Reply = msgspec.msgpack.decode(self.connection.recv_bytes(), type=messages.Reply)
        except (EOFError, OSError):
            return None
        self.heard, self.spoke = time.monotonic(), True
        return reply

    def end_if_silent(self) -> None:
        """End it where it said nothing for too long; `reply` says so."""
        if time.monotonic() - self.heard > self._machine.engine_timeout_s + GRACE:
            children.end(self.process)

    def restart(self) -> int | None:
        """Start it anew, where it died; returns the exit code of the one before.

        Raises:
            UserError: it does not come up.
        """
        self.close()
        code: int | None = self.process.returncode
        self.silent_starts = 0 if self.spoke else self.silent_starts + 1
        if self.silent_starts >= STARTS:
            raise UserError(
                f"worker {self.number} ended {self.silent_starts} times before it said a word "
                f"(the last time with code {code})",
                f"what was finished is kept; its output is {self.log}; then selfimprove resume RUN",
            )
        self._start()
        return code

    def close(self) -> None:
        """End it and what it started."""
        self.connection.close()
        children.end(self.process)


class Local:
    """See protocol.Executor; the workers start when there is work for them.

    Args:
        machine: how many, and how engines are built.
        logs: folder for their logs.
    """

    def __init__(self, machine: recipe.Machine, logs: Path) -> None:
        self._machine, self._logs = machine, logs
        self._workers: list[_Worker] = []

    def map_shards(
        self, folder: Path, work: Work, shards: Iterable[Shard | None], heard: Callable[[str, int], None]
    ) -> Iterator[str]:
        """See protocol.Executor."""
        source = ((True, shard) for shard in shards)
        prepared: deque[Job] = deque()  # to be given out next; in front those on which a worker died
        finished: list[str] = []
        stop = interrupts.Stop("the workers finish the answers that they have begun")
        stopped, more = False, True
        try:
            while True:
                if stop.due():
                    stopped = True
                    for worker in self._busy():
                        worker.send(messages.Stop())
                if not stopped:
                    self._give(prepared, folder, work)
                yield from finished  # the workers have something to do meanwhile
                finished.clear()
                busy = self._busy()
                ahead = more and not stopped and len(prepared) < AHEAD * self._machine.workers
                if not busy and not ahead:
                    break
                ready = wait([worker.connection for worker in busy], 0 if ahead else TICK)
                if ahead and not ready:
                    more, shard = next(source, (False, None))
                    if shard:
                        prepared.append(Job(folder, shard))
                    continue
                for worker in busy:
                    if worker.connection not in ready:
                        worker.end_if_silent()
                        continue
                    job = worker.job
                    assert job is not None
                    match worker.reply():
                        case messages.Answered(count):
                            heard(job.shard.id, count)
                        case messages.Stopped():
                            worker.job, stopped = None, True
                        case messages.Failed(message, hint):
                            worker.job = None
                            raise (
                                UserError(message, hint)
                                if hint is not None
                                else RuntimeError(f"worker {worker.number}: {message}; its output is {worker.log}")
                            )
                        case messages.Done():
                            worker.job = None
                            if job.more:
                                prepared.appendleft(job)
                            else:
                                heard(job.shard.id, len(job.shard.rows))
                                finished.append(job.shard.id)
                        case None:
                            worker.job = None
                            ended = f"a worker ended with code {worker.restart()}"
                            job.died(UserError(ended, f"its output is {worker.log}"))
                            prepared.appendleft(job)
        except BaseException:
            self._abandon()
            raise
        if stopped:
            raise KeyboardInterrupt

    def sleep(self, work: Work) -> None:
        """See protocol.Executor."""
        self._start()
        try:
            for worker in self._workers:
                worker.send(messages.Sleep(msgspec.msgpack.encode(work)))
            for worker in self._workers:
                while not worker.connection.poll(TICK):
                    worker.end_if_silent()
                match worker.reply():
                    case messages.Done():
                        pass
                    case messages.Failed(message, hint):
                        raise UserError(message, hint or f"its output is {worker.log}")
                    case messages.Stopped():
                        raise KeyboardInterrupt
                    case _:  # it died: the memory is free, too
                        worker.restart()
        except BaseException:  # what others say would be taken for the answer to the next call
            self.close()
            raise

    def close(self) -> None:
        """See protocol.Executor."""
        for worker in self._workers:
            worker.close()
        self._workers = []

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.job]

    def _give(self, prepared: deque[Job], folder: Path, work: Work) -> None:
        """Something to do for each free worker."""
        while prepared and len(busy := self._busy()) < self._machine.workers:
            self._start()
            worker = next(worker for worker in self._workers if worker not in busy)
            worker.job = job = prepared.popleft()
            ask(folder, work, job.shard)
            worker.send(messages.Carry(str(folder), job.shard.id, job.give()))

    def _start(self) -> None:
        if not self._workers:
            groups = device_groups(self._machine)
            self._workers = [
                _Worker(k, self._machine, self._logs / f"worker-{k}.log", group) for k, group in enumerate(groups)
            ]

    def _abandon(self) -> None:
        """Leave no worker in the middle: what it says would be taken for the answer to the next call."""
        for worker in self._busy():
            worker.close()
        if self._busy():
            self.close()


def device_groups(machine: recipe.Machine) -> Sequence[str | None]:
    """The devices of each worker: `tensor_parallel` GPUs each, or None where there is no GPU.

    Raises:
        UserError: there are too few.
    """
    import torch

    if not torch.cuda.is_available():
        return [None] * machine.workers
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = said.split(",") if said else [str(i) for i in range(torch.cuda.device_count())]
    size, needed = machine.tensor_parallel, machine.tensor_parallel * machine.workers
    if len(names) < needed:
        raise UserError(
            f"{machine.workers} workers of {size} GPUs need {needed}, and there are {len(names)}",
            "machine.workers, machine.tensor_parallel",
        )
    return [",".join(names[k * size : (k + 1) * size]) for k in range(machine.workers)]
