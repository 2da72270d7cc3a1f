"""Locks, children and Ctrl-C: who writes, who dies with whom, what a stop leaves behind."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from selfimprove import children, interrupts, locks
from selfimprove.errors import UserError
from selfimprove.judges.journal import Journal
from selfimprove.store import Run
from tests.chaos import outcome
from tests.conftest import QUICK, SMALL, selfimprove
from tests.test_run import contents, keys

GONE = 5.0  # seconds in which whatever a driver started is to be gone after it


def program(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "selfimprove", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def below(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def until(found, driver: subprocess.Popen[str], seconds: float = 240.0):
    """What `found` finds, as soon as it does."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert driver.poll() is None, driver.communicate()[1]
        if what := found():
            return what
        time.sleep(0.02)
    raise AssertionError("it never came to that")


def killed_alone(driver: subprocess.Popen[str], expected: int) -> None:
    """Kill the driver, nobody else, and see its descendants go."""
    descendants = below(driver.pid)
    assert len(descendants) >= expected
    driver.kill()
    driver.communicate()
    _, alive = psutil.wait_procs(descendants, timeout=GONE)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def shards(run: str, kind: str) -> list[Path]:
    """Files of answers, `part` or `done`, of the stage under way."""
    return [path for path in Path("runs", run).glob(f"scratch/*/shards/*.{kind}") if size(path)]


def size(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


class TestChildren:
    def test_the_engine_goes_with_a_driver_that_is_killed_while_it_samples(self, cut_data):
        driver = program("iterate", "--rounds", "1", "--run", "r", *SMALL)

        def sampling():
            return below(driver.pid) and shards("r", "part")

        until(sampling, driver)
        killed_alone(driver, 1)

    def test_training_processes_go_with_a_driver_that_is_killed(self, cut_data):
        driver = program(
            "iterate", "--rounds", "1", "--run", "r", *QUICK,
            "--set", "machine.num_processes=2", "--set", "control.optimizer.epochs=400",
        )  # fmt: skip

        def training():
            commands = []
            for child in below(driver.pid):
                with contextlib.suppress(psutil.Error):  # one that has just ended
                    commands.append(" ".join(child.cmdline()))
            return sum("selfimprove.training.launch" in one for one in commands) >= 3  # torchrun and its workers

        until(training, driver)
        time.sleep(1)
        killed_alone(driver, 3)

    def test_a_harness_that_never_ends_goes_too(self, tmp_path):
        """As every other child: a script that knows nothing of us."""
        code = (
            "import sys, time; from selfimprove import children;"
            "children.start([sys.executable, '-c', 'import time; time.sleep(600)']); time.sleep(600)"
        )
        driver = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        until(lambda: any("sleep(600)" in " ".join(c.cmdline()[-1:]) and "children" not in c.cmdline()[-1]
                          for c in below(driver.pid)), driver)  # fmt: skip
        killed_alone(driver, 1)

    def test_a_child_whose_parent_died_before_it_could_look_ends_by_itself(self):
        done = subprocess.run([sys.executable, "-I", "-S", children.__file__, "1", "/bin/echo", "alive"],
                              capture_output=True, text=True, timeout=20)  # fmt: skip
        assert (done.returncode, done.stdout) == (1, "")

    def test_end_ends_the_whole_group(self):
        child = children.start([sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '600'])"])
        while not below(child.pid):
            time.sleep(0.02)
        [grandchild] = below(child.pid)
        children.end(child)
        _, alive = psutil.wait_procs([grandchild], timeout=GONE)
        assert [one for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []
        children.end(child)  # once more does nothing


HOLD = """
import sys, time
from pathlib import Path
from selfimprove.store import Run
with Run(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(600)
"""


class TestLocks:
    def test_a_second_writer_is_told_who_and_since_when_and_a_dead_holder_holds_nothing(self, fake_run):
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(fake_run), "--password-like"], stdout=subprocess.PIPE, text=True
        )
        try:
            assert holder.stdout.readline() == "held\n"
            for command in (
                ["resume", "fake"],
                ["iterate", "--run", "fake", "--rounds", "2", "--engine", "fake", *SMALL],
                ["resume", "fake", "--from", "2/label"],
            ):
                result = selfimprove(*command)
                assert result.code == 1
                assert f"run 'fake' is being written by process {holder.pid} on " in result.err
                assert time.strftime("since %Y-", time.gmtime()) in result.err
            told = json.loads(selfimprove("status", "fake", "--json").out)["writer"]
            assert (told["pid"], told["host"]) == (holder.pid, locks.socket.gethostname())
            assert "--password-like" in told["command"]
            assert told["user"]
        finally:
            holder.kill()
            holder.wait()
        assert json.loads(selfimprove("status", "fake", "--json").out)["writer"] is None
        assert selfimprove("resume", "fake").code == 0
        assert not (fake_run / locks.NOTE).exists()

    def test_a_reader_needs_no_lock_and_takes_none(self, fake_run):
        with Run(fake_run).lock():
            for command in (["status", "fake"], ["plan", "fake"], ["verify", "fake"]):
                assert selfimprove(*command).code == 0

    def test_another_machines_holder_is_believed(self, tmp_path):
        with locks.held(tmp_path, "it", ""):
            note = json.loads((tmp_path / locks.NOTE).read_text())
        (tmp_path / locks.NOTE).write_text(json.dumps(note | {"host": "elsewhere", "pid": 2**22 + 1}))
        assert locks.holder(tmp_path).host == "elsewhere"
        (tmp_path / locks.NOTE).write_text(json.dumps(note | {"pid": 2**22 + 1}))
        assert locks.holder(tmp_path) is None
        (tmp_path / locks.NOTE).write_text('{"pid": ')
        assert locks.holder(tmp_path) is None

    def test_two_at_once_in_one_process_are_refused_too(self, tmp_path):
        written_by = f"it is being written by process {os.getpid()}"
        with (
            locks.held(tmp_path, "it", "hint"),
            pytest.raises(UserError, match=written_by),
            locks.held(tmp_path, "it", "hint"),
        ):
            pytest.fail("both hold it")


