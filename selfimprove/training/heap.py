"""The C heap of a training on the CPU: what one micro-batch frees, the next one takes without asking the kernel.

glibc returns what is freed at the heap's end at once. The kernel then hands the same memory out again at every
micro-batch, page by page and zeroed, which takes a tenth of a step (docs/performance.md). Blocks beyond 32 MiB stay
mappings of their own: torch asks for aligned memory, for which glibc before 2.38 does not take the very block of that
size that was just freed, so that such blocks would pile up in a kept heap.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
NEVER = -1
LARGEST_BLOCK = 32 << 20  # bytes in the heap; where glibc's own threshold ends when it moves it


@contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """Keep freed memory for as long as this lasts; a no-op on a GPU, and where the C library is not glibc."""
    libc = ctypes.CDLL(None)
    if device.type != "cpu" or not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)
    libc.mallopt(M_TRIM_THRESHOLD, NEVER)
    try:
        yield
    finally:
        libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_BLOCK)  # glibc's own end again
        libc.malloc_trim(0)
