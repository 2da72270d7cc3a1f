"""What the rest of a run will take: measured by its own earlier rounds, or a bound where nothing is measured yet.

A stage is measured by the nearest round that has made it, scaled by what is known to differ: rows that come in, n,
epochs. Without any, what needs no measuring is computed, as prompts x n x max_tokens; time is then unknown.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from selfimprove import bounds
from selfimprove.errors import UserError
from selfimprove.plan import BASE, Examined, Sources
from selfimprove.recipe import Recipe
from selfimprove.stages import evaluate, generate, improve, label, synthesize, train
from selfimprove.store import Manifest, Run, read_lines


class Estimate(NamedTuple):
    """What a stage will take; None = unknown, never zero."""

    tokens: int | None
    seconds: float | None
    disk_bytes: int | None  # the most that it needs while it is made
    memory_bytes: int | None  # of the training, or of the engine
    usd: float | None  # paid to servers; 0 where none is asked
    how: str  # by what round, or by which rule
    passing_bytes: int = 0  # of disk_bytes, what is gone when the stage is done: checkpoints of the training


class Total(NamedTuple):
    """The sum of what is known; of memory the most at once."""

    tokens: int
    seconds: float
    disk_bytes: int
    memory_bytes: int
    usd: float
    unknown: dict[str, int]  # of each, how many stages it is not known of


class Survey(NamedTuple):
    """Estimates of the steps that are not done, and what they rest on; all by directory."""

    estimates: dict[str, Estimate]
    amounts: dict[str, float]  # what comes out of each step, made or not: prompts, completions, pairs
    bases: dict[str, Examined]  # the steps that they are measured by
    rules: bounds.Rules | None  # None where all is done


def estimate(run: Run, recipe: Recipe, examined: Sequence[Examined]) -> dict[str, Estimate]:
    """What each step will take that is not done, by its directory."""
    return survey(run, recipe, examined).estimates


def survey(run: Run, recipe: Recipe, examined: Sequence[Examined]) -> Survey:
    """What each step will take that is not done, and by what that is known."""
    found: dict[str, Estimate] = {}
    if all(one.status == "done" for one in examined):
        return Survey(found, {}, {}, None)
    measured = [e for e in examined if e.manifest and "section" in e.manifest.ingredients]
    made = {e.step.directory: _came_out(e.manifest, e) for e in measured if e.manifest}
    amounts: dict[str, float] = {}
    bases: dict[str, Examined] = {}
    sources = Sources(run, recipe)
    model = bounds.Model.of(sources)
    rules = bounds.Rules(recipe, sources, model)
    for one in examined:
        directory = one.step.directory
        if one.status == "done" and one.manifest:
            amounts[directory] = _came_out(one.manifest, one)
            continue
        basis = _basis(one, measured)
        if basis is None or basis.manifest is None:
            found[directory], amounts[directory] = _bound(one, rules, amounts)
            continue
        bases[directory] = basis
        ratio = _ratio(one, basis, basis.manifest, amounts, made)
        amounts[directory] = _came_out(basis.manifest, basis) * ratio.rows
        found[directory] = _scaled(run, recipe, one, basis, ratio, model)
    return Survey(found, amounts, bases, rules)


def total(estimates: Iterable[Estimate]) -> Total:
    """All of them together; disk as it stands at the end, with the largest checkpoints on the way."""
    every = list(estimates)
    passing = max((e.passing_bytes for e in every), default=0)
    names = ("tokens", "seconds", "disk_bytes", "memory_bytes", "usd")
    return Total(
        sum(e.tokens or 0 for e in every),
        sum(e.seconds or 0.0 for e in every),
        sum((e.disk_bytes or 0) - e.passing_bytes for e in every) + passing,
        max((e.memory_bytes or 0 for e in every), default=0),
        sum(e.usd or 0.0 for e in every),
        {name: count for name in names if (count := sum(getattr(e, name) is None for e in every))},
    )


# --- by an earlier round -----------------------------------------------------------------------------------------


class Ratio(NamedTuple):
    """A step against the one that it is measured by."""

    rows: float  # of what comes out
    work: float  # of tokens and seconds


def _basis(one: Examined, measured: Iterable[Examined]) -> Examined | None:
    """The nearest step of the same stage that was made: rounds by rounds, the last one before it first."""
    same = [m for m in measured if m.step.stage is one.step.stage]
    rounds = [m for m in same if (m.step.iteration > BASE) == (one.step.iteration > BASE)] or same

    def far(other: Examined) -> tuple[bool, bool, int]:
        first = (other.step.iteration == 1) != (one.step.iteration == 1)  # round 1 has things to do once
        return first, other.step.iteration > one.step.iteration, abs(other.step.iteration - one.step.iteration)

    return min(rounds, key=far, default=None)


def _came_out(manifest: Manifest, one: Examined) -> float:
    """How many rows a stage has made for the next one."""
    if one.step.stage is label:
        return float(manifest.metrics.get("pairs", manifest.rows.rows_out))
    return float(manifest.rows.rows_out)


def _ratio(
    one: Examined, basis: Examined, manifest: Manifest, amounts: Mapping[str, float], made: Mapping[str, float]
) -> Ratio:
    """How much more there is to do than there was."""
    old, new = manifest.ingredients["section"], one.step.section.model_dump(exclude_none=True)
    stage, rows_in = one.step.stage, manifest.rows.rows_in
    into = _into(one, amounts)
    if stage is synthesize:
        rows = _share(new, old, "prompts")
    elif stage is generate:
        n_old, n_new = (section["n"] + section.get("initial_n", 0) for section in (old, new))
        rows = n_new / n_old if into is None else into * n_new / max(1, rows_in)
    elif stage is improve:
        rows = _share(new, old, "n")
    elif stage is evaluate:
        rows = (1 + new["n"]) / (1 + old["n"])
    elif stage is train and "replay" not in new:
        rows = 1.0 if into is None else into / max(1, rows_in)
    elif stage is label:
        before = sum(made.get(d, 0) for d in basis.step.inputs.values() if _answers(d))
        now = sum(amounts.get(d, 0) for d in one.step.inputs.values() if _answers(d))
        rows = now / before if before and now else 1.0
    else:
        rows = 1.0
    return Ratio(rows, rows * _passes(new) / _passes(old))


def _answers(directory: str) -> bool:
    return directory.endswith(("-generate", "-improve"))


def _into(one: Examined, amounts: Mapping[str, float]) -> float | None:
    """The prompts or pairs that come in from the run; None where they come from outside."""
    found = [
        amounts[d] for name, d in one.step.inputs.items() if name.startswith(("prompts", "pairs")) and d in amounts
    ]
    return sum(found) if found else None


def _share(new: Mapping[str, Any], old: Mapping[str, Any], name: str) -> float:
    return float(new[name]) / float(old[name])


def _passes(section: Mapping[str, Any]) -> float:
    """Epochs of the training, those of a search's trials too; 1 where nothing is trained."""
    trained = [section[name] for name in ("optimizer", "generator", "improver") if name in section]
    trials = len(section["search"]["betas"]) if "search" in section else 0
    return float(trained[0]["epochs"] * (1 + trials)) if trained else 1.0


