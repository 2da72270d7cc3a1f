"""The kernel's own counts say whether freed memory is kept: page faults of memory used again, and what is resident."""

import resource
from pathlib import Path

import torch

from selfimprove.training import heap

CPU = torch.device("cpu")
BYTES = 96 << 20  # beyond what glibc keeps by itself


def _use() -> int:
    """Faults of taking, writing and freeing one block."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.full((BYTES // 4,), 1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_what_is_freed_is_used_again_without_a_fault() -> None:
    least = BYTES // (2 << 20)  # even in huge pages
    assert _use() >= least
    with heap.kept(CPU):
        _use()
        assert _use() < least / 4
    assert _use() >= least


def test_a_kept_heap_is_given_back_at_the_end() -> None:
    before = _resident()
    with heap.kept(CPU):
        _use()
        assert _resident() > before + BYTES // 2
    assert _resident() < before + BYTES // 2


def test_a_gpu_leaves_the_heap_alone() -> None:
    with heap.kept(torch.device("cuda")):
        _use()
        assert _use() >= BYTES // (2 << 20)
