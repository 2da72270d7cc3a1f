"""Memory of a GPU: wait until what ended or fell asleep has really given it back, and say who else holds some.

A process that has ended may hold its memory for seconds more, until the driver has torn it down. The numbers come from
NVML, by the module pynvml of nvidia-ml-py where it is installed, else from the CUDA runtime, which knows no holders.
"""

import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, Protocol

import psutil

PATIENCE = 30.0  # seconds that memory is waited for
SLEEPERS = 0.05  # share of the memory that an engine keeps when it sleeps: its CUDA context
PAUSE = 0.25  # seconds between looks


class Holding(NamedTuple):
    """A process and what it holds of the device's memory."""

    pid: int
    command: str
    mib: int | None  # None: in a container, where the driver does not say


class Device(Protocol):
    """What is asked about a GPU."""

    def free(self) -> tuple[int, int]:
        """Bytes free and bytes in all."""

    def holders(self) -> list[Holding]:
        """The processes that hold some; empty where that cannot be known."""


def device() -> Device | None:
    """The GPU that CUDA calls number 0; None on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    if importlib.util.find_spec("pynvml"):
        nvml = importlib.import_module("pynvml")
        try:
            nvml.nvmlInit()
            return Nvml(nvml, str(torch.cuda.get_device_properties(0).uuid))
        except nvml.NVMLError:  # no driver library, or a MIG slice, which NVML knows by another name
            pass
    return Runtime()


class Nvml:
    """See Device.

    Args:
        nvml: the module pynvml, initialised.
        uuid: of the device, as CUDA has it, without "GPU-" before it.
    """

    def __init__(self, nvml: Any, uuid: str) -> None:
        self._nvml = nvml
        self._handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")

    def free(self) -> tuple[int, int]:
        """See Device."""
        found = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        return int(found.free), int(found.total)

    def holders(self) -> list[Holding]:
        """See Device."""
        found = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        return [
            Holding(one.pid, _command(one.pid), None if one.usedGpuMemory is None else one.usedGpuMemory >> 20)
            for one in found
        ]


class Runtime:
    """See Device."""

    def free(self) -> tuple[int, int]:
        """See Device."""
        import torch

        free, total = torch.cuda.mem_get_info(0)
        return free, total

    def holders(self) -> list[Holding]:
        """See Device."""
        return []


def wait(
    share: float, own: Collection[int], gpu: Device | None, sleep: Callable[[float], None] = time.sleep
) -> str | None:
    """Wait until a share of the memory is free, PATIENCE at most.

    Args:
        share: of all its memory, in (0, 1].
        own: process ids of ours, which are no foreigners.
        gpu: the device; None = there is none, and nothing is waited for.
        sleep: takes the seconds between looks.

    Returns:
        One sentence where the memory is not free after all, naming the foreign processes; None where it is.
    """
    if gpu is None:
        return None
    for _ in range(int(PATIENCE / PAUSE)):
        free, total = gpu.free()
        if free >= share * total:
            return None
        sleep(PAUSE)
    free, total = gpu.free()
    if free >= share * total:
        return None
    foreign = [one for one in gpu.holders() if one.pid not in own]
    named = ", ".join(
        f"process {one.pid} ({one.command}" + (f", {one.mib} MiB)" if one.mib is not None else ")") for one in foreign
    )
    return f"of the GPU's {total >> 20} MiB only {free >> 20} are free, {int(share * total) >> 20} are wanted" + (
        f"; held by {named}" if named else "; who holds them is not known"
    )


def settle(share: float) -> None:
    """Before something takes the device: wait for a share of its memory, and say on stderr who holds it otherwise.

    What comes next may need less than was waited for, so that it is tried all the same.
    """
    gpu = device()
    if gpu is not None and (said := wait(share, family(), gpu)):
        print(said, file=sys.stderr)


def family() -> set[int]:
    """The ids of this process and of all below it."""
    own = psutil.Process(os.getpid())
    return {own.pid, *(child.pid for child in own.children(recursive=True))}


def _command(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())[:80] or "a process of another user"
    except psutil.Error:  # of another container: the number says nothing here
        return "a process of another user or container"
