"""Scores of the same prompts over several seeds of a run: means over seeds, tests over prompts.

The interval answers for other prompts of the kind, given these seeds; how much the seeds differ stands beside it.
"""

from collections.abc import Mapping
from typing import NamedTuple

from selfimprove.evaluation.statistics import Comparison, Interval, compare_means, mean_of_scores

Scores = Mapping[str, float]  # of each prompt, the mean over its answers


class Pooled(NamedTuple):
    """The mean over seeds, its interval over prompts, and each seed's own mean."""

    interval: Interval
    per_seed: dict[int, float]


class Paired(NamedTuple):
    """The paired difference (new - old) of the prompts' means over the shared seeds, and each seed's own."""

    comparison: Comparison
    per_seed: dict[int, float]
    same_sign: int  # seeds whose difference has the sign of the whole


def pooled(scores: Mapping[int, Scores]) -> Pooled:
    """One arm's scores by seed."""
    prompts = _shared(list(scores.values()))
    return Pooled(
        mean_of_scores(_means(list(scores.values()), prompts)),
        {seed: sum(of[p] for p in prompts) / len(prompts) for seed, of in scores.items()},
    )


def paired(old: Mapping[int, Scores], new: Mapping[int, Scores]) -> Paired | None:
    """Two arms' scores by seed, seed with seed and prompt with prompt; None where they share no seed."""
    seeds = [seed for seed in new if seed in old]
    if not seeds:
        return None
    before, after = [old[seed] for seed in seeds], [new[seed] for seed in seeds]
    prompts = _shared([*before, *after])
    comparison = compare_means(_means(before, prompts), _means(after, prompts))
    per_seed = {seed: sum(new[seed][p] - old[seed][p] for p in prompts) / len(prompts) for seed in seeds}
    same = sum(difference * comparison.difference > 0 for difference in per_seed.values())
    return Paired(comparison, per_seed, same)


def _shared(scores: list[Scores]) -> list[str]:
    """The prompts that were scored every time."""
    return [prompt for prompt in scores[0] if all(prompt in of for of in scores)]


def _means(scores: list[Scores], prompts: list[str]) -> list[float]:
    return [sum(of[prompt] for of in scores) / len(scores) for prompt in prompts]
