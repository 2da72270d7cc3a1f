"""What training is given: rows of token ids and a job description. Free of torch, so that plans stay fast."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from selfimprove import recipe

Progress = Callable[[int, int], None]  # done, total


class Tree(NamedTuple):
    """A prompt and its responses as token ids, end tokens included."""

    prompt_ids: list[int]
    responses: list[list[int]]


class PairRow(NamedTuple):
    """A preference pair as token ids; supervised fine-tuning has an empty rejected answer."""

    pair_id: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    # SPPO: how often chosen and rejected win against the prompt's samples, and chosen against rejected
    win_rates: tuple[float, float, float] | None = None
    source: str = ""  # of the data


def example(row_id: str, prompt_ids: list[int], completion_ids: list[int]) -> PairRow:
    """A row of supervised fine-tuning."""
    return PairRow(row_id, prompt_ids, completion_ids, [])


class Weights(NamedTuple):
    """A model directory and the identity of what is in it."""

    path: Path
    identity: str


class Job(NamedTuple):
    """One training: what it starts from, what it is to do, where it writes."""

    rows: list[PairRow]
    start: Weights
    out: Path  # directory to save to
    metrics: Path  # one JSON line per optimiser step
    scratch: Path  # checkpoints; belongs to this very job and may hold what a killed process left
    cache: Path  # reference log-probs, shared by all jobs of a run
    optimizer: recipe.Optimizer
    machine: recipe.Machine
    seed: int
    progress: Progress
    preference: recipe.Train | None = None  # unset = supervised fine-tuning on the chosen answers
    references: dict[str, Weights] = {}  # noqa: RUF012  # by the recipe's names; "initial" too where chunks are ordered
    name: str = "training"
    losses: Path | None = None  # Parquet file of each pair's loss at each step, where it is wanted
