"""Runs that survive anything, in miniature; `make chaos` is the same at length, on the embedded default as shipped."""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.chaos import faults, kills, outcome
from tests.chaos.launch import Launch
from tests.conftest import cut, selfimprove
from tests.paths import ROOT

KILLS = int(os.environ.get("CHAOS_KILLS", "6"))
READERS = int(os.environ.get("CHAOS_READERS", "8"))
FULL = "CHAOS_FULL" in os.environ
SMALL = [
    "--set", "data.seeds=seeds.jsonl", "--set", "data.heldout=heldout.jsonl",
    "--set", "synthesize.prompts=40", "--set", "generate.n=3", "--set", "evaluate.n=1",
    "--set", "synthesize.generator.epochs=2", "--set", "machine.checkpoint_steps=2",
]  # fmt: skip
FAKE = ["--engine", "fake", "--rounds", "2", *SMALL]
REAL = ["--rounds", "1", *SMALL]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of all runs of this file, with small data."""
    path = tmp_path_factory.mktemp("chaos")
    with contextlib.chdir(path):
        cut(60)
        yield path


@pytest.fixture(scope="module")
def campaign(folder: Path) -> kills.Campaign:
    """An uninterrupted run of the fake engine, `whole`, and what is known of it."""
    made = kills.Campaign(folder, FAKE)
    made.make_whole()
    return made


def go(folder: Path, run: str, **options: object) -> Launch:
    """Begin the run, or go on with it; returns when it ended by itself."""
    launch = start(folder, run, **options)
    assert launch.wait(300) == "ended"
    launch.kill()
    return launch


def start(folder: Path, run: str, arguments: list[str] | None = None, **options: object) -> Launch:
    begun = (folder / "runs" / run / "recipe.toml").is_file()
    command = ["resume", run] if begun else ["iterate", *(arguments or FAKE), "--run", run]
    return Launch(folder, run, command, **options)  # type: ignore[arg-type]


def at(stage: str, moment: str, count: int = 1) -> dict[str, object]:
    """A target of driver.Ledger: that very moment."""
    return {"stage": stage, "later": ["ending"], "moment": moment, "count": count, "exact": True}


def is_whole(folder: Path, run: str) -> None:
    """The run is what an uninterrupted one is, and nothing was had twice or lost."""
    there, whole = folder / "runs" / run, folder / "runs" / kills.WHOLE
    assert outcome.differences(there, whole) == []
    assert outcome.rows(there) == outcome.rows(whole)
    assert outcome.repeated(folder / f"{run}.ledger") == 0


class TestKills:
    def test_sigkill_at_random_moments_changes_loses_and_repeats_nothing(self, campaign):
        campaign.perform(KILLS)
        told = campaign.report()
        print(kills.table(told))
        assert told["kills"] == KILLS
        assert told["wrong"] == []
        assert (told["rows repeated"], told["rows lost"]) == (0, 0)
        assert told["answers kept"] > 0

    def test_real_vllm_a_dead_engine_host_and_a_kill_of_everything(self, folder):
        real = folder / "real"
        real.mkdir()
        with contextlib.chdir(real):
            cut(60)
            whole = kills.Campaign(real, REAL)
            whole.make_whole()
            launch = start(real, "r", REAL, target=at("iter-000/1-evaluate", "put", 20) | {"exact": False})
            assert launch.wait(300) == "moment"
            host(launch).kill()
            published = real / "runs/r/iter-000/3-control-evaluate"
            while (ended := launch.wait(0.1)) != "ended" and not published.exists():
                continue  # it starts another engine and goes on
            launch.kill()
            if ended == "ended":  # or says one sentence
                assert launch.process.returncode == 1, launch.said()
                assert "Traceback" not in launch.said()
                assert "selfimprove resume" in launch.said()
                launch = start(real, "r", target=at("iter-001/2-generate", "put", 30))
                assert launch.wait(300) == "moment"
                assert launch.kill() >= 2
            assert go(real, "r").process.returncode == 0
            is_whole(real, "r")

    def test_sigterm_stops_at_a_safe_point_and_the_run_goes_on(self, campaign, folder):
        launch = start(folder, "terminated", target=at("iter-001/2-generate", "put", 9) | {"exact": False})
        assert launch.wait(300) == "moment"
        launch.process.terminate()
        assert launch.wait(60) == "ended"
        launch.kill()
        assert launch.process.returncode == 130
        assert "selfimprove resume" in launch.said()
        assert not list((folder / "runs/terminated").glob("iter-*/*.partial"))
        assert go(folder, "terminated").process.returncode == 0
        is_whole(folder, "terminated")

    @pytest.mark.skipif(not FULL, reason="waits for the watchdog's minute; make chaos does")
    def test_a_hung_engine_is_found_and_ended(self, folder):
        hung = folder / "hung"
        hung.mkdir()
        with contextlib.chdir(hung):
            cut(60)
            whole = kills.Campaign(hung, [*REAL, "--set", "machine.engine_timeout_s=60"])
            whole.make_whole()
            launch = start(hung, "r", whole.known["arguments"], target=at("iter-000/1-evaluate", "put", 20))
            assert launch.wait(300) == "moment"
            host(launch).suspend()
            launch.process.send_signal(signal.SIGCONT)
            ended = launch.wait(400)
            launch.kill()
            assert ended == "ended"
            if launch.process.returncode:
                assert go(hung, "r").process.returncode == 0
            is_whole(hung, "r")


def host(launch: Launch) -> psutil.Process:
    """The engine's process."""
    [found] = [p for p in launch.everything() if "selfimprove.engine.host" in " ".join(p.cmdline())]
    return found


