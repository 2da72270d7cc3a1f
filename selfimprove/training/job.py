"""What training is given: rows of token ids and a job description. Free of torch, so that plans stay fast."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from selfimprove.recipe import Machine, Optimizer

Progress = Callable[[int, int], None]  # done, total


class Row(NamedTuple):
    """A prompt and its completion as token ids."""

    prompt_ids: list[int]
    completion_ids: list[int]


class PairRow(NamedTuple):
    """A preference pair as token ids."""

    pair_id: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    def rows(self) -> tuple[Row, Row]:
        """Chosen, rejected."""
        return Row(self.prompt_ids, self.chosen_ids), Row(self.prompt_ids, self.rejected_ids)


class Job(NamedTuple):
    """What every kind of training needs."""

    start: Path  # model directory to start from
    out: Path  # directory to save to
    metrics: Path  # one JSON line per optimiser step
    optimizer: Optimizer
    machine: Machine
    seed: int
    progress: Progress
