"""The report's tables beside its charts: data flow, cost, the judge's audit, the gate, where everything came from."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from selfimprove import results
from selfimprove.plan import BASE, INITIAL, Examined
from selfimprove.recipe import Recipe
from selfimprove.report.evidence import finite
from selfimprove.report.figures import count, number, plain
from selfimprove.store import Manifest, Run

FIGURES = {
    "scores.n": "answers scored",
    "scores.mean": "mean score",
    "scores.sd": "standard deviation of the scores",
    "scores.unknown": "answers without a score",
    "scores.ties": "ties between two answers to a prompt",
    "scores.length.spearman": "score and length, Spearman",
    "scores.length.pearson": "score and length, Pearson",
    "scores.length_within.spearman": "the same within prompts, Spearman",
    "scores.length_within.pearson": "the same within prompts, Pearson",
    "pairs.n": "pairs compared",
    "pairs.labelled": "of them labelled by people",
    "pairs.unreadable_verdicts": "verdicts not readable",
    "pairs.unreadable": "pairs not readable",
    "pairs.ties": "ties",
    "pairs.consistent": "same in both orders",
    "pairs.flipped": "flipped with the order",
    "pairs.first_position": "prefers the first shown",
    "pairs.kappa_orders": "kappa between orders",
    "pairs.prefers_longer": "prefers the longer",
    "again.n": "asked twice: answers",
    "again.differ": "asked twice: another score",
    "again.mean_difference": "asked twice: mean absolute difference",
    "again.order": "asked twice: same order of two answers",
    "again.flipped": "asked twice: order turned over",
    "again.kappa": "asked twice: kappa",
    "again.spearman": "asked twice: Spearman",
    "drift.n": "anchors scored in round 1 and now",
    "drift.before": "anchors: mean score in round 1",
    "drift.after": "anchors: mean score now",
    "drift.rise": "anchors: rise since round 1",
    "drift.effect": "anchors: rise in standard deviations",
    "drift.p": "anchors: p of such a rise by chance",
    "drift.alarm": "alarm: the judge has grown lenient",
    "second.judge": "second judge",
    "second.n": "second judge: answers both scored",
    "second.order": "second judge: same order of two answers",
    "second.flipped": "second judge: opposite order",
    "second.kappa": "second judge: kappa",
    "second.spearman": "second judge: Spearman",
}


class Flow(NamedTuple):
    """What went into a stage and what came out."""

    stage: str
    state: str
    manifest: Manifest


class Cost(NamedTuple):
    """What one iteration, or all of them, took."""

    name: str
    seconds: dict[str, float]  # by stage
    total: float
    tokens: int
    usd: float | None  # None where no server with a price was asked
    unmeasured: int  # requests whose cost the servers did not say: in `usd` at their worst


class Origin(NamedTuple):
    """Where something comes from; of files and models the hash of their content, which entered the keys."""

    name: str
    value: str
    sha256: str = ""


def flow(examined: Iterable[Examined]) -> list[Flow]:
    """Every published stage in order; a stale one says so."""
    return [Flow(one.step.directory, one.status, one.manifest) for one in examined if one.manifest]


def costs(examined: Iterable[Examined], recipe: Recipe) -> list[Cost]:
    """Seconds, tokens and money by iteration; the last row is the sum."""
    grouped: dict[int, list[tuple[str, results.Cost]]] = {}
    for one in examined:
        if one.manifest:
            found = kind(one.step.name), results.cost(one.manifest, recipe)
            grouped.setdefault(one.step.iteration, []).append(found)
    rows = [_cost(str(k) if k > BASE else "base", grouped[k]) for k in sorted(grouped)]
    return [*rows, _cost("all", [one for of in grouped.values() for one in of])]


def _cost(name: str, of: Sequence[tuple[str, results.Cost]]) -> Cost:
    seconds: dict[str, float] = {}
    for stage, one in of:
        seconds[stage] = seconds.get(stage, 0.0) + one.seconds
    whole = results.total([one for _, one in of])
    return Cost(name, seconds, whole.seconds, whole.tokens, whole.usd, whole.unmeasured)


def kind(step: str) -> str:
    """`generate` of `2-generate`; the evaluations beside the base's count as evaluations."""
    name = step.partition("-")[2]
    return "evaluate" if name.endswith("-evaluate") else name


def audit(rounds: Mapping[int, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """One row a figure, one column a round; figures that this page has no name for keep their own."""
    flat = {k: dict(_flat("", {name: told[name] for name in told if name != "judge"})) for k, told in rounds.items()}
    found = dict.fromkeys(name for of in flat.values() for name in of)
    known = [name for name in FIGURES if name in found] + [name for name in found if name not in FIGURES]
    rows = [(FIGURES.get(name, name), [flat[k].get(name, "–") for k in flat]) for name in known]
    return [(name, cells) for name, cells in rows if set(cells) != {"–"}]


def _flat(prefix: str, told: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for name, value in told.items():
        where = f"{prefix}{name}"
        if isinstance(value, Mapping) and {"value", "low", "high"} <= value.keys():
            yield where, f"{number(value['value'])} [{number(value['low'])}, {number(value['high'])}]"
        elif isinstance(value, Mapping) and name == "reasons":
            yield from ((f"no score: {reason}", _value(times)) for reason, times in value.items())
        elif isinstance(value, Mapping):
            yield from _flat(f"{where}.", value)
        else:
            yield where, _value(value)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count(value)
    if isinstance(value, float):
        known = finite(value)
        return "–" if known is None else number(known) if abs(known) < 1 else plain(known)
    return "–" if value is None else str(value)


def judges(rounds: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """The judges of the rounds, each once."""
    return list(dict.fromkeys(str(told["judge"]) for told in rounds.values() if "judge" in told))


def provenance(run: Run, recipe: Recipe, examined: Sequence[Examined]) -> list[Origin]:
    """When, how, with what and from what."""
    about = run.about()
    finished = [one.manifest.finished for one in examined if one.manifest]
    software = ", ".join(f"{name} {version}" for name, version in _environment(about, examined).items())
    rows = [
        Origin("command", shlex.join(["selfimprove", *map(str, about.get("command", []))])),
        Origin("begun", str(about.get("created", "–"))),
        Origin("last stage finished", max(finished, default="–")),
        Origin("seed", str(recipe.seed)),
        Origin("software", software),
    ]
    return [*rows, *_origins(recipe, examined)]


def _environment(about: Mapping[str, Any], examined: Sequence[Examined]) -> Mapping[str, Any]:
    last = next((one.manifest for one in reversed(examined) if one.manifest), None)
    known: Mapping[str, Any] = about.get("environment", {})
    return last.environment if last else known


def _origins(recipe: Recipe, examined: Sequence[Examined]) -> list[Origin]:
    """Files and models from outside the run, with the hash that entered the keys."""
    paths = {f"file:{name}": path for name, path in recipe.files.items()}
    paths[INITIAL] = recipe.model.path
    found: dict[str, Origin] = {}
    for one in examined:
        for kind_, sources in (("inputs", one.step.inputs), ("models", one.step.models)):
            hashes = (one.manifest.ingredients if one.manifest else {}).get(kind_, {})
            for name, source in sources.items():
                outside = source == INITIAL or source.startswith(("file:", "model:"))
                if outside and name in hashes:
                    what, _, path = source.partition(":")
                    label = "initial model" if source == INITIAL else f"{what} {path}"
                    found[label] = Origin(label, paths.get(source, path), hashes[name])
    return list(found.values())