class TestDisk:
    def test_a_full_disk_stops_with_one_sentence_and_tears_nothing(self, campaign, folder):
        whole = folder / "runs" / kills.WHOLE
        size = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
        small = folder / "small"
        failed = 0
        with faults.small_disk(small / "runs", 64 << 10), contextlib.chdir(small):
            cut(60)
            for share in (0.1, 0.35, 0.6, 0.85, 3):
                faults.grow(small / "runs", int(size * share))
                ended = go(small, "full")
                if ended.process.returncode == 0:
                    break
                failed += 1
                assert ended.process.returncode == 1
                assert "Traceback" not in ended.said()
                assert "disk" in ended.said() or "No space left" in ended.said()
                assert not list((small / "runs/full").glob("iter-*/*.partial"))
            assert failed >= 2
            assert ended.process.returncode == 0, ended.said()
            shutil.copytree(small / "runs/full", folder / "runs/full", symlinks=True)
        shutil.copyfile(small / "full.ledger", folder / "full.ledger")
        is_whole(folder, "full")

    def test_writes_that_fail_stop_with_one_sentence_and_tear_nothing(self, campaign, folder, tmp_path):
        shim = faults.shim(tmp_path)
        faulty = (
            ("write", "1-evaluate.partial/samples-"),  # Arrow
            ("write", "/checkpoint-000-00000002.tmp/"),  # safetensors
            ("write", ".part"),  # an answer
            ("fsync", ".done."),  # a shard's answers
            ("fsync", "3-control-evaluate.partial/samples-"),
            ("write", "manifest.json.tmp"),
            ("rename", "1-synthesize.partial"),
            ("open", "2-generate.partial/generations-"),
            ("write", "4-train.partial/policy/"),
            ("rename", "state.json.tmp"),
            ("write", "scores.json"),
        )
        for call, path in faulty if FULL else faulty[:5]:
            number = errno.EIO if path != "4-train.partial/policy/" else errno.EROFS
            fault = {"FAULT_CALL": call, "FAULT_PATH": path, "FAULT_ERRNO": str(number), "LD_PRELOAD": str(shim)}
            ended = go(folder, "failing", environment=fault)
            said = ended.said()
            assert ended.process.returncode == 1, (call, path, said)
            assert "Traceback" not in said, (call, path, said)
            assert os.strerror(number) in said, (call, path, said)
            assert not list((folder / "runs/failing").glob("iter-*/*.partial")), (call, path)
        assert go(folder, "failing").process.returncode == 0
        is_whole(folder, "failing")

    def test_a_power_cut_takes_what_was_not_flushed_and_no_more(self, campaign, folder, tmp_path):
        shim, log, dice = faults.shim(tmp_path), tmp_path / "log", random.Random(0)
        memory = {"FAULT_LOG": str(log), "LD_PRELOAD": str(shim)}
        torn: Counter[str] = Counter()
        moments = [("iter-000/1-evaluate", "put"), ("iter-000/2-control", "step"), ("iter-000/2-control", "publish")]
        moments += [("iter-001/1-synthesize", "put"), ("iter-001/2-generate", "manifest"), ("iter-001/4-train", "step")]
        for stage, moment in moments if FULL else [*moments[:2], moments[-1]]:
            count = max(1, campaign.moments[stage, moment] * 2 // 3)
            launch = start(folder, "dark", target=at(stage, moment, count), environment=memory)
            assert launch.wait(300) == "moment", launch.said()
            launch.kill()
            torn.update(path.name for path in faults.cut_power(log, dice))
            assert Launch(folder, "dark", ["verify", "dark"]).wait(60) == "ended"
        print(dict(torn))
        assert any(name.endswith(".part") for name in torn)
        assert "metrics.jsonl" in torn or not FULL
        assert go(folder, "dark").process.returncode == 0
        there, whole = folder / "runs" / "dark", folder / "runs" / kills.WHOLE
        assert outcome.differences(there, whole) == []  # what was not flushed may be asked again


class TestOthers:
    def test_a_second_writer_is_refused_and_readers_see_whole_things(self, campaign, folder, tmp_path):
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        command = [sys.executable, "-m", "tests.chaos.reader", "read", str(READERS), str(tmp_path)]
        readers = subprocess.Popen(command, cwd=folder, env={**os.environ, "PYTHONPATH": path, "TQDM_DISABLE": "1"})
        while not (tmp_path / "ready").exists():
            assert readers.poll() is None
            time.sleep(0.05)
        first = start(folder, "read", target=at("iter-001/2-generate", "manifest") | {"exact": False})
        try:
            assert first.wait(300) == "moment", first.said()
            os.kill(first.process.pid, signal.SIGSTOP)  # else it may have ended before the second has begun
            second = selfimprove("resume", "read")
            os.kill(first.process.pid, signal.SIGCONT)
            assert first.wait(300) == "ended"
        finally:
            first.kill()
            (tmp_path / "stop").touch()
            readers.wait(60)
        assert second.code == 1
        assert f"is being written by process {first.process.pid}" in second.err
        assert first.process.returncode == 0
        is_whole(folder, "read")
        told = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(READERS)]
        assert [wrong for one in told for wrong in one["wrong"]] == []
        seen = sum((Counter(one["seen"]) for one in told), Counter[str]())
        print(dict(seen))
        assert {"status 0", "plan 0", "verify 0", "inspect 0"} <= seen.keys()
        assert seen["tables read"] > 0
