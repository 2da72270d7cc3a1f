"""The two ways in which held-out prompts are answered, and the two sets of them that are kept apart."""

from collections.abc import Sequence

from selfimprove.records import Sample

GREEDY, SAMPLED = "greedy", "sampled"
REPORT, SELECTION = "report", "selection"  # what is told, and what the gate looks at


def per_prompt(samples: Sequence[Sample], mode: str, split: str = REPORT) -> dict[str, float]:
    """Mean score of each prompt's answers in a mode."""
    values: dict[str, list[float]] = {}
    for sample in samples:
        if (sample.mode, sample.split) == (mode, split) and sample.score is not None:
            values.setdefault(sample.prompt_id, []).append(sample.score)
    return {prompt_id: sum(of) / len(of) for prompt_id, of in values.items()}