class TestStop:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_training_writes_a_checkpoint_and_goes_on_at_that_step(self, cut_data, number):
        """The checkpoints of the recipe are a hundred steps apart: this one is there because of the stop."""
        long = ["--set", "control.optimizer.epochs=40", "--set", "control.optimizer.batch_size=4"]
        driver = program("iterate", "--rounds", "1", "--run", "r", *QUICK, *long)
        lines = lambda: any(  # noqa: E731
            path.stat().st_size for path in Path("runs/r").glob("scratch/*/policy/metrics.jsonl")
        )
        until(lines, driver)
        driver.send_signal(number)
        _, err = driver.communicate(timeout=60)
        assert driver.returncode == 130
        assert "what is under way is finished and kept" in err
        [checkpoint] = Path("runs/r").glob("scratch/*/policy/checkpoint-*")
        done = json.loads((checkpoint / "progress.json").read_text())["lines"]
        assert done < 100
        assert selfimprove("resume", "r").code == 0
        steps = [
            json.loads(line)["step"]
            for line in Path("runs/r/iter-000/2-control/metrics.jsonl").read_text().splitlines()
        ]
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) > done

    def test_several_training_processes_stop_at_the_same_step(self, cut_data):
        driver = program(
            "iterate", "--rounds", "1", "--run", "r", *QUICK, "--set", "machine.num_processes=2",
            "--set", "control.optimizer.epochs=200",
        )  # fmt: skip
        until(lambda: any(p.stat().st_size for p in Path("runs/r").glob("scratch/*/policy/metrics.jsonl")), driver)
        driver.send_signal(signal.SIGINT)
        _, err = driver.communicate(timeout=120)
        assert driver.returncode == 130, err
        assert list(Path("runs/r").glob("scratch/*/policy/checkpoint-*"))

    def test_the_first_is_passed_on_once_and_what_takes_long_is_named(self, monkeypatch):
        said = []
        with interrupts.Interrupts(lambda: said.append("asked"), said.append) as entered:
            stop = interrupts.Stop("the kettle")
            assert not stop.due()
            os.kill(os.getpid(), signal.SIGTERM)
            assert entered.pending
            assert (stop.due(), stop.due()) == (True, False)
            monkeypatch.setattr(interrupts, "PATIENCE", 0.0)
            assert (stop.due(), stop.due()) == (False, False)
            assert said == ["asked", "the kettle"]
            with pytest.raises(KeyboardInterrupt):
                interrupts.check()
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        interrupts.check()  # nothing is left of it


def rows(count: int) -> dict[str, bytes]:
    return {f"{number:064d}": bytes([number % 251]) * 900 for number in range(count)}


