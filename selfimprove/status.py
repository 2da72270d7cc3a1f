"""What a run looks like from outside: its state and scores, and whether its files are what they were."""

from typing import Any

from selfimprove.errors import UserError
from selfimprove.plan import BASE, CONTROL_EVALUATE, SFT_EVALUATE, Step, examine, steps
from selfimprove.recipe import Recipe
from selfimprove.stages import gate
from selfimprove.store import Run, broken_outputs, read_json, read_manifest


def read_scores(run: Run, step: Step) -> dict[str, Any] | None:
    """scores.json of an evaluation; None for other stages and where it is not published."""
    path = run.path / step.directory / "scores.json"
    return read_json(path) if path.is_file() else None


def read_decision(run: Run, step: Step) -> dict[str, Any] | None:
    """gate.json of a gate; None for other stages and where it is not published."""
    path = run.path / step.directory / gate.FILE
    return read_json(path) if step.stage is gate and path.is_file() else None


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
        "iterations": list(iterations.values()),
        "base": base,
        "sft": beside.get(SFT_EVALUATE),
        "control": beside.get(CONTROL_EVALUATE),
    }


def verify(run: Run, chosen: Recipe) -> tuple[list[str], int]:
    """Every published file against its manifest: what is broken, a sentence each, and how many files were read."""
    broken: list[str] = []
    files = 0
    for step in steps(chosen):
        directory = run.path / step.directory
        try:
            manifest = read_manifest(directory)
        except UserError as error:
            broken.append(error.message)
            continue
        if manifest is None and directory.exists():
            broken.append(f"{directory} has no manifest.json")
        if manifest:
            files += len(manifest.outputs) + 1
            broken += broken_outputs(directory, manifest)
    return broken, files