def _scaled(
    run: Run, recipe: Recipe, one: Examined, basis: Examined, ratio: Ratio, model: bounds.Model | None
) -> Estimate:
    manifest, step = basis.manifest, one.step
    assert manifest is not None  # it is what was measured
    weights = sum(o.bytes for o in manifest.outputs if "/" in o.path)  # model directories inside the artifact
    steps = sum(o.bytes for o in manifest.outputs if o.path.endswith("metrics.jsonl"))  # a line for each
    rows = sum(o.bytes for o in manifest.outputs if "/" not in o.path) - steps
    tokens, how = manifest.tokens, f"as {basis.step.directory}"
    optimizer = bounds.optimizer_of(step)
    if optimizer is None and weights:  # round 1 of synthesize has trained the generator, the others take it over
        tokens -= manifest.metrics.get(f"{synthesize.GENERATOR} tokens", 0)
        weights, how = 0, f"{how} at most, which trained the generator too"
    trained = max((v for k, v in manifest.metrics.items() if k.endswith(" rows") and isinstance(v, int)), default=0)
    every = recipe.machine.checkpoint_steps
    passing = model.checkpoints(optimizer, trained * ratio.rows, every) if optimizer and model else 0
    asked = manifest.metrics.get("servers", {})
    spent = sum(float(server["usd"]) for server in asked.values()) * ratio.work if asked else None
    return Estimate(
        tokens=round(tokens * ratio.work),
        seconds=manifest.seconds * ratio.work,
        disk_bytes=round(rows * ratio.rows + (steps * ratio.work if optimizer else 0)) + weights + passing,
        memory_bytes=(_peak(run.path / basis.step.directory) if optimizer else None)
        or bounds.memory(step, recipe, model),
        usd=spent if step.servers else 0.0,
        how=how if math.isclose(ratio.work, 1.0) else f"{how}, x {ratio.work:.2g}",
        passing_bytes=passing,
    )


def _peak(directory: Path) -> int | None:
    """The most memory that a training of an artifact has used; None where none is told."""
    peaks: list[float] = []
    for file in sorted(directory.glob("*metrics.jsonl")):
        try:
            told = [line.get("peak_memory_mib") for line in read_lines(file)]
        except UserError:  # damaged: verify names it
            return None
        peaks += [one for one in told if isinstance(one, int | float)]
    return round(max(peaks) * 2**20) if peaks else None


# --- by rules ----------------------------------------------------------------------------------------------------


def _bound(one: Examined, rules: bounds.Rules, amounts: Mapping[str, float]) -> tuple[Estimate, float]:
    """The most that a step takes, and the most that comes out of it."""
    try:
        most = rules.bound(one.step, amounts)
        found = Estimate(most.tokens, None, most.disk_bytes, most.memory_bytes, most.usd, most.how, most.passing_bytes)
        return found, rules.most(one.step, amounts)
    except UserError as error:  # a file is gone: the reason of the step says so too
        return Estimate(None, None, None, None, None if one.step.servers else 0.0, error.message), 0.0
