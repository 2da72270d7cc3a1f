"""Did it get better? One sentence, and every policy against every other on the same prompts."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from scipy import special

from selfimprove.evaluation import statistics
from selfimprove.evaluation.statistics import Comparison, holm
from selfimprove.evaluation.wording import called
from selfimprove.report.evidence import Evaluation
from selfimprove.report.figures import FIRM, number, p_value, signed

TESTS = {"paired t": "paired t-test", "McNemar exact": "McNemar's exact test"}
Verdict = Literal["better", "worse", "perhaps", "no difference shown", "unknown"]


class Answer(NamedTuple):
    """The verdict in one sentence, and what belongs beside it."""

    verdict: Verdict
    sentence: str
    beside: list[str]


class Cell(NamedTuple):
    """The row's policy less the column's; `p_holm` is corrected over the whole matrix."""

    comparison: Comparison
    p_holm: float


class Matrix(NamedTuple):
    """Rows against columns; None above the diagonal, and where fewer than two prompts are shared."""

    columns: list[str]
    rows: list[tuple[str, list[Cell | None]]]


def answer(found: Sequence[Evaluation], primary: str | None, promoted: int | None) -> Answer:
    """The sentence, from scores.json's comparison with the base.

    Args:
        found: evaluations in order.
        primary: the mode that decides, where a gate names one; else sampled, whose answers are more.
        promoted: the iteration that a gate promoted last, 0 for none; None where the run has no gate.
    """
    rounds = {one.iteration: one for one in found if one.kind == "round"}
    if promoted == 0:
        return Answer("no difference shown", "Not better: the gate promoted no round, the base model stands.", [])
    if not rounds:
        return Answer("unknown", "Not known yet: no round has been evaluated.", [])
    one = rounds.get(promoted or 0) or rounds[max(rounds)]
    compared = one.comparisons.get("base", {})
    modes = [mode for mode in (primary or "sampled", *one.scores) if mode in compared]
    if not modes:
        return Answer("unknown", f"Not known: {one.label} was compared with no base.", [])
    base = next((b for b in found if b.kind == "base"), None)
    first = as_comparison(compared[modes[0]])
    verdict = judged(first)
    lead = {
        "better": "Better",
        "worse": "Worse",
        "perhaps": "Perhaps better, not enough to say so",
        "no difference shown": "No difference shown",
    }[verdict]
    others = [mode for mode in dict.fromkeys(modes) if mode != modes[0]]
    beside = [f"{_told(one, base, mode, 'The')}." for mode in others]
    beside += [_control(control, one, modes[0]) for control in found if control.kind == "control"]
    if promoted and one.iteration < max(rounds):
        beside.append(f"The gate has promoted no round after {one.label}.")
    beside.append(
        f"These {first.n} prompts show a true difference of {number(first.mde)} four times in five; a smaller gain is "
        "never called better here."
    )
    return Answer(verdict, f"{lead}: {_told(one, base, modes[0], 'the')}.", [text for text in beside if text])


def judged(compared: Comparison) -> Verdict:
    """See wording.called; a gain whose interval lies above zero and that these prompts cannot tell is a perhaps."""
    name = called(compared)
    if name == "better" or name == "worse":
        return name
    return "perhaps" if compared.low > 0 else "no difference shown"


def as_comparison(told: Mapping[str, Any]) -> Comparison:
    """A comparison of scores.json; its minimum detectable effect from the width of its interval, by Student's t."""
    low, high = told["ci95"]
    freedom = told["n"] - 1
    error = (high - low) / 2 / float(special.stdtrit(freedom, 1 - statistics.TAIL))
    mde = told.get("mde") or statistics.minimum_detectable_effect(error, freedom)
    return Comparison(told["difference"], low, high, told["p"], told["test"], told["n"], mde)


def _told(one: Evaluation, base: Evaluation | None, mode: str, the: str) -> str:
    told = one.comparisons["base"][mode]
    low, high = (signed(bound) for bound in told["ci95"])
    before = f"from {number(base.scores[mode]['value'])} at the base " if base and mode in base.scores else ""
    return (
        f"{the} {mode} score went {before}to {number(one.scores[mode]['value'])} after {one.label}, a difference of "
        f"{signed(told['difference'])} (95{FIRM}% interval {low} to {high}; {p_value(told['p'])}, "
        f"{TESTS.get(told['test'], told['test'])} over the same {told['n']} prompts)"
    )


def _control(control: Evaluation, one: Evaluation, mode: str) -> str:
    """What the same seeds give without the loop; empty where it cannot be compared."""
    compared = compare(one.by_prompt.get(mode, {}), control.by_prompt.get(mode, {}))
    if compared is None:
        return ""
    return (
        f"The control, plain fine-tuning on the seeds' gold answers, scores {number(control.scores[mode]['value'])}: "
        f"{signed(compared.difference)} against {one.label} (95{FIRM}% interval {signed(compared.low)} to "
        f"{signed(compared.high)})."
    )


def matrix(found: Sequence[Evaluation], mode: str) -> Matrix | None:
    """Every policy against every one before it; None where there is nothing to compare."""
    those = [one for one in found if mode in one.by_prompt]
    pairs = {
        (new, old): compared
        for old, new in itertools.combinations(range(len(those)), 2)
        if (compared := compare(those[old].by_prompt[mode], those[new].by_prompt[mode])) is not None
    }
    if not pairs:
        return None
    corrected = dict(zip(pairs, holm([one.p for one in pairs.values()]), strict=True))
    cells = {where: Cell(compared, corrected[where]) for where, compared in pairs.items()}
    last = len(those) - 1
    return Matrix(
        [one.short for one in those[:last]],
        [(those[i].label, [cells.get((i, j)) for j in range(last)]) for i in range(1, last + 1)],
    )


def compare(old: Mapping[str, float], new: Mapping[str, float]) -> Comparison | None:
    """New less old over the prompts that both have: McNemar's test on right and wrong, a paired t-test otherwise."""
    shared = [prompt_id for prompt_id in new if prompt_id in old]
    if len(shared) < 2:
        return None
    return statistics.compare_scores([old[p] for p in shared], [new[p] for p in shared])
