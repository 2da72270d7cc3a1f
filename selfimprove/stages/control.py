"""The control beside every result: plain SFT of the initial model on the seeds' gold answers."""

from selfimprove import data, recipe
from selfimprove.stages.io import StageIO
from selfimprove.training.job import Row

VERSION = 1
TEMPLATES: tuple[str, ...] = ()
POLICY = "policy"


def run(io: StageIO, section: recipe.Control) -> None:
    """Write policy/ and metrics.jsonl."""
    from selfimprove.training.trainer import train_sft

    seeds = data.read_seeds(io.inputs["seeds"])
    examples = [Row(io.chat.prompt_ids(s.prompt), io.chat.completion_ids(s.prompt, s.completion)) for s in seeds]
    job = io.training("training the control", io.models["initial"], POLICY, section.optimizer)
    io.out.metrics |= train_sft(job, examples)
    io.out.contract("seed", len(seeds), len(examples))
