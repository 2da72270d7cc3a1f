"""The C heap of a training on the CPU: what one micro-batch frees, the next one takes without asking the kernel.

glibc returns what is freed at the heap's end, and any large block, at once. The kernel then hands the same memory out
again at every micro-batch, page by page and zeroed, which took a tenth of a step (docs/performance.md).
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of malloc.h
NEVER = -1
LARGEST_BLOCK = 32 << 20  # where glibc's own thresholds end when it moves them, bytes
BLOCKS = 65536  # glibc's default


@contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """Keep freed memory for as long as this lasts; a no-op on a GPU, and where the C library is not glibc."""
    libc = ctypes.CDLL(None)
    if device.type != "cpu" or not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, NEVER)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_MAX, BLOCKS)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_BLOCK)
        libc.malloc_trim(0)
