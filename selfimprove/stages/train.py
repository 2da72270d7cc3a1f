"""Preference training of this iteration's policy on the pairs of the iterations that the recipe names."""

from selfimprove import recipe
from selfimprove.records import Pair
from selfimprove.stages.io import StageIO
from selfimprove.store import read_rows

VERSION = 1
TEMPLATES: tuple[str, ...] = ()
POLICY = "policy"


def run(io: StageIO, section: recipe.Train) -> None:
    """Write policy/ (a plain model directory) and metrics.jsonl (one line per optimiser step)."""
    from selfimprove.training import losses
    from selfimprove.training.job import PairRow
    from selfimprove.training.trainer import train_preference

    pairs = [
        PairRow(pair.pair_id, pair.prompt_token_ids, pair.chosen_token_ids, pair.rejected_token_ids)
        for directory in io.inputs.values()
        for pair in read_rows(directory, "pairs", Pair)
    ]
    job = io.training("training the policy", io.models["start"], POLICY, section.optimizer)
    loss, beta = losses.of(section)
    last = train_preference(job, pairs, loss, beta, io.models.get("reference"))
    io.out.contract("pair", len(pairs), len(pairs))
    io.out.metrics |= last
    passes = section.optimizer.epochs
    io.out.tokens = passes * sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
