"""Ours against one of TRL's settings: first the same numbers, then the time, repetitions in turn."""

import math
import statistics
from typing import NamedTuple

import numpy as np

from selfimprove.training.job import PairRow, Tree
from selfimprove.training.packing import size
from tests.bench import apart, workload
from tests.bench.apart import Worker
from tests.bench.sides import Ours, Trl
from tests.bench.workload import Setting


class Baseline(NamedTuple):
    """One of TRL's settings, and what ours does beside it."""

    name: str
    online: bool = False
    compact: bool = False
    device_batch: int | None = None  # unset = the setting's
    pairs: int | None = None  # per optimiser step, on both sides; unset = the setting's
    responses: int = 2  # per prompt; more than two mean all pairs of them
    checkpointing: bool = False  # on both sides
    ours_online: bool = False

    def prompts(self, setting: Setting) -> int:
        """Of a step."""
        return (self.pairs or setting.pairs) // math.comb(self.responses, 2)

    def trl(self, setting: Setting, rows: list[PairRow]) -> Trl:
        """Theirs."""
        pairs = self.pairs or setting.pairs
        return Trl(
            setting,
            rows,
            online=self.online,
            compact=self.compact,
            device_batch=self.device_batch or min(setting.device_batch, pairs),
            pairs=pairs,
            checkpointing=self.checkpointing,
        )

    def ours(self, setting: Setting, rows: list[PairRow]) -> Ours:
        """At the same random weights."""
        return Ours(setting, rows, online=self.ours_online, checkpointing=self.checkpointing)


class Result(NamedTuple):
    """A comparison; one entry per repetition where it is a list."""

    baseline: Baseline
    setting: Setting
    ratios: list[float]  # TRL's seconds over ours
    theirs: list[float]  # seconds of a step
    ours: list[float]
    rates: list[float]  # ours, needed FLOP/s
    peaks: list[float]  # of matrix products beside each of our steps, FLOP/s
    best_peak: float  # the most that any product reached before or after any of them
    pairs: int  # of a step
    tokens: float  # distinct ones of a step, mean
    max_logp_diff: float
    grad_rel_diff: float
    loss_diff: float

    @property
    def shares(self) -> list[float]:
        """Ours over the peak beside the step, since a shared machine wavers from step to step."""
        return [rate / peak for rate, peak in zip(self.rates, self.peaks, strict=True)]

    @property
    def shares_of_best(self) -> list[float]:
        """Ours over the best of all repetitions, which the machine may not have reached again."""
        return [rate / self.best_peak for rate in self.rates]

    def entry(self) -> dict[str, object]:
        """For OUT=FILE.json."""
        return {
            "vocab": self.setting.vocab,
            "baseline": self.baseline.name,
            "ratio": {
                "min": min(self.ratios),
                "median": statistics.median(self.ratios),
                "max": max(self.ratios),
            },
            "max_logp_diff": self.max_logp_diff,
            "grad_rel_diff": self.grad_rel_diff,
            "peak_share": statistics.median(self.shares),
        }


def baselines(setting: Setting, every: bool) -> list[Baseline]:
    """TRL's three settings, and where `every` is asked for its batch sizes, four responses, and equal terms."""
    found = [
        Baseline("trl default", online=True),
        Baseline("trl precomputed"),
        Baseline("trl precomputed compact", compact=True),
    ]
    if every:
        for size_ in setting.batches:
            if size_ != setting.device_batch:
                found.append(Baseline(f"trl batch {size_}", device_batch=size_, pairs=max(size_, setting.pairs)))
        four = max(2, setting.pairs // 6) * 6
        found += [
            Baseline("trl pairs of 4 responses", device_batch=6, pairs=four, responses=4),
            Baseline("trl default, ours online too", online=True, ours_online=True),
            Baseline("trl precomputed, both checkpointing", checkpointing=True),
        ]
    return found


def compare(setting: Setting, baseline: Baseline, repeats: int, theirs: Worker, ours: Worker) -> Result:
    """Measure one baseline. Each repetition is one optimiser step on pairs of its own, the same on both sides."""
    prompts = baseline.prompts(setting)
    trees = workload.trees(setting, prompts * (repeats + 1), baseline.responses)
    steps: list[tuple[list[Tree], list[PairRow]]] = []
    for begin in range(0, len(trees), prompts):
        part = trees[begin : begin + prompts]
        steps.append((part, workload.all_pairs(part)))
    steps = [
        (part, [row._replace(pair_id=f"{n}/{row.pair_id}") for row in rows]) for n, (part, rows) in enumerate(steps)
    ]
    given = [row for _, rows in steps for row in rows]
    theirs.do(apart.build, baseline.trl, setting, given)
    ours.do(apart.build, baseline.ours, setting, given)
    expected, found = (side.do(apart.check, steps[0][1]) for side in (theirs, ours))
    loss_diff, max_logp_diff, grad_rel_diff = _differences(expected, found)
    for side in (theirs, ours):
        side.do(apart.step, steps[0][1][:1])  # allocates the optimiser's moments
    seconds: list[tuple[float, float]] = []
    products: list[tuple[list[float], list[float]]] = []
    for number, (_, rows) in enumerate(steps[1:]):
        first = theirs.do(apart.step, rows) if number % 2 == 0 else None
        before = ours.do(apart.products, setting)
        own = ours.do(apart.step, rows)
        products.append((before, ours.do(apart.products, setting)))
        seconds.append((theirs.do(apart.step, rows) if first is None else first, own))
    for side in (theirs, ours):
        side.do(apart.drop)
    flops = [workload.needed_flops(setting, part) for part, _ in steps[1:]]
    return Result(
        baseline=baseline,
        setting=setting,
        ratios=[a / b for a, b in seconds],
        theirs=[a for a, _ in seconds],
        ours=[b for _, b in seconds],
        rates=[f / b for f, (_, b) in zip(flops, seconds, strict=True)],
        peaks=[workload.peak_flops(*beside) for beside in products],
        best_peak=max(rate for beside in products for rates in beside for rate in rates),
        pairs=len(steps[0][1]),
        tokens=statistics.mean(sum(map(size, part)) for part, _ in steps[1:]),
        max_logp_diff=max_logp_diff,
        grad_rel_diff=grad_rel_diff,
        loss_diff=loss_diff,
    )


def _differences(expected: apart.Seen, found: apart.Seen) -> tuple[float, float, float]:
    """Of the loss, the largest of a log-prob, and of the gradient as a whole, relative."""
    (loss, logps, gradient), (other_loss, other_logps, other) = expected, found
    distance = np.linalg.norm(gradient.astype(np.float64) - other) / np.linalg.norm(gradient.astype(np.float64))
    return abs(loss - other_loss), float(np.abs(logps - other_logps).max()), float(distance)


def best_batch(results: list[Result]) -> Result | None:
    """The per-device batch at which TRL comes closest, under a name of its own; none where only one was tried."""
    plain = [r for r in results if r.baseline.name == "trl precomputed" or r.baseline.name.startswith("trl batch")]
    if len(plain) < 2:
        return None
    best = min(plain, key=lambda r: statistics.median(r.ratios))
    batch = best.baseline.device_batch or best.setting.device_batch
    return best._replace(baseline=best.baseline._replace(name=f"trl best batch ({batch})"))
