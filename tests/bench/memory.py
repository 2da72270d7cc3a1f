"""Peak memory of training, each variant in a process of its own: what one freed, another would not count.

On CPU it is the resident set's high-water mark, set back after construction; on a GPU the allocator's peak. Tensors get
pages of their own, given back when they are freed, so that holes in the heap do not count on either side; KEPT counts
them, with the heap as our trainer keeps it.
"""

import ctypes
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch

from selfimprove.training import heap
from tests.bench import workload
from tests.bench.sides import Ours, Trl
from tests.bench.workload import Setting

ROOT = Path(__file__).parents[2]
OURS, KEPT = "ours", "ours, heap kept"
VARIANTS = {
    OURS: {},
    KEPT: {},
    "trl default": {"online": True},
    "trl precomputed": {},
    "trl precomputed compact": {"compact": True},
}


class Peak(NamedTuple):
    """MiB."""

    before: float  # model, reference and data are there
    peak: float  # over two optimiser steps


def measure(variant: str, setting: Setting, pairs: int) -> Peak:
    """Two steps of `pairs` pairs each, in a fresh process."""
    job = json.dumps([variant, setting._asdict(), pairs])
    command = [sys.executable, "-m", "tests.bench.memory", job]
    own_pages = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(256 << 10)}
    done = subprocess.run(command, cwd=ROOT, env=own_pages, stdout=subprocess.PIPE, text=True, check=True)
    return Peak(*json.loads(done.stdout.splitlines()[-1]))


def _run(variant: str, setting: Setting, pairs: int) -> Peak:
    torch.set_num_threads(1)
    rows = workload.all_pairs(workload.trees(setting, 2 * pairs, 2))
    side: Ours | Trl
    if variant in (OURS, KEPT):
        side = Ours(setting, rows)
    else:
        side = Trl(setting, rows, device_batch=min(setting.device_batch, pairs), pairs=pairs, **VARIANTS[variant])
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident()
    side.step(rows[:pairs])
    side.step(rows[pairs:])
    return Peak(before, torch.cuda.max_memory_allocated() / 2**20 if setting.device == "cuda" else _resident())


def _resident() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    name, fields, number = json.loads(sys.argv[1])
    shape = Setting(**fields)
    with heap.kept(torch.device(shape.device)) if name == KEPT else nullcontext():
        print(json.dumps(_run(name, shape, number)))
