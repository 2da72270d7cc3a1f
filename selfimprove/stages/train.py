"""Preference training of this iteration's policy on the pairs of the iterations that the recipe names."""

from selfimprove import recipe
from selfimprove.records import Pair
from selfimprove.stages.io import StageIO
from selfimprove.store import read_rows
from selfimprove.training.job import PairRow

VERSION = 2
TEMPLATES: tuple[str, ...] = ()
POLICY = "policy"


def run(io: StageIO, section: recipe.Train) -> None:
    """Write policy/ (a plain model directory) and metrics.jsonl (one line per optimiser step)."""
    pairs = [
        PairRow(pair.pair_id, pair.prompt_token_ids, pair.chosen_token_ids, pair.rejected_token_ids)
        for directory in io.inputs.values()
        for pair in read_rows(directory, "pairs", Pair)
    ]
    io.train("training the policy", pairs, "start", POLICY, section.optimizer, section)
    io.out.contract("pair", len(pairs), len(pairs) - len(io.out.quarantined))