class TestJournal:
    @pytest.mark.parametrize("damage", ["no database", "cut in half", "a torn page", "empty"])
    def test_a_damaged_file_is_set_aside_with_a_word(self, tmp_path, capsys, damage):
        path = tmp_path / "answers.sqlite"
        journal = Journal(path)
        journal.put_all(rows(300))
        journal.close()
        whole = path.read_bytes()
        page = len(whole) // 2 // 4096 * 4096
        path.write_bytes(
            {
                "no database": b"x" * 10_000,
                "cut in half": whole[:page],
                "a torn page": whole[:page] + b"\xff" * 4096 + whole[page + 4096 :],
                "empty": b"",
            }[damage]
        )
        again = Journal(path)
        found = again.get(list(rows(300)))
        assert found.items() <= rows(300).items()
        if damage != "empty":  # which SQLite takes for a new file
            assert "answers.sqlite are damaged" in capsys.readouterr().err
            assert list(tmp_path.glob("answers.sqlite.damaged-*"))
        again.put_all(rows(300))
        assert again.get(list(rows(300))) == rows(300)

    def test_a_value_that_was_torn_is_no_answer(self, tmp_path):
        path = tmp_path / "answers.sqlite"
        journal = Journal(path)
        journal.put_all(rows(50))
        journal.close()
        whole = path.read_bytes()
        at = whole.index(bytes([7]) * 900)
        path.write_bytes(whole[: at + 450] + b"\0" * 450 + whole[at + 900 :])  # SQLite sees nothing of it
        kept = rows(50)
        del kept[f"{7:064d}"]
        again = Journal(path)
        assert again.get(list(rows(50))) == kept
        again.put_paid(rows(50), "account", 1.0)  # an answer that is there stays, one that is broken does not
        assert again.get(list(rows(50))) == rows(50)

    def test_a_file_of_an_earlier_version_is_read(self, tmp_path):
        file = sqlite3.connect(tmp_path / "old.sqlite")
        file.execute("CREATE TABLE answers (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID")
        file.execute("INSERT INTO answers VALUES ('a', x'01')")
        file.commit()
        file.close()
        journal = Journal(tmp_path / "old.sqlite")
        journal.put("b", b"2")
        assert journal.get(["a", "b"]) == {"a": b"\x01", "b": b"2"}


class TestShards:
    @pytest.mark.parametrize("kind", ["part", "done"])
    def test_a_run_goes_on_where_answers_are_damaged(self, cut_data, kind):
        """Also: what a kill has left of an earlier stage's scratch goes."""
        assert selfimprove("iterate", "--rounds", "1", "--run", "whole", *QUICK).code == 0
        driver = program("iterate", "--rounds", "1", "--run", "r", *QUICK)
        until(lambda: shards("r", kind), driver)
        driver.kill()
        driver.communicate()
        for path in shards("r", kind):
            path.write_bytes(b"x" * 5000)
        done = json.loads(next(Path("runs/whole").glob("iter-001/1-*/manifest.json")).read_text())["key"][:32]
        (Path("runs/r/scratch") / done).mkdir(parents=True, exist_ok=True)
        result = selfimprove("resume", "r")
        assert result.code == 0, result.err
        assert "Traceback" not in result.err
        assert not Path("runs/r/scratch").exists()
        assert contents(Path("runs/r")) == contents(Path("runs/whole"))


class TestWorkers:
    def test_a_run_of_two_workers_publishes_what_a_run_of_one_does(self, cut_data):
        """Of a recipe that writes, judges, scores and trains; whole files, rows and keys."""
        for run, count in (("one", 1), ("two", 2)):
            result = selfimprove(
                "iterate", "--rounds", "2", "--run", run, *QUICK, "--set", f"machine.workers={count}"
            )  # fmt: skip
            assert result.code == 0, result.err
        one, two = Path("runs/one"), Path("runs/two")
        assert keys(one) == keys(two)
        assert contents(one) == contents(two)
        tables = [path.relative_to(one) for path in sorted(one.glob("iter-*/*/*.parquet"))]
        assert len(tables) > 10
        for table in tables:
            assert pq.read_table(one / table).to_pylist() == pq.read_table(two / table).to_pylist(), table
        assert outcome.rows(one) == outcome.rows(two)
        assert [path.name for path in sorted((two / "logs").glob("worker-*"))] == ["worker-0.log", "worker-1.log"]
        assert not list((one / "logs").glob("worker-*"))
