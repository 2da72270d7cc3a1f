"""A study with the fake engine: resumed, shared, failures noted, numbers derived anew, bad files refused."""

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from selfimprove import recipe_file, store, study
from selfimprove.data import SHIPPED
from selfimprove.errors import UserError
from selfimprove.execution import Executors
from selfimprove.run import adopt, iterate
from tests.conftest import cut, selfimprove
from tests.test_run import contents, keys, program

TINY = """
name = "tiny"
seeds = [0, 1]
rounds = 1
baselines = ["spin"]
set = { "engine.kind" = "fake", "data.seeds" = "seeds.jsonl", "data.heldout" = "heldout.jsonl", "evaluate.n" = 2 }
drop = ["control"]

[worlds.clean]
title = "Clean golds"

[arms.spin]
recipe = "spin"
claim = "as good as | DPO"

[arms.soft]
recipe = "spin"
set = { "generate.sampling.max_tokens" = 40, "evaluate.temperature" = 1.0 }
control_of = "spin"
"""
BAD = """
[arms.bad]
recipe = "spin"
set = { "train.loss" = { name = "dpo", beta = 0.5, nonsense = 3 } }
"""


@pytest.fixture
def folder(in_tmp):
    cut(24)
    Path("tiny.toml").write_text(TINY, encoding="utf-8")
    return in_tmp


class Silent:
    def __getattr__(self, name):
        return lambda *arguments: None


def per_prompt(run: str, stage: str, mode: str) -> dict[str, float]:
    """Straight from the Parquet files, by none of the program's own functions."""
    [shard] = Path("runs", run, stage).glob("samples-*.parquet")
    table = pq.read_table(shard).to_pandas()
    return table[table["mode"] == mode].groupby("prompt_id")["score"].mean().to_dict()


