"""The data flow of tests/bench/dataflow at a small size: the same rows whatever is held, and no more memory for more.

With windows of 512 rows a run of 1,500 prompts is several windows long. Holding all that 4,500 prompts make takes about
30 MiB more in the stage label, which the bound on memory is half of.
"""

from pathlib import Path

import pytest

from selfimprove import columns, dedup
from selfimprove.execution import shard
from selfimprove.records import Generation, Pair, Prompt, Verdict
from selfimprove.stages import answers
from selfimprove.store import read_rows
from tests.bench import dataflow

PROMPTS = 1_500
TABLES = {
    "1-synthesize": {"prompts": Prompt},
    "2-generate": {"generations": Generation},
    "3-label": {"verdicts": Verdict, "pairs": Pair},
}


def small_windows(monkeypatch):
    monkeypatch.setattr(shard, "WINDOW", 512)
    monkeypatch.setattr(answers, "CANDIDATES", 512)
    monkeypatch.setattr(columns, "GROUP_ROWS", 256)
    monkeypatch.setattr(dedup, "BATCH", 256)


def rows(folder: Path):
    found = {}
    for stage, tables in TABLES.items():
        for name, record in tables.items():
            found[name] = read_rows(folder / "run/iter-001" / stage, name, record)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Everything at once; then in small windows, and three times as many prompts: folders and what they took."""
    found = []
    for windows, prompts in ((False, PROMPTS), (True, PROMPTS), (True, 3 * PROMPTS)):
        folder = tmp_path_factory.mktemp("flow")
        with pytest.MonkeyPatch.context() as patch:
            if windows:
                small_windows(patch)
            found.append((folder, dataflow.measure(prompts, folder)))
    return found


def test_the_rows_are_the_same_however_many_are_held_and_however_many_follow(runs):
    whole, parted, longer = (rows(folder) for folder, _ in runs)
    assert whole == parted
    assert len(whole["prompts"]) == PROMPTS
    assert len(whole["generations"]) == len(whole["verdicts"]) == dataflow.SAMPLES * PROMPTS
    assert 0.7 * PROMPTS < len(whole["pairs"]) < PROMPTS
    for name, some in whole.items():
        assert longer[name][: len(some)] == some
    assert len(longer["generations"]) == 3 * dataflow.SAMPLES * PROMPTS


def test_three_times_the_prompts_take_no_more_memory(runs):
    for small, large in zip(runs[1][1], runs[2][1], strict=True):
        assert large.rows_out > 2.9 * small.rows_out
        assert large.peak_mib - max(small.peak_mib, large.before_mib) < 15, large


def test_a_line_and_the_sums_say_what_was_measured(runs):
    stages = runs[2][1]
    assert [stage.name for stage in stages] == list(dataflow.STAGES)
    assert all(dataflow.line(stage).count("|") == dataflow.HEAD.splitlines()[0].count("|") for stage in stages)
    told = dataflow.total(stages)
    assert told["rows"] == sum(stage.rows_out for stage in stages)
    assert told["rows_per_second"] == pytest.approx(told["rows"] / sum(stage.seconds for stage in stages))
