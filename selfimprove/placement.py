"""How a run spreads over a machine: workers, shards, memory of a device, and time, by what is known of the machine.

A time is measured by an earlier round on the same kind of device, or computed from the rates of a machine file;
otherwise it is unknown, and the reason is told.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from selfimprove import memory, receipts
from selfimprove.bounds import Rules, optimizer_of
from selfimprove.errors import UserError
from selfimprove.estimates import Estimate, Survey
from selfimprove.machine_file import Hardware
from selfimprove.plan import Examined, Step
from selfimprove.recipe import Machine, Recipe
from selfimprove.stages import evaluate, generate, improve, sft, synthesize
from selfimprove.store import Run, read_json

WINDOW, SMALLEST, LARGEST, PARTS = 16_384, 256, 2_048, 8  # requests, and shards of a window


class Work(NamedTuple):
    """One kind of work of a stage; None = unknown."""

    kind: Literal["ask", "train"]
    workers: int | None  # engines, or training processes
    devices: int  # of one worker
    shards: list[int] | None  # of each call; one call is made after the other
    memory: dict[str, int] | None  # bytes of one device, by what they hold; activations are not counted


class Placement(NamedTuple):
    """A stage on a machine."""

    work: list[Work]  # none where a stage asks no model
    seconds: float | None
    how: str  # where the time is from, or why it is not known
    notes: list[str]  # who has nothing to do
    warnings: list[str]  # what does not fit


def place(
    run: Run, recipe: Recipe, examined: Sequence[Examined], survey: Survey, hardware: Hardware | None
) -> dict[str, Placement]:
    """Each step that is not done, on the machine of the recipe, by its directory."""
    if survey.rules is None:
        return {}
    on = _Machine(recipe, survey, hardware)
    return {
        directory: on.place(run, one, survey.estimates[directory])
        for one in examined
        if (directory := one.step.directory) in survey.estimates
    }


def plain(placed: Placement | None) -> dict[str, Any] | None:
    """A placement as JSON values; None of a step that is done."""
    return placed and placed._asdict() | {"work": [work._asdict() for work in placed.work]}


class _Machine:
    """A recipe's machine, and what is known of it."""

    def __init__(self, recipe: Recipe, survey: Survey, hardware: Hardware | None) -> None:
        assert survey.rules is not None
        self.recipe, self.machine, self.hardware = recipe, recipe.machine, hardware
        self.rules, self.amounts, self.bases = survey.rules, survey.amounts, survey.bases

    def place(self, run: Run, one: Examined, taken: Estimate) -> Placement:
        work = [*self._asking(one.step), *self._training(one.step)]
        seconds, how = self._seconds(run, one, taken, work)
        return Placement(work, seconds, how, _idle(work), [*self._too_many(work), *self._too_large(work)])

    # --- who works ---

    def _asking(self, step: Step) -> list[Work]:
        if not step.samples:
            return []
        try:
            requests = _requests(step, self.rules, self.amounts)
        except UserError:  # a file is gone, which the estimate says
            requests = None
        cut = None if requests is None else [shards(number) for number in requests]
        held = memory.of_engine(self.recipe, self.rules, self.hardware)
        return [Work("ask", self._engines(), self.machine.tensor_parallel, cut, held)]

    def _engines(self) -> int | None:
        if self.machine.executor != "static":
            return self.machine.workers
        told = [os.environ.get(name, "") for name in ("WORLD_SIZE", "SLURM_NTASKS")]
        known = self.hardware.ranks if self.hardware else None
        return known or next((int(number) for number in told if number.isdecimal() and int(number)), None)

    def _training(self, step: Step) -> list[Work]:
        optimizer = optimizer_of(step)
        if optimizer is None:
            return []
        held = memory.of_training(step, optimizer, self.recipe, self.rules.model)
        return [Work("train", _processes(self.machine), 1, None, held)]

    # --- how long ---

    def _seconds(self, run: Run, one: Examined, taken: Estimate, work: list[Work]) -> tuple[float | None, str]:
        if not work:
            return taken.seconds, taken.how
        basis = self.bases.get(one.step.directory)
        scaled = _measured(run, basis, taken, work, self.machine, self.hardware) if basis else None
        if scaled and scaled[0] is not None:
            return scaled
        by_rates = self._by_rates(one.step, taken, work)
        return scaled if scaled and by_rates[0] is None else by_rates

    def _by_rates(self, step: Step, taken: Estimate, work: list[Work]) -> tuple[float | None, str]:
        """By the rates of the machine file; tokens are at most, so time is at most too."""
        if self.hardware is None:
            return None, "nothing is measured yet, and the machine file has no [hardware] with rates"
        if taken.tokens is None:
            return None, taken.how
        kinds = [one.kind for one in work]
        trained = self.rules.training_tokens(step) if kinds == ["ask", "train"] else taken.tokens
        seconds = 0.0
        for one in work:
            name, rate, tokens = (
                ("training_tokens_per_s", self.hardware.training_tokens_per_s, trained)
                if one.kind == "train"
                else (
                    "generation_tokens_per_s",
                    self.hardware.generation_tokens_per_s,
                    taken.tokens - (trained if len(work) > 1 else 0),
                )
            )
            busy = _busy(one.workers, one.shards)
            if rate is None:
                return None, f"nothing is measured yet, and [hardware] has no {name}"
            if busy is None:
                return None, "static: the number of ranks is not known, [hardware] may say `ranks`"
            seconds += max(0, tokens) / (rate * busy)
        return seconds, f"by the rates of [hardware], {taken.how}"

    # --- what does not fit ---

    def _too_many(self, work: list[Work]) -> list[str]:
        if self.hardware is None or self.hardware.on_cpu:
            return []
        warnings, there = [], self.hardware.devices_per_node
        for one in work:
            if one.kind == "train":
                local, what = self.machine.num_processes, "training processes"
            elif self.machine.executor == "local":
                local, what = (
                    self.machine.workers,
                    "workers" + (f" of {one.devices} devices" if one.devices > 1 else ""),
                )
            else:
                local, what = 1, "engine"
            if local * one.devices > there:
                warnings.append(f"{local} {what} on one node need {local * one.devices} devices, and it has {there}")
        return warnings

    def _too_large(self, work: list[Work]) -> list[str]:
        if self.hardware is None:
            return []
        warnings = []
        for one in work:
            needed = memory.sharing(one.kind, self.machine, self.hardware) * sum((one.memory or {}).values())
            there = round(self.hardware.memory_gib * memory.GIB)
            if one.kind == "train" and needed > there:
                warnings.append(
                    f"training holds {needed / memory.GIB:.1f} GiB on a device, and {self.hardware.device} has"
                    f' {self.hardware.memory_gib:g} GiB: sharding = "fsdp", more processes or nodes, or an adapter'
                )
            elif one.kind == "ask" and one.memory:
                warnings += memory.tight(one.memory, self.recipe, self.rules, self.hardware)
        return warnings