class TestPerform:
    def test_an_arm_that_its_gate_stops_is_reported_with_its_own_last_round(self, folder):
        lines = SHIPPED["demo:selection"].read_text(encoding="utf-8").splitlines(keepends=True)
        Path("selection.jsonl").write_text("".join(lines[:20]), encoding="utf-8")
        gated = """
[arms.gated]
recipe = "spin"
[arms.gated.set]
stages = ["generate", "label", "train", "evaluate", "gate"]
"gate.patience" = 1
"data.selection" = "selection.jsonl"
"""
        file = TINY.replace("rounds = 1", "rounds = 3").replace("seeds = [0, 1]", "seeds = [0]") + gated
        Path("tiny.toml").write_text(file, encoding="utf-8")
        result = selfimprove("study", "tiny.toml", "--out", "report.md", "--json", "numbers.json")
        assert result.code == 0, result.err
        told = json.loads(Path("numbers.json").read_text())
        [(name, last)] = told["stopped"].items()
        assert (name, last < 3) == ("tiny-clean-gated-s0", True)
        assert f"`{name}` after round {last}" in Path("report.md").read_text(encoding="utf-8")
        rounds = [row["round"] for row in told["worlds"]["clean"]["rows"] if row["arm"] == "gated"]
        assert rounds == list(range(1, last + 1))
        assert "receipt" not in told["versions"]

    def test_made_shared_failed_reported_and_made_again(self, folder):
        Path("tiny.toml").write_text(TINY + BAD, encoding="utf-8")
        result = selfimprove("study", "tiny.toml", "--jobs", "2", "--out", "docs/report.md", "--json", "numbers.json")
        assert result.code == 1, result.err
        assert result.out.split() == ["docs/report.md", "numbers.json"]
        assert "error: 2 of 6 runs failed: tiny-clean-bad-s0: loss 'dpo': parameter 'nonsense': unknown" in result.err
        assert "[6/6]" in result.err
        page = Path("docs/report.md").read_text(encoding="utf-8")
        assert "4 of 6 runs are finished" in page
        assert "| `tiny-clean-bad-s1` | loss 'dpo': parameter 'nonsense': unknown key |" in page
        assert "as good as \\| DPO" in page
        assert "### Controls against the arm" in page
        for seed in (0, 1):
            files = [Path(f"runs/tiny-clean-{arm}-s{seed}") for arm in ("spin", "soft")]
            for run in files:
                assert selfimprove("verify", run.name).code == 0
                assert recipe_file.load(run / "recipe.toml").seed == seed
                assert not list(run.glob("iter-*/*.partial"))
        self._numbers(json.loads(Path("numbers.json").read_text()))

        # an ordinary run of the same recipe and seed is the same, byte for byte
        chosen = recipe_file.load(Path("runs/tiny-clean-soft-s1/recipe.toml"))
        with Executors() as executors:
            iterate(store.Run(Path("runs/alone")), chosen, Silent(), [], executors)
        assert keys(Path("runs/alone")) == keys(Path("runs/tiny-clean-soft-s1"))
        assert contents(Path("runs/alone")) == contents(Path("runs/tiny-clean-soft-s1"))

        # what is finished is left alone, what is missing is made; the arm that failed is mended
        import shutil

        shutil.rmtree("runs/tiny-clean-soft-s0/iter-001/4-evaluate")
        before = {p: p.stat().st_mtime_ns for p in Path("runs").rglob("*.parquet")}
        Path("tiny.toml").write_text(TINY + BAD.replace(", nonsense = 3", ""), encoding="utf-8")
        result = selfimprove("study", "tiny.toml", "--out", "docs/report.md")
        assert result.code == 0, result.err
        assert "6 runs, 3 to make" in result.err
        assert "tiny-clean-spin" not in result.err
        assert {p: t for p, t in before.items() if p.stat().st_mtime_ns != t} == {}
        page = Path("docs/report.md").read_text(encoding="utf-8")
        assert "6 of 6 runs are finished" in page
        assert "Failed" not in page

        # one worker after another: the base was evaluated once per seed, its files are one file
        base = "iter-000/1-evaluate/manifest.json"
        made = Path("runs/tiny-clean-bad-s1", base).stat()
        assert made.st_ino in {Path(f"runs/tiny-clean-{arm}-s1", base).stat().st_ino for arm in ("spin", "soft")}
        assert made.st_nlink >= 2

    def _numbers(self, told):
        world = told["worlds"]["clean"]
        assert world["heldout"] == 24
        for row in world["rows"]:
            arm, stage = (
                ("spin", "iter-000/1-evaluate") if row["arm"] == "base" else (row["arm"], "iter-001/4-evaluate")
            )
            for mode in ("greedy", "sampled"):
                seeds = [per_prompt(f"tiny-clean-{arm}-s{seed}", stage, mode) for seed in (0, 1)]
                means = [(seeds[0][p] + seeds[1][p]) / 2 for p in seeds[0]]
                interval = stats.t.interval(0.95, len(means) - 1, stats.tmean(means), stats.sem(means))
                assert row[mode]["value"] == pytest.approx(stats.tmean(means))
                assert row[mode]["ci95"] == pytest.approx(interval)
                assert list(row[mode]["per_seed"].values()) == pytest.approx(
                    [stats.tmean([*s.values()]) for s in seeds]
                )
        for table, old_arm, old_stage in [
            (world["against base"], None, "iter-000/1-evaluate"),
            (world["against"]["spin"], "spin", "iter-001/4-evaluate"),
        ]:
            for row in table:
                new = [per_prompt(f"tiny-clean-{row['arm']}-s{s}", "iter-001/4-evaluate", row["mode"]) for s in (0, 1)]
                old = [per_prompt(f"tiny-clean-{old_arm or row['arm']}-s{s}", old_stage, row["mode"]) for s in (0, 1)]
                pairs = [((old[0][p] + old[1][p]) / 2, (new[0][p] + new[1][p]) / 2) for p in old[0]]
                before, after = zip(*pairs, strict=True)
                test = stats.ttest_rel(after, before)
                assert row["difference"] == pytest.approx(stats.tmean(after) - stats.tmean(before))
                if before != after:
                    assert row["p"] == pytest.approx(test.pvalue)
                    assert row["ci95"] == pytest.approx([*test.confidence_interval()])
            p = [row["p"] for row in table]
            assert [row["p_holm"] for row in table] == pytest.approx(multipletests(p, method="holm")[1])
        assert [row["arm"] for row in world["controls"]] == ["soft against spin"] * 2
        manifests = [json.loads(p.read_text()) for p in Path("runs/tiny-clean-spin-s0").glob("iter-*/*/manifest.json")]
        other = [json.loads(p.read_text()) for p in Path("runs/tiny-clean-spin-s1").glob("iter-*/*/manifest.json")]
        sums = [sum(m["seconds"] for m in of) for of in (manifests, other)]
        assert world["seconds"]["spin"]["mean"] == pytest.approx(stats.tmean(sums))
        assert world["seconds"]["spin"]["at_once"] == [2]

    def test_ctrl_c_stops_at_a_safe_point_and_a_kill_leaves_no_process(self, folder):
        for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
            process = program("study", "tiny.toml")
            try:
                while not list(Path("runs").glob("tiny-*-s0/iter-*/*.partial")):
                    assert process.poll() is None, process.communicate()
                    time.sleep(0.01)
                children = psutil.Process(process.pid).children(recursive=True)
                assert any("selfimprove.worker" in " ".join(child.cmdline()) for child in children)
            finally:
                os.kill(process.pid, number)
            _, err = process.communicate()
            assert process.returncode == code, err
            _, alive = psutil.wait_procs(children, timeout=10)
            assert not alive
            if number == signal.SIGINT:
                assert "the same command goes on" in err
                assert "Traceback" not in err
                assert not list(Path("runs").glob("tiny-*/iter-*/*.partial"))
        result = selfimprove("study", "tiny.toml", "--report-only")
        assert result.code == 1
        assert "no run of study 'tiny' is finished" in result.err


