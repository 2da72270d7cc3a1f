"""What a run looks like from outside: its state and scores."""

from typing import Any, NamedTuple

from selfimprove import collected
from selfimprove.errors import UserError
from selfimprove.evaluation import splits
from selfimprove.plan import BASE, CONTROL_EVALUATE, SFT_EVALUATE, Step, examine, steps
from selfimprove.recipe import Recipe
from selfimprove.stages import gate
from selfimprove.store import Run, read_json


def read_scores(run: Run, step: Step) -> dict[str, Any] | None:
    """scores.json of an evaluation; None for other stages and where it is not published."""
    path = run.path / step.directory / "scores.json"
    return read_json(path) if path.is_file() else None


def read_decision(run: Run, step: Step) -> dict[str, Any] | None:
    """gate.json of a gate; None for other stages and where it is not published."""
    path = run.path / step.directory / gate.FILE
    return read_json(path) if step.stage is gate and path.is_file() else None


def last_decision(run: Run, chosen: Recipe) -> tuple[int, dict[str, Any]]:
    """The iteration that a gate decided on last, and gate.json.

    Raises:
        UserError: the recipe has no gate, or it has not decided yet.
    """
    if chosen.gate is None:
        raise UserError(
            f"run '{run.name}' has no gate",
            'add "gate" to the recipe\'s stages, a section [gate] and data.selection (JSONL like data.heldout, other '
            "prompts); then a new run: selfimprove iterate RECIPE --run NAME",
        )
    decided = [(step.iteration, told) for step in steps(chosen) if (told := read_decision(run, step))]
    if not decided:
        raise UserError(f"the gate of run '{run.name}' has not decided yet", f"selfimprove resume {run.name}")
    return decided[-1]


class Standing(NamedTuple):
    """Which iterations a run's links are for."""

    latest: int  # the last evaluated one
    best: int  # the last one that a gate promoted (0: none was); without a gate, of the highest sampled accuracy


def standing(run: Run, chosen: Recipe) -> Standing | None:
    """The latest and the best iteration; None while no iteration is evaluated."""
    found = standings(run, chosen)
    return found[-1] if found else None


def standings(run: Run, chosen: Recipe) -> list[Standing]:
    """The latest and the best iteration after each published evaluation or gate of an iteration, in order."""
    values, promoted, found = {}, BASE, []
    for step in steps(chosen):
        scores, decision = read_scores(run, step), read_decision(run, step)
        if step.iteration > BASE and scores:
            values[step.iteration] = scores["scores"][splits.SAMPLED]["value"]
        if decision:
            promoted = int(decision["best"])
        if values and (scores or decision):
            best = promoted if chosen.gate else max(values, key=lambda number: values[number])
            found.append(Standing(max(values), best))
    return found


def summary(run: Run, chosen: Recipe) -> dict[str, Any]:
    """The content of `status --json`; see docs/artifacts.md."""
    state = run.read_state()
    iterations: dict[int, dict[str, Any]] = {}
    beside: dict[str, dict[str, Any]] = {}  # what was evaluated beside the base and the iterations' policies
    for examined in examine(run, chosen):
        step, manifest = examined.step, examined.manifest
        entry = iterations.setdefault(step.iteration, {"iteration": step.iteration, "stages": [], "scores": {}})
        status = {"done": "done", "to do": "missing", "stale": "stale"}[examined.status]
        if status == "missing" and state and (state.iteration, state.stage) == (step.iteration, step.name):
            status = state.state if state.state in ("running", "failed") else status
        entry["stages"].append(
            {
                "name": step.name,
                "state": status,
                "rows_in": manifest.rows.rows_in if manifest else None,
                "rows_out": manifest.rows.rows_out if manifest else None,
                "quarantined": sum(manifest.rows.quarantined.values()) if manifest else None,
                "seconds": manifest.seconds if manifest else None,
                "collected": collected.told(run.path / step.directory) or None,
            }
        )
        if scores := read_scores(run, step):
            of = beside.setdefault(step.name, {}) if step.name in (CONTROL_EVALUATE, SFT_EVALUATE) else entry
            of |= {name: scores[name] for name in ("scores", "comparisons", "benchmarks") if name in scores}
        if decision := read_decision(run, step):
            entry["gate"] = decision
    finished = all(s["state"] == "done" for e in iterations.values() for s in e["stages"])
    base = iterations.pop(BASE)
    return {
        "run": run.name,
        "path": str(run.path),
        "recipe": chosen.name,
        "state": "done" if finished else state.state if state and state.state != "done" else "stopped",
        "error": state.error if state and not finished else "",
        "writer": holder.model_dump() if (holder := run.holder()) else None,
        "iterations": list(iterations.values()),
        "base": base,
        "sft": beside.get(SFT_EVALUATE),
        "control": beside.get(CONTROL_EVALUATE),
    }
