"""The control beside every result: plain SFT of the initial model on the seeds' gold answers."""

from selfimprove import data, recipe
from selfimprove.stages.io import StageIO
from selfimprove.training.job import example

VERSION = 1
TEMPLATES: tuple[str, ...] = ()
POLICY = "policy"


def run(io: StageIO, section: recipe.Control) -> None:
    """Write policy/ and metrics.jsonl."""
    seeds = data.read_golds(io.inputs["seeds"])
    rows = [
        example(s.prompt_id, io.chat.prompt_ids(s.prompt), io.chat.completion_ids(s.prompt, s.completion))
        for s in seeds
    ]
    io.train("training the control", rows, "initial", POLICY, section.optimizer)
    io.out.contract("seed", len(seeds), len(seeds) - io.out.quarantined.total())
