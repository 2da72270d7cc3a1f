"""What differs between two iterations or two artifacts of a stage, of one run or of two."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from selfimprove import plan, reasons, results
from selfimprove.comparison import compared, measure
from selfimprove.errors import UserError
from selfimprove.plan import CONTROL_EVALUATE, Step
from selfimprove.recipe import Recipe
from selfimprove.rows import Database, Reader
from selfimprove.stages import evaluate
from selfimprove.store import Manifest, Run, read_manifest

ANSWERS = {  # by kind of rows: which answers are compared, and what their score is
    "samples": ("evaluate", "mode = 'greedy'", "score"),
    "generations": ("generate", "source = 'current' AND sample = 0", "NULL"),
}


class Side(NamedTuple):
    """One of the two: the steps of an iteration, or a single one."""

    name: str  # as it was asked for
    run: Run
    recipe: Recipe
    steps: Sequence[Step]

    @property
    def manifests(self) -> dict[str, tuple[Step, Manifest]]:
        """What is published, by the name of the stage."""
        found = ((step, read_manifest(self.run.path / step.directory)) for step in self.steps)
        return {step.name.partition("-")[2]: (step, manifest) for step, manifest in found if manifest}


def difference(old: Side, new: Side, number: int) -> dict[str, Any]:
    """Everything that differs, as JSON values, with `number` examples of each kind.

    Raises:
        UserError: nothing of one of them is published, or they are artifacts of different stages.
    """
    before, after = old.manifests, new.manifests
    for side, there in ((old, before), (new, after)):
        if not there:
            raise UserError(f"{side.name}: nothing of it is made yet", f"selfimprove resume {side.run.name}")
    if not before.keys() & after.keys():
        both = ", ".join(before), ", ".join(after)
        raise UserError(
            f"{old.name} is {both[0]} and {new.name} is {both[1]}: different stages do not compare",
            f"selfimprove diff {old.run.name}@1 {new.run.name}@2, or the same stage of both",
        )
    names = dict.fromkeys([*before, *after])
    scores, notes = _scores(old, new, before, after)
    with Database(old.run, new.run) as database:
        readers = Reader(old.run, old.steps, database), Reader(new.run, new.steps, database)
        return {
            "old": old.name,
            "new": new.name,
            "stages": [_stage(name, before.get(name), after.get(name), old, new) for name in names],
            "scores": scores,
            "prompts": _prompts(*readers, number),
            "answers": [found for kind in ANSWERS if (found := _answers(*readers, kind, number))],
            "labels": _labels(*readers, number),
            "notes": notes,
        }


def _stage(
    name: str, old: tuple[Step, Manifest] | None, new: tuple[Step, Manifest] | None, before: Side, after: Side
) -> dict[str, Any]:
    told: dict[str, Any] = {"stage": name}
    for which, one, side in (("old", old, before), ("new", new, after)):
        told[which] = one and {
            "artifact": one[0].directory,
            "rows": one[1].rows.model_dump(),
            "cost": results.cost(one[1], side.recipe)._asdict(),
        }
    if old and new:
        told["changes"] = list(_changes(old, new, after))
        metrics = dict(_numbers(old[1].metrics)), dict(_numbers(new[1].metrics))
        every = dict.fromkeys([*metrics[0], *metrics[1]])
        pairs = {key: [of.get(key) for of in metrics] for key in every}
        told["metrics"] = {key: values for key, values in pairs.items() if values[0] != values[1]}
    return told


def _changes(old: tuple[Step, Manifest], new: tuple[Step, Manifest], side: Side) -> Iterator[str]:
    """What went into the two that differs; of the run's own artifacts it goes without saying."""
    step = new[0]
    known = reasons.Known(
        stage=step.stage.__name__.rpartition(".")[2],
        files=plan.Sources(side.run, side.recipe).files,
        model=side.recipe.model.path,
        texts=side.run.path / plan.TEMPLATES,
        sources={
            name: source
            for name, source in (step.inputs | step.models).items()
            if not plan.source_directory(source).startswith("iter-")
        },
    )
    for change in reasons.of(old[1].ingredients, new[1].ingredients, known):
        if not change.startswith(("iteration ", "stage ", "no longer made from ")):
            yield re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", change)


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", value


# --- scores ------------------------------------------------------------------------------------------------------