def shards(requests: int) -> int:
    """The shards that the requests of one call are cut into, whatever the number of workers."""
    windows, rest = divmod(requests, WINDOW)
    return sum(
        math.ceil(rows / min(LARGEST, max(SMALLEST, math.ceil(rows / PARTS)))) for rows in [WINDOW] * windows + [rest]
    )


def _idle(work: list[Work]) -> list[str]:
    """Workers for which there are no shards."""
    return [
        f"shards for {most} at once: {one.workers - most} of {one.workers} workers have nothing to do"
        for one in work
        if one.workers and one.shards and (most := max(one.shards)) < one.workers
    ]


def _processes(machine: Machine | Mapping[str, Any]) -> int:
    found = machine if isinstance(machine, Mapping) else machine.model_dump()
    return int(found["num_processes"]) * int(found["nodes"])


def _busy(workers: int | None, shards: list[int] | None) -> float | None:
    """How many workers are busy on average; all of them where the shards are not known. None = unknown.

    `s` shards of one call take `ceil(s / workers)` turns, and the calls come one after the other.
    """
    if workers is None or not shards:
        return workers
    return sum(shards) / sum(math.ceil(number / workers) for number in shards)


def _requests(step: Step, rules: Rules, amounts: Mapping[str, float]) -> list[int] | None:
    """The requests of each call of the engine, which is cut into shards of its own; None = not known before.

    Raises:
        UserError: a file of the recipe is gone.
    """
    section: Any = step.section
    if step.stage is synthesize:
        return [section.prompts]
    if step.stage is generate:
        return [math.ceil(rules.prompts(step, amounts))] * (1 + bool(section.initial_n))
    if step.stage is improve:
        answered = [rules.seeds] if section.kind == "improver" else []
        return [*answered, math.ceil(rules.most(step, amounts))]
    if step.stage is evaluate:
        asked = [rules.count(step.inputs[name]) for name in ("heldout", "selection") if name in step.inputs]
        limits = [(b.limit, rules.count(f"file:{next(iter(b.files))}")) for b in section.benchmarks or []]
        return [*asked, *asked, *(min(limit or number, number) for limit, number in limits)]
    if step.stage is sft:
        return [rules.seeds]
    return None


def _measured(
    run: Run, basis: Examined, taken: Estimate, work: list[Work], machine: Machine, hardware: Hardware | None
) -> tuple[float | None, str]:
    """The time of an earlier round, scaled by workers; training by its processes."""
    assert basis.manifest is not None  # it is what was measured
    receipt = _receipt(run.path, basis.manifest.environment.get("receipt", ""))
    before = receipt.get("machine")
    if taken.seconds is None or not isinstance(before, Mapping):
        return None, f"{taken.how} was measured, but its receipt does not say on how many workers"
    device = _device(receipt)
    if hardware and not _same(hardware, receipt):
        return None, f"{taken.how} was measured on {device}, which says nothing about {hardware.device}"
    factors = []
    for one in work:
        factor = _share(one, before, machine, on_cpu=not (receipt.get("hardware") or {}).get("gpus"))
        if isinstance(factor, str):
            return None, f"{taken.how} was measured, but {factor}"
        factors.append(factor)
    factor = max(factors)
    mixed = "" if math.isclose(min(factors), factor) else " at most: training and asking are measured as one"
    return taken.seconds * factor, f"{taken.how}, x {factor:.3g} by workers{mixed}" if factor != 1 else taken.how


def _share(work: Work, before: Mapping[str, Any], machine: Machine, *, on_cpu: bool) -> float | str:
    """What the time of a kind of work is multiplied with on another machine, or why that is not known."""
    if on_cpu and {"local"} != {before["executor"], machine.executor}:
        return "workers of one node share its processor, and on how many nodes they are is not known"
    if work.kind == "train":
        return float(before["nodes"] / machine.nodes) if on_cpu else _processes(before) / _processes(machine)
    if on_cpu or before["executor"] == "static" == machine.executor:
        return 1.0  # the same processor; or by as many ranks
    if before["executor"] == "static" or work.workers is None:
        return "the number of static ranks is not known"
    then, now = _busy(int(before["workers"]), work.shards), _busy(work.workers, work.shards)
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
