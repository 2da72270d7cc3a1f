"""Trainings in processes of their own: forks of a server that has imported torch already, so they start at once."""

import multiprocessing
import os
import socket
from typing import Any

import torch

from selfimprove.training import distributed, trainer
from tests.training.conftest import job

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["selfimprove.training.launch", "transformers.models.llama.modeling_llama", "peft", "torch.distributed.checkpoint"]
)
SECONDS = 120  # more than any of them takes


def fit(folder, rows, preference=None, machine=None, stop_after=None, before=None, **settings) -> list[int]:
    """A training by as many processes as `machine` has, without torchrun; their exit codes.

    With `stop_after` all stop after so many steps of their own, as if the user had asked for it. `before` is called
    in each with its rank. A process that meets an error of the operating system ends with its number.
    """
    folder.mkdir(exist_ok=True)
    size = (machine or {}).get("num_processes", 1)
    return run(size, _fit, stop_after, before, folder, rows, preference, machine, settings)


def run(size: int, target, *arguments) -> list[int]:
    """`target(world, *arguments)` in so many processes of one group; their exit codes."""
    port = free_port()
    started = [CONTEXT.Process(target=_one, args=(rank, size, port, target, *arguments)) for rank in range(size)]
    for process in started:
        process.start()
    for process in started:
        process.join(SECONDS)
        process.kill()
        process.join()
    return [process.exitcode for process in started]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _one(rank: int, size: int, port: int, target, *arguments) -> None:
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in where.items()})
    torch.set_num_threads(1)
    with distributed.joined() as world:
        target(world, *arguments)


def _fit(world, stop_after: int | None, before, folder, rows, preference, machine, settings) -> None:
    steps: list[Any] = []

    def stop(job: Any, world: Any) -> bool:
        steps.append(None)
        return len(steps) == stop_after

    if stop_after is not None:
        trainer._asked_to_stop = stop
    if before:
        before(world.rank)
    try:
        trainer.fit(job(folder, rows, preference, machine, **settings), world)
    except KeyboardInterrupt:
        os._exit(0)
    except OSError as error:
        os._exit(error.errno)
