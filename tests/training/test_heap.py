"""The kernel's own counts say whether freed memory is kept: page faults of memory used again, and what is resident."""

import resource
from pathlib import Path

import torch

from selfimprove.training import heap, launch
from selfimprove.training.job import PairRow
from tests.training.conftest import job

CPU = torch.device("cpu")
BYTES = 256 << 20  # far beyond the 64 MiB that glibc keeps by itself


def _faults() -> int:
    """Of taking, writing and freeing one block; the least of three tries, as other things may grow the heap."""
    counts = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.full((BYTES // 4,), 1.0)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(counts)


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_what_is_freed_is_used_again_without_a_fault() -> None:
    plain = _faults()
    with heap.kept(CPU):
        assert _faults() < plain / 4
    assert _faults() > plain / 2


def test_a_kept_heap_is_given_back_at_the_end() -> None:
    before = _resident()
    with heap.kept(CPU):
        _faults()
        assert _resident() > before + BYTES // 2
    assert _resident() < before + BYTES // 2


def test_a_gpu_leaves_the_heap_alone() -> None:
    plain = _faults()
    with heap.kept(torch.device("cuda")):
        assert _faults() > plain / 2


def test_a_training_keeps_its_heap(tmp_path: Path, pairs: list[PairRow]) -> None:
    plain = _faults()
    within: list[int] = []
    training = job(tmp_path, pairs, {"loss": {"name": "simpo"}}, epochs=1)
    launch.train(training._replace(progress=lambda done, total: within.append(_faults())))
    assert within
    assert max(within) < plain / 4
    assert _faults() > plain / 2
