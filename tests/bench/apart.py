"""Each trainer in a process of its own, so that what one does to its process, the other does not gain or lose by.

Ours keeps its heap as `training.trainer.fit` does; TRL's is glibc's, as its users have it.
"""

import gc
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Self, TypeVar

import datasets
import numpy as np
import numpy.typing as npt
import torch
import transformers

from selfimprove import children
from selfimprove.training import heap
from selfimprove.training.job import PairRow
from tests.bench import workload
from tests.bench.sides import Ours, Trl
from tests.bench.workload import Setting

T = TypeVar("T")
Seen = tuple[float, npt.NDArray[np.float64], npt.NDArray[np.float32]]  # loss, log-probs, gradient: as sides.Seen

_held: list[Ours | Trl] = []  # of a worker's process: the side that it runs
_for_good = ExitStack()


class Worker:
    """A process that runs one side after the other, told what to do by ours."""

    def __init__(self, *, keeps_heap: bool) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_begin, initargs=(keeps_heap, os.getpid()))

    def do(self, task: Callable[..., T], *given: object) -> T:
        """What `task` returns there."""
        return self._pool.submit(task, *given).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown()


def _begin(keeps_heap: bool, parent: int) -> None:
    children.tie(parent)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if keeps_heap:
        _for_good.enter_context(heap.kept(torch.device("cuda" if torch.cuda.is_available() else "cpu")))


def build(make: Callable[..., Ours | Trl], *given: object) -> None:
    """Hold a side, its weights moved away from the reference's."""
    _held.append(make(*given))
    workload.perturb(_held[0].model)


def check(rows: Sequence[PairRow]) -> Seen:
    """See the side's. Arrays, as tensors would travel through shared memory, of which there may be little."""
    seen = _held[0].check(rows)
    return seen.loss, seen.logps.numpy(), seen.gradient.float().numpy()  # float32 is what a gradient is


def step(rows: Sequence[PairRow]) -> float:
    """See the side's."""
    return _held[0].step(rows)


def products(setting: Setting) -> list[float]:
    """Of this process, now; see workload.product_rates."""
    return workload.product_rates(setting)


def drop() -> None:
    """Let the side go."""
    side = _held.pop()
    if isinstance(side, Trl):
        side.folder.cleanup()
    del side
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