def test_an_artifact_of_another_key_or_with_a_file_missing_is_not_adopted(fake_run):
    theirs = fake_run / "iter-001/3-label"
    key = store.read_manifest(theirs).key
    assert adopt(store.Artifact(fake_run / "one"), "another", [theirs]) is None
    assert adopt(store.Artifact(fake_run / "one"), key, [fake_run / "nothing", theirs]).key == key
    for path in theirs.rglob("*"):
        assert (fake_run / "one" / path.name).samefile(path)
    (theirs / "pairs-00000.parquet").unlink()
    assert adopt(store.Artifact(fake_run / "two"), key, [theirs]) is None
    assert not (fake_run / "two").exists()


def test_where_links_fail_files_are_copied(fake_run, monkeypatch):
    def refuse(*arguments):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    theirs = fake_run / "iter-001/4-train"
    manifest = store.read_manifest(theirs)
    assert adopt(store.Artifact(fake_run / "one"), manifest.key, [theirs]) == manifest
    assert list(store.broken_outputs(fake_run / "one", manifest)) == []
    assert not (fake_run / "one/metrics.jsonl").samefile(theirs / "metrics.jsonl")


class TestFile:
    @pytest.mark.parametrize(
        ("old", "new", "says"),
        [
            ('claim = "', 'clam = "', "study tiny.toml: arms.spin.clam: unknown key"),
            ("seeds = [0, 1]", "seeds = [0, 0]", "seeds are different numbers from 0 on"),
            ('baselines = ["spin"]', 'baselines = ["dpo"]', "baseline 'dpo' is no arm"),
            ('control_of = "spin"', 'control_of = "soft"', "arm 'soft': no other arm 'soft'"),
            ("[arms.soft]", "[arms.so-ft]", "'so-ft' cannot name a world or an arm"),
            ('claim = "', 'worlds = ["dirty"]\nclaim = "', "arm 'spin': no world 'dirty'"),
            ("drop = [", 'drop = ["seed", ', "'seed' is no setting here"),
            ('"evaluate.temperature" = 1.0', '"evaluate.temperature" = 0.5', "'spin' and 'soft' differ in [evaluate]"),
            ('"evaluate.temperature" = 1.0', '"train.beta" = 1', "in world 'clean': recipe spin.toml: train.beta"),
            ('"evaluate.temperature" = 1.0', '"name.x" = 1', "'name' is not a table"),
            ('recipe = "spin"', 'recipe = "spinn"', "no recipe called 'spinn'"),
            ("[worlds.clean]", "[worlds.clean", "study tiny.toml is not valid TOML"),
        ],
    )  # fmt: skip
    def test_a_bad_study_is_refused_with_one_sentence_and_a_hint(self, folder, old, new, says):
        assert old in TINY
        Path("tiny.toml").write_text(TINY.replace(old, new, 1), encoding="utf-8")
        result = selfimprove("study", "tiny.toml")
        assert result.code == 1
        assert says in result.err
        assert len(result.err.split("\n\nhint: ")) == 2
        assert "Traceback" not in result.err
        assert not Path("runs").exists()

    def test_settings_of_study_world_arm_and_arm_in_world_apply_in_this_order(self, folder):
        more = '[worlds.noisy]\nset = { "generate.n" = 2, "train.loss.beta" = 0.3 }\n'
        more += '[arms.soft.in.noisy]\nset = { "train.loss.beta" = 0.7 }\n'
        Path("tiny.toml").write_text(TINY + more, encoding="utf-8")
        runs = study.planned(study.load(Path("tiny.toml")))
        assert [one.name for one in runs][:4] == [
            f"tiny-{w}-{a}-s0" for w in ("clean", "noisy") for a in ("spin", "soft")
        ]
        found = {
            (one.world, one.arm): (one.recipe.generate.n, one.recipe.train.loss.model_extra["beta"]) for one in runs
        }
        assert found == {
            ("clean", "spin"): (1, 0.2), ("clean", "soft"): (1, 0.2),
            ("noisy", "spin"): (2, 0.3), ("noisy", "soft"): (2, 0.7),
        }  # fmt: skip
        assert all(one.recipe.control is None and one.recipe.engine.kind == "fake" for one in runs)
        assert [one.recipe.seed for one in runs] == [0] * 4 + [1] * 4

    def test_two_at_once_are_refused(self, folder):
        one = study.Folder(Path("runs"), study.load(Path("tiny.toml")))
        with one.lock(), pytest.raises(UserError, match="is being written by process"), one.lock():
            pass