def _scores(
    old: Side, new: Side, before: Mapping[str, Any], after: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Each mode's scores and their paired difference; where they do not compare, why."""
    was, now = _evaluated(old), _evaluated(new)
    if was is None or now is None:
        asked = "evaluate" in before or "evaluate" in after
        return [], ["one of them is not evaluated yet"] if asked else []
    if measure(was.manifest) != measure(now.manifest):
        return [], ["scored by different judges, so the scores do not compare"]
    try:
        rows = compared([({}, was, now)])
    except UserError as error:
        return [], [error.message]
    for row in rows:
        row["old"], row["new"] = (side.scores[row["mode"]] for side in (was, now))
    return rows, []


def _evaluated(side: Side) -> results.Round | None:
    found = [
        step
        for step in side.steps
        if step.stage is evaluate and (len(side.steps) == 1 or step.name != CONTROL_EVALUATE)
    ]
    if not found or read_manifest(side.run.path / found[-1].directory) is None:
        return None
    return results.read_round(side.run, found[-1])


# --- rows --------------------------------------------------------------------------------------------------------


def _prompts(old: Reader, new: Reader, number: int) -> dict[str, Any] | None:
    """Prompts by their text, of the answers that were generated; None where one side has none."""
    kind = "generations"
    if kind not in old.kinds or kind not in new.kinds:
        kind = "prompts"
    if kind not in old.kinds or kind not in new.kinds:
        return None
    column = "prompt" if kind == "generations" else "text AS prompt"
    before, after = (reader.open(kind).relation.project(column).distinct() for reader in (old, new))
    with new.whole():
        shared = _count(before.join(after, "prompt"))
        gone, come = (
            sorted(row[0] for row in one.join(other, "prompt", how="anti").order("prompt").limit(number).fetchall())
            for one, other in ((before, after), (after, before))
        )
        return {
            "shared": shared,
            "gone": _count(before) - shared,
            "new": _count(after) - shared,
            "examples": {"gone": gone, "new": come},
        }


def _answers(old: Reader, new: Reader, kind: str, number: int) -> dict[str, Any] | None:
    """Answers to the same prompt: how many differ, got better or worse, and some of them side by side."""
    stage, which, score = ANSWERS[kind]
    if kind not in old.kinds or kind not in new.kinds:
        return None
    sides = []
    for reader, name in ((old, "o"), (new, "n")):
        relation = reader.open(kind).relation.filter(which)
        if "split" in relation.columns:
            relation = relation.filter("split = 'report'")
        one = f"arg_min({{'text': text, 'score': {score}::DOUBLE}}, prompt_id) AS {name}"  # of a text that stands twice
        sides.append(relation.aggregate(f"prompt, {one}", "prompt"))
    both = sides[0].join(sides[1], "prompt")
    with new.whole():
        counts = both.aggregate(
            "count(*), count_if(o.text <> n.text), count_if(n.score > o.score), count_if(n.score < o.score)"
        ).fetchall()[0]
        changed = both.filter("o.text <> n.text").order("prompt").limit(number).fetchall()
    if not counts[0]:
        return None
    told = dict(zip(("shared", "changed", "better", "worse"), counts, strict=True))
    examples = [{"prompt": prompt, "old": o, "new": n} for prompt, o, n in changed]
    return {"stage": stage, **told, "scored": score != "NULL", "examples": examples}


def _labels(old: Reader, new: Reader, number: int) -> dict[str, Any] | None:
    """Pairs of the same two answers: how many there are, and in how many the other one is chosen now."""
    if "pairs" not in old.kinds or "pairs" not in new.kinds:
        return None
    columns = (
        "prompt[1].content AS prompt, chosen[1].content AS {0}, least(chosen[1].content, rejected[1].content) AS a, "
    )
    columns += "greatest(chosen[1].content, rejected[1].content) AS b"
    sides = [
        reader.open("pairs").relation.project(columns.format(name)).distinct()
        for reader, name in ((old, "was"), (new, "now"))
    ]
    both = sides[0].join(sides[1], "prompt, a, b")
    flipped = both.filter("was <> now AND a <> b")
    with new.whole():
        examples = flipped.order("prompt, was").limit(number).project("prompt, was, now").fetchall()
        return {
            "pairs": [reader.open("pairs").count() for reader in (old, new)],
            "shared": _count(both),
            "flipped": _count(flipped),
            "flips_recorded": [reader.open("flips").count() if "flips" in reader.kinds else 0 for reader in (old, new)],
            "examples": [dict(zip(("prompt", "was_chosen", "is_chosen"), row, strict=True)) for row in examples],
        }


def _count(relation: Any) -> int:
    return int(relation.aggregate("count(*)").fetchall()[0][0])
