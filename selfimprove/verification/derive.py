"""What follows from other rows, made again: pairs from verdicts, scores from samples, the gate's decision from scores.

The stages' own pure functions do it; no model is asked. Of judges only those are asked again that are programs of this
package and quick (`again`); what others said is taken as it stands.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from selfimprove import data, judges, recipe
from selfimprove.evaluation import lm_harness, scored
from selfimprove.evaluation.splits import SELECTION
from selfimprove.judges import Candidate
from selfimprove.records import Sample
from selfimprove.stages import benchmarks, discriminate, evaluate, gate, label
from selfimprove.stages.evaluate import SPLITS
from selfimprove.store import read_json
from selfimprove.verification import labels
from selfimprove.verification.tables import At, dicts

ACCURACY = 1e-9  # relative: other versions of scipy round otherwise


def check(at: At) -> Iterator[str]:
    """What does not follow, a sentence each."""
    if at.step.stage is label:
        yield from labels.check(at)
    elif at.step.stage is discriminate:
        yield from labels.check_discriminate(at)
    elif at.step.stage is evaluate:
        yield from _evaluation(at)
    elif at.step.stage is gate:
        yield from _gate(at)


# --- scores ------------------------------------------------------------------------------------------------------


def _evaluation(at: At) -> Iterator[str]:
    section = at.step.section
    assert isinstance(section, recipe.Evaluate)
    file = at.directory / "scores.json"
    own = _samples(at, "own", "samples")
    names = [name for name in benchmarks.EARLIER if name in at.step.inputs]
    made = evaluate.scores(own, {name: _samples(at, name, "samples") for name in names}) | {
        "iteration": at.step.iteration
    }
    if section.benchmarks:
        made["benchmarks"] = {one.name: _benchmark(at, one) for one in section.benchmarks}
    told = read_json(file)
    for name, figures in told.get("benchmarks", {}).items():  # what these are is not told by rows
        made.get("benchmarks", {}).get(name, {}).update({k: v for k, v in figures.items() if k in ("asked", "in_file")})
        one = next((b for b in section.benchmarks or [] if b.name == name), None)
        if one and one.kind == lm_harness.KIND:
            made["benchmarks"][name] |= {k: v for k, v in figures.items() if k not in made["benchmarks"][name]}
            made["benchmarks"][name] |= {k: figures.get(k) for k in ("mean_tokens", "truncated_share")}
    yield from (f"{file}: {where}" for where in differing(told, made))
    yield from _judged(at, section)


def _samples(at: At, of: str, table: str, whole: bool = False) -> list[Sample]:
    """The rows of an evaluation without the texts, which no score depends on; with them where `whole`."""
    directory = at.directory if of == "own" else at.input(of)
    columns = ["prompt_id", "mode", "sample", "finish_reason", "score", "reason", "split", "tokens"]
    columns += ["prompt", "text"] if whole else []
    return [Sample(**({"prompt": "", "text": ""} | row)) for row in dicts(directory, table, columns)]


def _benchmark(at: At, one: recipe.Benchmark) -> dict[str, Any]:
    from selfimprove.evaluation import kinds

    table = f"benchmark-{one.name}"
    names = [name for name in benchmarks.EARLIER if name in at.step.inputs]
    samples = _samples(at, "own", table, whole=True)
    earlier = {name: _samples(at, name, table) for name in names}
    if one.kind == lm_harness.KIND:
        known = {sample.score for sample in samples}
        scale: scored.Scale = "flags" if known <= {0.0, 1.0, None} else "any"
        return benchmarks.figures(one, samples, earlier, scale, {}, lambda questions, answered: {})
    questions = kinds.questions(one, {name: at.input(name) for name in one.files}).questions
    by_id = {question.prompt_id: question for question in questions}
    return benchmarks.figures(one, samples, earlier, benchmarks.scale(one), by_id, kinds.KINDS[one.kind].extras)


def _judged(at: At, section: recipe.Evaluate) -> Iterator[str]:
    """The scores of held-out answers, where the judge is a quick program."""
    if not again(section.judge):
        return
    judge = judges.bind(section.judge)
    answers = {
        (split, row.prompt_id): row.answer
        for split, name in SPLITS.items()
        if name in at.step.inputs
        for row in data.read_heldout(at.input(name), name)
    }
    columns = ["prompt_id", "prompt", "mode", "sample", "text", "finish_reason", "score", "split", "tokens"]
    for row in dicts(at.directory, "samples", columns):
        one = Candidate(
            row["prompt_id"], row["prompt"], row["mode"], row["sample"], row["text"], [0] * row["tokens"],
            row["finish_reason"], answers.get((row["split"], row["prompt_id"])),
        )  # fmt: skip
        [opinion] = judge([one], _NOBODY)
        if opinion.score != row["score"]:
            yield (
                f"{at.directory}/samples-*.parquet: {one.name} scores {row['score']}, and by the judge {opinion.score}"
            )


_NOBODY: Any = None  # judges that are programs ask no model


def again(choice: recipe.Choice | None) -> bool:
    """Whether a judge says the same again, at once and without running what others wrote."""
    if choice is None:
        return False
    given = choice.model_extra or {}
    return choice.name in ("length", "demo_rubric") or (
        choice.name == "verifier" and given.get("checker") in ("demo_world", "exact")
    )


# --- the gate ----------------------------------------------------------------------------------------------------


def _gate(at: At) -> Iterator[str]:
    section = at.step.section
    assert isinstance(section, recipe.Gate)
    new, best, base = (
        [s for s in _samples(at, name, "samples", whole=True) if s.split == SELECTION]
        for name in ("evaluation", "best", "base")
    )
    last = read_json(at.input("last") / gate.FILE) if "last" in at.step.inputs else None
    made = gate.decided(section, at.step.iteration, new, best, base, last)
    file = at.directory / gate.FILE
    yield from (f"{file}: {where}" for where in differing(read_json(file), made))
    prompts = len({sample.prompt_id for sample in new})
    if at.manifest.rows.rows_out != prompts:
        yield f"{at.directory / 'manifest.json'} says {at.manifest.rows.rows_out} prompts out, and there are {prompts}"


# --- comparing ---------------------------------------------------------------------------------------------------


def differing(told: Any, made: Any, where: str = "") -> Iterator[str]:
    """Where two JSON values differ: numbers up to ACCURACY."""
    if isinstance(told, Mapping) and isinstance(made, Mapping):
        for name in dict.fromkeys([*made, *told]):
            inside = f"{where}.{name}" if where else str(name)
            if name not in told or name not in made:
                yield f"{inside} is {'missing' if name not in told else 'not of the run'}"
            else:
                yield from differing(told[name], made[name], inside)
    elif _listed(told) and _listed(made) and len(told) == len(made):
        for number, (a, b) in enumerate(zip(told, made, strict=True)):
            yield from differing(a, b, f"{where}[{number}]")
    elif not _same(told, made):
        yield f"{where} is {told}, and follows as {made}"


def _listed(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _same(told: Any, made: Any) -> bool:
    if isinstance(told, bool) or isinstance(made, bool):
        return told is made
    if isinstance(told, int | float) and isinstance(made, int | float):
        both_unknown = math.isnan(told) and math.isnan(made)
        return both_unknown or math.isclose(told, made, rel_tol=ACCURACY, abs_tol=1e-12)
    return bool(told == made)
