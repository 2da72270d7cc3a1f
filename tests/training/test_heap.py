"""The kernel's own counts say whether freed memory is kept: page faults of memory used again, and what is resident.

In a process of its own, whose heap no other test has filled.
"""

import ctypes
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from selfimprove.training import heap, launch
from selfimprove.training.job import PairRow
from tests.training.conftest import job

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
BLOCKS = 256  # of a MiB each: more than glibc keeps at the heap's end
LARGE = 256 * MIB


class Seen(NamedTuple):
    """Bytes are resident ones."""

    faults: int  # of memory that was used before, in a kept heap
    resident_before: int
    resident_kept: int
    resident_after: int
    resident_large: int  # after large blocks, taken in turn, in a kept heap


def _use() -> None:
    """Take, write and free blocks, with nothing that lives on beyond them: it would keep the heap's end where it is."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    held = [ctypes.c_void_p(libc.malloc(ctypes.c_size_t(MIB))) for _ in range(BLOCKS)]
    for block in held:
        libc.memset(block, 1, ctypes.c_size_t(MIB))
    for block in held:
        libc.free(block)


def _faults(use: Callable[[], None]) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    use()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _look() -> Seen:
    before = _resident()
    with heap.kept(torch.device("cpu")):
        _use()
        faults, resident_kept = _faults(_use), _resident()
    after = _resident()
    small = []
    with heap.kept(torch.device("cpu")):
        for _ in range(8):
            torch.full((LARGE // 4,), 1.0)
            small.append(bytearray(2000))  # lies between them, if they lie in the heap
        large = _resident()
    return Seen(faults, before, resident_kept, after, large)


@pytest.fixture(scope="module")
def seen() -> Seen:
    command = [sys.executable, "-W", "ignore", "-m", "tests.training.test_heap"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return Seen(*json.loads(done.stdout))


def test_what_is_freed_is_used_again_without_a_fault(seen: Seen) -> None:
    assert seen.faults < BLOCKS * MIB / resource.getpagesize() / 16


def test_a_kept_heap_is_given_back_at_the_end(seen: Seen) -> None:
    assert seen.resident_kept > seen.resident_before + BLOCKS * MIB / 2
    assert seen.resident_after < seen.resident_before + BLOCKS * MIB / 2


@pytest.mark.parametrize(
    ("device", "functions"), [("cuda", ["mallopt", "malloc_trim"]), ("cpu", []), ("cpu", ["mallopt"])]
)
def test_a_gpu_and_other_c_libraries_leave_the_heap_alone(
    monkeypatch: pytest.MonkeyPatch, device: str, functions: list[str]
) -> None:
    libc = mock.Mock(spec=functions)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    with heap.kept(torch.device(device)):
        pass
    assert libc.mock_calls == []


def test_large_blocks_do_not_pile_up(seen: Seen) -> None:
    assert seen.resident_large < seen.resident_after + 2 * LARGE


def test_a_training_keeps_its_heap(tmp_path: Path, pairs: list[PairRow], monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[torch.device] = []

    @contextmanager
    def noted(device: torch.device) -> Iterator[None]:
        devices.append(device)
        yield
        devices.clear()

    monkeypatch.setattr(heap, "kept", noted)
    within: list[list[torch.device]] = []
    training = job(tmp_path, pairs, {"loss": {"name": "simpo"}}, epochs=1)
    launch.train(training._replace(progress=lambda done, total: within.append(list(devices))))
    assert within
    assert all(found == [torch.device("cpu")] for found in within)
    assert devices == []


if __name__ == "__main__":
    print(json.dumps(_look()))
