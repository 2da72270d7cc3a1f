"""Two workers with real vLLM beside one: the same rows, and one engine for each worker over a whole run."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from selfimprove import recipe
from selfimprove.execution import shard
from tests.conftest import SMALL, cut, selfimprove

ROUNDS = 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of one worker and a run of two, of small shards."""
    folder = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(shard, "SMALLEST", 16)
        patch.setattr(shard, "PARTS", 10**6)
        cut(40)
        data = ["--set", "data.seeds=seeds.jsonl", "--set", "data.heldout=heldout.jsonl"]
        for run, count in (("one", 1), ("two", 2)):
            result = selfimprove(
                "iterate", "--rounds", str(ROUNDS), "--run", run, *SMALL, *data, "--set", "synthesize.prompts=40",
                "--set", "generate.n=2", "--set", f"machine.workers={count}", "--set", "machine.threads=1",
            )  # fmt: skip
            assert result.code == 0, result.err
    return folder / "runs/one", folder / "runs/two"


def tables(run: Path) -> dict[str, list[dict]]:
    return {str(p.relative_to(run)): pq.read_table(p).to_pylist() for p in sorted(run.glob("iter-*/*/*.parquet"))}


def outputs(run: Path) -> dict[str, str]:
    found = {}
    for path in sorted(run.glob("iter-*/*/manifest.json")):
        for output in json.loads(path.read_text())["outputs"]:
            if not output["path"].endswith("metrics.jsonl"):  # seconds
                found[f"{path.parent.relative_to(run)}/{output['path']}"] = output["sha256"]
    return found


def test_rows_and_hashes_are_the_same(runs):
    one, two = runs
    rows = tables(one)
    assert rows == tables(two)
    assert sum(map(len, rows.values())) > 400
    assert outputs(one) == outputs(two)


def test_each_worker_starts_one_engine_in_all_rounds(runs):
    logs = sorted((runs[1] / "logs").glob("worker-*.log"))
    assert len(logs) == 2
    assert [log.read_text(errors="replace").count("engine start on") for log in logs] == [1, 1]
    assert (runs[0] / "logs/engine.log").read_text(errors="replace").count("engine start on") == 1


def test_the_default_is_one_worker():
    assert recipe.Machine().workers == 1
