"""Waiting for a GPU's memory, with a driver library that is played."""

import os
from types import SimpleNamespace

import pytest

from selfimprove.engine import device_memory
from selfimprove.engine.device_memory import Nvml, wait

GIB = 2**30


class Played:
    """The part of pynvml that is used: memory is given back look by look."""

    def __init__(self, free, running=()):
        self.free, self.running, self.looks = list(free), running, 0

    def nvmlDeviceGetHandleByUUID(self, uuid):  # NVML's name
        assert uuid == "GPU-abc"
        return "handle"

    def nvmlDeviceGetMemoryInfo(self, handle):
        assert handle == "handle"
        self.looks += 1
        return SimpleNamespace(free=self.free[min(self.looks, len(self.free)) - 1], total=80 * GIB)

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.running]


def test_memory_that_comes_back_is_waited_for():
    played, slept = Played([1 * GIB, 2 * GIB, 79 * GIB]), []
    assert wait(0.85, set(), Nvml(played, "abc"), slept.append) is None
    assert (played.looks, len(slept)) == (3, 2)


def test_memory_that_stays_away_is_waited_for_no_longer_than_said_and_its_holders_are_named():
    slept = []
    played = Played([3 * GIB], [(os.getpid(), 2 * GIB), (2**22 + 5, 70 * GIB), (2**22 + 6, None)])
    said = wait(0.5, {os.getpid()}, Nvml(played, "GPU-abc"), slept.append)
    assert sum(slept) == pytest.approx(device_memory.PATIENCE)
    assert said is not None
    assert said.startswith("of the GPU's 81920 MiB only 3072 are free, 40960 are wanted; held by process ")
    assert f"process {2**22 + 5} (a process of another user or container, 71680 MiB)" in said
    assert f"process {2**22 + 6} (a process of another user or container)" in said
    assert str(os.getpid()) not in said.partition("held by")[2].split("(")[0]
    assert said.count("process of another") == 2


def test_where_nobody_can_say_who_holds_it():
    assert "who holds them is not known" in str(wait(0.9, set(), Nvml(Played([0]), "abc"), lambda seconds: None))


def test_without_a_gpu_nothing_is_waited_for():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert device_memory.device() is None
    assert wait(1.0, set(), None, lambda seconds: pytest.fail("it waited")) is None


def test_our_own_processes_are_no_foreigners():
    assert os.getpid() in device_memory.family()
