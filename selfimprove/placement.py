"""How a run spreads over a machine: workers, shards, memory of a device, time, and what does not fit."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from selfimprove import memory
from selfimprove.bounds import Rules, optimizer_of
from selfimprove.errors import UserError
from selfimprove.estimates import Estimate, Survey
from selfimprove.machine_file import Hardware
from selfimprove.pace import Time, Work, by_rates, measured, processes, shards
from selfimprove.plan import Examined, Step
from selfimprove.recipe import Recipe
from selfimprove.stages import evaluate, generate, improve, sft, synthesize
from selfimprove.store import Run


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
        time = self._time(run, one, taken, work)
        return Placement(work, time.seconds, time.how, _idle(work), [*self._too_many(work), *self._too_large(work)])

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
        return [Work("train", processes(self.machine), 1, None, held)]

    def _time(self, run: Run, one: Examined, taken: Estimate, work: list[Work]) -> Time:
        if not work:
            return Time(taken.seconds, taken.how)
        basis = self.bases.get(one.step.directory)
        scaled = measured(run.path, basis, taken, work, self.machine, self.hardware) if basis else None
        if scaled and scaled.seconds is not None:
            return scaled
        rated = by_rates(one.step, taken, work, self.hardware, self.rules)
        return scaled if scaled and rated.seconds is None else rated

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


def _idle(work: list[Work]) -> list[str]:
    """Workers for which there are no shards."""
    return [
        f"shards for {most} at once: {one.workers - most} of {one.workers} workers have nothing to do"
        for one in work
        if one.workers and one.shards and (most := max(one.shards)) < one.workers
    ]


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
