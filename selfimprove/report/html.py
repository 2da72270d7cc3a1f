"""One self-contained HTML page about a run: scores, data flow, samples, provenance. A plain first version."""

import random
from pathlib import Path
from typing import Any

import jinja2

from selfimprove import plan, status
from selfimprove.recipe import Recipe
from selfimprove.recipe_file import dump
from selfimprove.records import Sample
from selfimprove.report import terminal
from selfimprove.stages import evaluate
from selfimprove.store import Run, read_manifest, read_rows

TEMPLATE = Path(__file__).parent / "report.html.jinja"
SAMPLES = 12  # held-out prompts shown side by side


def render(run: Run, recipe: Recipe) -> str:
    """The page; everything a model wrote is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["score"] = terminal.score
    environment.globals["change"] = terminal.change
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    summary = status.summary(run, recipe)
    examined = [(e.step, e.manifest) for e in plan.examine(run, recipe) if e.manifest]
    return template.render(
        summary=summary,
        rows=_rows(summary),
        flow=[{"where": step.directory, "manifest": manifest} for step, manifest in examined],
        samples=(samples := _samples(run, recipe)),
        names=sorted({name for sample in samples for name in sample["answers"]}, key=int),
        recipe=dump(recipe),
        environment=examined[0][1].environment if examined and examined[0][1] else {},
    )


def _rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    entries = [{"name": "base (iteration 0)", **summary["base"]}]
    if summary["sft"]:
        entries.append({"name": "after SFT, where round 1 begins", **summary["sft"]})
    entries += [{"name": f"iteration {entry['iteration']}", **entry} for entry in summary["iterations"]]
    if summary["control"]:
        entries.append({"name": "control: SFT on the seeds' golds", **summary["control"]})
    return [{"comparisons": {}, **entry} for entry in entries if entry["scores"]]


def _samples(run: Run, recipe: Recipe) -> list[dict[str, Any]]:
    """The greedy answers of base and iterations to the same held-out prompts, drawn at random."""
    answers: dict[str, dict[str, Sample]] = {}
    beside = (plan.CONTROL_EVALUATE, plan.SFT_EVALUATE)
    for step in plan.steps(recipe):
        directory = run.path / step.directory
        if step.stage is evaluate and step.name not in beside and read_manifest(directory):
            for row in read_rows(directory, "samples", Sample):
                if row.mode == evaluate.GREEDY:
                    answers.setdefault(row.prompt_id, {})[str(step.iteration)] = row
    chosen = random.Random(0).sample(sorted(answers), min(SAMPLES, len(answers)))
    return [{"prompt": next(iter(answers[p].values())).prompt, "answers": answers[p]} for p in chosen]
