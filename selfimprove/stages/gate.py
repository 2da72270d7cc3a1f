"""The gate: promote this round's policy, keep it without a promotion, or roll back to the best one so far.

It looks at the selection split of the evaluations alone. gate.json says which policy the next round starts from.
"""

from typing import Any

from selfimprove import recipe
from selfimprove.evaluation import diversity
from selfimprove.evaluation.splits import GREEDY, SAMPLED, SELECTION, per_prompt
from selfimprove.records import Sample
from selfimprove.stages.io import StageIO
from selfimprove.store import read_json, read_rows

VERSION = 1
TEMPLATES: tuple[str, ...] = ()
FILE = "gate.json"
PROMOTE, ROLL_BACK = "promote", "roll back"


def run(io: StageIO, section: recipe.Gate) -> None:
    """Write gate.json."""
    last = read_json(io.inputs["last"] / FILE) if "last" in io.inputs else None
    new, best, base = (_samples(io, name) for name in ("evaluation", "best", "base"))
    told = decided(section, io.iteration, new, best, base, last)
    io.out.write_json(FILE, told)
    io.out.metrics |= {"decision": told["decision"], "best": told["best"]}
    prompts = len({sample.prompt_id for sample in new})
    io.out.contract("prompt", prompts, prompts)


def decided(
    section: recipe.Gate,
    iteration: int,
    new: list[Sample],
    best: list[Sample],
    base: list[Sample],
    last: dict[str, Any] | None,
) -> dict[str, Any]:
    """The content of gate.json. Pure.

    Args:
        section: the recipe's [gate].
        iteration: the round that is judged.
        new: its answers, of the selection split.
        best: those of the best round so far.
        base: those of the base model.
        last: gate.json of the round before; None in the first.
    """
    from selfimprove.evaluation.gate import decide

    before = last or {"best": 0, "without": 0}
    decision = decide(_scores(new), _scores(best), section, iteration, _health(new, base), before["without"])
    promoted = decision.decision == PROMOTE
    chosen = iteration if promoted else before["best"]
    return decision._asdict() | {
        "iteration": iteration,
        "best": chosen,
        "goes_on_from": chosen if decision.decision == ROLL_BACK else iteration,
        "without": 0 if promoted else before["without"] + 1,  # rounds in a row without a promotion
    }


def _samples(io: StageIO, name: str) -> list[Sample]:
    return [s for s in read_rows(io.inputs[name], "samples", Sample) if s.split == SELECTION]


def _scores(samples: list[Sample]) -> dict[str, dict[str, float]]:
    return {mode: per_prompt(samples, mode, SELECTION) for mode in (GREEDY, SAMPLED)}


def _health(new: list[Sample], base: list[Sample]) -> dict[str, float | None]:
    """What the limits are about, of the sampled answers."""
    ours, theirs = ([s for s in samples if s.mode == SAMPLED] for samples in (new, base))
    return {
        "truncated_share": sum(s.finish_reason == "length" for s in ours) / len(ours),
        "length_ratio": sum(s.tokens for s in ours) / len(ours) / (sum(s.tokens for s in theirs) / len(theirs)),
        "diversity_ratio": _ratio(*diversity.compare([[s.text for s in ours], [s.text for s in theirs]])),
    }


def _ratio(new: diversity.Diversity, base: diversity.Diversity) -> float | None:
    return new.distinct / base.distinct if new.distinct is not None and base.distinct else None
