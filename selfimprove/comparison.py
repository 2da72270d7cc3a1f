"""Runs side by side: their recipes, scores, paired differences on the prompts that they share, and what each cost."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from selfimprove import recipe_file
from selfimprove.errors import UserError
from selfimprove.evaluation import splits, wording
from selfimprove.evaluation.statistics import Comparison, compare_means, compare_scores, holm
from selfimprove.plan import BASE
from selfimprove.recipe import Recipe
from selfimprove.results import MODES, Cost, Round, costs, evaluated, share, signed, total
from selfimprove.status import standing
from selfimprove.store import Manifest, Run

FINAL, BEST = "final", "best"


@dataclass(frozen=True)
class Side:
    """One of the runs compared."""

    run: str
    recipe: Recipe
    rounds: Mapping[str, Round]  # FINAL and BEST
    cost: Mapping[str, Cost]  # by stage


def side(run: Run, chosen: Recipe) -> Side:
    """What is compared of a run.

    Raises:
        UserError: no round of it is evaluated, or a file of one is gone.
    """
    found = standing(run, chosen)
    if found is None:
        raise UserError(f"no round of run '{run.name}' is evaluated yet", f"selfimprove resume {run.name}")
    rounds = {FINAL: evaluated(run, chosen, found.latest), BEST: evaluated(run, chosen, found.best)}
    return Side(run.name, chosen, rounds, costs(run, chosen))


# --- two runs ----------------------------------------------------------------------------------------------------


class Shared(NamedTuple):
    """Scores of the prompts that two evaluations share, in one order."""

    old: list[float]
    new: list[float]
    left_out: int  # prompts of either that have no counterpart, or a text that stands twice
    by_text: bool  # paired by text, the held-out files being different


def shared(old: Round, new: Round, mode: str) -> Shared:
    """Pair prompt with prompt: by id where the held-out file is the same, by text where it is not.

    Raises:
        UserError: fewer than two prompts are shared.
    """
    by_text = old.heldout != new.heldout
    before, after = (_keyed(of.by_prompt[mode], by_text) for of in (old, new))
    both = [key for key in before if key in after]
    if len(both) < 2:
        raise UserError(
            f"the two runs share {len(both)} held-out prompts, so their scores do not compare",
            "data.heldout of both runs must be the same file, or hold the same prompts",
        )
    every = {prompt for of in (old, new) for prompt in _names(of.by_prompt[mode], by_text)}
    return Shared([before[key] for key in both], [after[key] for key in both], len(every) - len(both), by_text)


def _names(scores: Mapping[tuple[str, str], float], by_text: bool) -> list[str]:
    return [text if by_text else prompt_id for prompt_id, text in scores]


def _keyed(scores: Mapping[tuple[str, str], float], by_text: bool) -> dict[str, float]:
    names = _names(scores, by_text)
    times = Counter(names)
    return {name: score for name, score in zip(names, scores.values(), strict=True) if times[name] == 1}


def paired(scores: Shared, mode: str) -> Comparison:
    """McNemar's test of greedy answers that are right or wrong, elsewhere a paired t-test on the prompts' means."""
    return (compare_scores if mode == splits.GREEDY else compare_means)(scores.old, scores.new)


def sentence(found: Comparison) -> str:
    """What may be said of a difference, in shares of the score; a `p` corrected for several tests says it too."""
    name = wording.called(found)
    if name == "better":
        return f"better by {share(found.difference)} [{share(found.low)}, {share(found.high)}]"
    if name == "worse":
        return f"worse by {share(-found.difference)} [{share(-found.high)}, {share(-found.low)}]"
    seen = f"{signed(found.difference)} [{signed(found.low)}, {signed(found.high)}]"
    return f"no difference that could be told ({seen}); the smallest would be {share(found.mde)}"


def compared(pairs: Sequence[tuple[Mapping[str, Any], Round, Round]]) -> list[dict[str, Any]]:
    """Of each pair (what it is, old, new) and mode a row of JSON values; words go by Holm's p over all rows.

    Raises:
        UserError: two evaluations share fewer than two prompts.
    """
    rows: list[dict[str, Any]] = []
    found: list[Comparison] = []
    for about, old, new in pairs:
        for mode in MODES:
            scores = shared(old, new, mode)
            found.append(paired(scores, mode))
            by = "text" if scores.by_text else "id"
            rows.append({**about, "mode": mode, "left_out": scores.left_out, "paired_by": by})
    for row, one, p in zip(rows, found, holm([one.p for one in found]), strict=True):
        row |= {
            "difference": one.difference,
            "ci95": [one.low, one.high],
            "p": one.p,
            "p_holm": p,
            "test": one.test,
            "n": one.n,
            "mde": one.mde,
            "called": wording.called(one._replace(p=p)),
            "sentence": sentence(one._replace(p=p)),
        }
    return rows


# --- all of them -------------------------------------------------------------------------------------------------


def compare(sides: Sequence[Side]) -> dict[str, Any]:
    """Everything that `selfimprove compare` says, as JSON values; the first run is what the others are held against.

    Raises:
        UserError: the runs were scored by different judges, or share fewer than two prompts.
    """
    first, *others = sides
    _measured_alike(first, others)
    rows = compared([pair for other in others for pair in _pairs(first, other)])
    return {
        "against": first.run,
        "runs": [_told(one) for one in sides],
        "recipes": recipe_file.side_by_side([one.recipe for one in sides]),
        "comparisons": rows,
        "notes": _notes(sides, rows),
    }


def _measured_alike(first: Side, others: Sequence[Side]) -> None:
    for other in others:
        mine, theirs = (measure(one.rounds[FINAL].manifest) for one in (first, other))
        if mine != theirs:
            raise UserError(
                f"runs '{first.run}' and '{other.run}' were scored by different judges, so their scores do not compare",
                "evaluate.judge of both recipes must be the same",
            )


def measure(manifest: Manifest) -> tuple[Any, Any]:
    """The judge, and the content of the files that it is made of."""
    return manifest.ingredients["section"]["judge"], manifest.ingredients.get("files")


def _pairs(first: Side, other: Side) -> Iterator[tuple[dict[str, Any], Round, Round]]:
    """Final against final; best against best too, where that is not the same."""
    seen: set[tuple[int, int]] = set()
    for which in (FINAL, BEST):
        old, new = first.rounds[which], other.rounds[which]
        if (old.iteration, new.iteration) not in seen:
            seen.add((old.iteration, new.iteration))
            about = {"rounds": which, "iteration": new.iteration, "against_iteration": old.iteration}
            yield {"run": other.run, **about}, old, new


def _told(one: Side) -> dict[str, Any]:
    stages = {name: cost._asdict() for name, cost in one.cost.items()}
    return {
        "run": one.run,
        "recipe": one.recipe.name,
        "rounds": one.recipe.rounds,
        "picked_by": "gate" if one.recipe.gate else "sampled score on these prompts",
        **{
            which: {"iteration": of.iteration, "heldout": of.heldout, "scores": of.scores}
            for which, of in one.rounds.items()
        },
        "cost": {"stages": stages, "total": total(list(one.cost.values()))._asdict()},
    }


def _notes(sides: Sequence[Side], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader must know to take the numbers for what they are."""
    notes = []
    for one in sides:
        last = one.rounds[FINAL].iteration
        if last < one.recipe.rounds:
            notes.append(f"{one.run}: {last} of {one.recipe.rounds} rounds are evaluated.")
        if not one.recipe.gate:
            notes.append(f"{one.run}: its best round was picked by these very prompts, which flatters it.")
        elif one.rounds[BEST].iteration == BASE:
            notes.append(f"{one.run}: its gate has promoted no round; best is what round 1 started with.")
    for other in sides[1:]:
        of = [row for row in rows if row["run"] == other.run]
        if of[0]["paired_by"] == "text":
            notes.append(
                f"{other.run}: its held-out file is another one than {sides[0].run}'s. Prompts of the same text are "
                f"compared, {of[0]['n']} of them; {of[0]['left_out']} others are left out."
            )
        asked = {
            name: (mine, theirs)
            for name in ("n", "temperature", "max_tokens")
            if (mine := getattr(sides[0].recipe.evaluate, name)) != (theirs := getattr(other.recipe.evaluate, name))
        }
        for name, (mine, theirs) in asked.items():
            notes.append(f"{other.run}: evaluate.{name} is {theirs}, of {sides[0].run} {mine}: measured differently.")
    if len(rows) > 1:
        notes.append(f"Words go by Holm's p over the {len(rows)} comparisons; the intervals are not corrected.")
    return notes
