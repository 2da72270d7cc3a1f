"""What a benchmark's scored answers amount to: its figures, and what changed since earlier ones on the same prompts."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from selfimprove.records import Sample

if TYPE_CHECKING:
    from selfimprove.evaluation.kinds import Question
    from selfimprove.evaluation.kinds.question import Extras
    from selfimprove.evaluation.statistics import Interval

Scale = Literal["flags", "share", "any"]  # 0 or 1; from 0 to 1; any numbers


def per_prompt(samples: Sequence[Sample]) -> dict[str, float]:
    """The mean score of each prompt's answers, where all of them are known."""
    values: dict[str, list[float | None]] = {}
    for sample in samples:
        values.setdefault(sample.prompt_id, []).append(sample.score)
    known = {prompt_id: [one for one in of if one is not None] for prompt_id, of in values.items()}
    return {prompt_id: sum(of) / len(of) for prompt_id, of in known.items() if len(of) == len(values[prompt_id])}


def figures(
    samples: Sequence[Sample], scale: Scale, questions: Mapping[str, "Question"], extras: "Extras"
) -> dict[str, Any]:
    """A benchmark's score with its 95 % interval over prompts, and the further figures of its kind.

    Args:
        samples: its answers; at least two prompts have a score.
        scale: of the scores.
        questions: what was asked, by id.
        extras: of the kind.
    """
    scores = per_prompt(samples)
    found = _interval(list(scores.values()), scale)
    return {
        "value": found.value,
        "ci95": [found.low, found.high],
        "n": found.n,
        "unknown": len({sample.prompt_id for sample in samples}) - found.n,
        "mean_tokens": sum(sample.tokens for sample in samples) / len(samples),
        "truncated_share": sum(sample.finish_reason == "length" for sample in samples) / len(samples),
        **extras(questions, [sample for sample in samples if sample.score is not None]),
    }


def compared(samples: Sequence[Sample], old: Sequence[Sample], scale: Scale) -> dict[str, Any] | None:
    """The paired difference (new - old) on the prompts that both have a score of; None of fewer than two."""
    from selfimprove.evaluation import statistics  # scipy takes a second to import: plans do without

    now, before = per_prompt(samples), per_prompt(old)
    shared = [prompt_id for prompt_id in now if prompt_id in before]
    if len(shared) < 2:
        return None
    test = statistics.compare_binary if scale == "flags" else statistics.compare_means
    found = test([before[p] for p in shared], [now[p] for p in shared])
    return {
        "difference": found.difference,
        "ci95": [found.low, found.high],
        "p": found.p,
        "test": found.test,
        "n": found.n,
        "mde": found.mde,
    }


def _interval(scores: Sequence[float], scale: Scale) -> "Interval":
    from selfimprove.evaluation import statistics

    how = {"flags": statistics.proportion, "share": statistics.clustered_mean, "any": statistics.mean}
    return how[scale](scores)
