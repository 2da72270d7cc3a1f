"""How long the work of a stage takes on a machine: as an earlier round, or by measured rates; else it is unknown.

The reason is told with each time, and with each that is not known.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from selfimprove import receipts
from selfimprove.bounds import Rules
from selfimprove.errors import UserError
from selfimprove.estimates import Estimate
from selfimprove.execution.shard import size_for, windows
from selfimprove.machine_file import Hardware
from selfimprove.plan import Examined, Step
from selfimprove.recipe import Machine
from selfimprove.stages import improve, synthesize
from selfimprove.store import read_json


class Work(NamedTuple):
    """One kind of work of a stage; None = unknown."""

    kind: Literal["ask", "train"]
    workers: int | None  # engines, or training processes
    devices: int  # of one worker
    shards: list[int] | None  # of each call; one call is made after the other
    memory: dict[str, int] | None  # bytes of one device, by what they hold; activations are not counted


class Time(NamedTuple):
    """What a stage takes."""

    seconds: float | None
    how: str  # where the time is from, or why it is not known


def shards(requests: int) -> int:
    """The shards that the requests of one call are cut into, whatever the number of workers."""
    number = 0
    for size in windows():
        if not (rows := min(size, requests)):
            break
        number += math.ceil(rows / size_for(rows))
        requests -= rows
    return number


def processes(machine: Machine | Mapping[str, Any]) -> int:
    """Training processes of all nodes."""
    found = machine if isinstance(machine, Mapping) else machine.model_dump()
    return int(found["num_processes"]) * int(found["nodes"])


def busy(workers: int | None, shards: list[int] | None) -> float | None:
    """How many workers are busy on average; all of them where the shards are not known. None = unknown.

    `s` shards of one call take `ceil(s / workers)` turns, and the calls come one after the other.
    """
    if workers is None or not shards:
        return workers
    return sum(shards) / sum(math.ceil(number / workers) for number in shards)


def by_rates(step: Step, taken: Estimate, work: list[Work], hardware: Hardware | None, rules: Rules) -> Time:
    """By the rates of a machine file; tokens are at most, so time is at most too."""
    if hardware is None:
        return Time(None, "nothing is measured yet, and the machine file has no [hardware] with rates")
    if taken.tokens is None:
        return Time(None, taken.how)
    trained = taken.tokens if any(one.kind == "train" for one in work) else 0
    if step.stage in (synthesize, improve):  # they write with what they have trained
        trained = min(trained, rules.training_tokens(step))
    seconds = 0.0
    for one in work:
        tokens = trained if one.kind == "train" else taken.tokens - trained
        name = "training_tokens_per_s" if one.kind == "train" else "generation_tokens_per_s"
        rate, at_once = getattr(hardware, name), busy(one.workers, one.shards)
        if not tokens:  # what a search for beta asks for is scored, not written
            continue
        if rate is None:
            return Time(None, f"nothing is measured yet, and [hardware] has no {name}")
        if at_once is None:
            return Time(None, "the number of static ranks is not known, [hardware] may say `ranks`")
        seconds += tokens / (rate * at_once)
    return Time(seconds, f"by the rates of [hardware], {taken.how}")


def measured(
    run: Path, basis: Examined, taken: Estimate, work: list[Work], machine: Machine, hardware: Hardware | None
) -> Time:
    """The time of an earlier round, scaled by workers; training by its processes."""
    assert basis.manifest is not None  # it is what was measured
    receipt = _receipt(run, basis.manifest.environment.get("receipt", ""))
    before = receipt.get("machine")
    if taken.seconds is None or not isinstance(before, Mapping):
        return Time(None, f"{taken.how} was measured, but its receipt does not say on how many workers")
    device = _device(receipt)
    if hardware and not _same(hardware, receipt):
        return Time(None, f"{taken.how} was measured on {device}, which says nothing about {hardware.device}")
    factors = []
    for one in work:
        factor = _share(one, before, machine, on_cpu=not (receipt.get("hardware") or {}).get("gpus"))
        if isinstance(factor, str):
            return Time(None, f"{taken.how} was measured, but {factor}")
        factors.append(factor)
    factor = max(factors)
    mixed = "" if math.isclose(min(factors), factor) else " at most: training and asking are measured as one"
    return Time(taken.seconds * factor, taken.how if factor == 1 else f"{taken.how}, x {factor:.3g} by workers{mixed}")


def _share(work: Work, before: Mapping[str, Any], machine: Machine, *, on_cpu: bool) -> float | str:
    """What the time of a kind of work is multiplied with on another machine, or why that is not known."""
    if on_cpu and {"local"} != {before["executor"], machine.executor}:
        return "workers of one node share its processor, and on how many nodes they are is not known"
    if on_cpu:
        return 1.0  # the same processor
    if work.kind == "train":
        return processes(before) / processes(machine)
    if before["executor"] == "static" == machine.executor:
        return 1.0  # by as many ranks
    if before["executor"] == "static" or work.workers is None:
        return "the number of static ranks is not known"
    then, now = busy(int(before["workers"]), work.shards), busy(work.workers, work.shards)
    return (then or 1) / (now or 1)


def _receipt(run: Path, name: str) -> dict[str, Any]:
    try:
        found = read_json(run / receipts.FOLDER / f"{name}.json")
    except (UserError, FileNotFoundError):  # damaged or gone: verify says so
        return {}
    return found if isinstance(found, dict) else {}


def _device(receipt: Mapping[str, Any]) -> str:
    """The device of a receipt, as the driver calls it."""
    told = receipt.get("hardware") or {}
    gpus = told.get("gpus") or []
    return str(gpus[0].get("name")) if gpus else str(told.get("cpu"))


def _same(hardware: Hardware, receipt: Mapping[str, Any]) -> bool:
    """Whether a receipt was written on such a device: all words of its name are in the driver's."""
    gpus = (receipt.get("hardware") or {}).get("gpus") or []
    if hardware.on_cpu or not gpus:
        return hardware.on_cpu and not gpus
    named = _device(receipt).lower()
    return all(word in named for word in hardware.device.lower().split())
