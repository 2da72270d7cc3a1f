"""Worker processes: what they answer is what one process answers, whatever happens to them meanwhile."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from selfimprove import interrupts, recipe
from selfimprove.chat import Chat
from selfimprove.data import SHIPPED, read_seeds
from selfimprove.engine import Engines
from selfimprove.engine.protocol import Request, Sampling
from selfimprove.errors import UserError
from selfimprove.execution import Lost, ask, local, shard
from selfimprove.execution.inline import Inline
from selfimprove.execution.local import Local
from tests.executing import MODEL, work
from tests.paths import ROOT

GONE = 5.0  # seconds
MACHINE = recipe.Machine(workers=2, engine_timeout_s=300)
HOOK = """
# Run by every worker before it begins: its fake engine is slow, dies on one row, and notes what was kept.
import os, signal, time
if os.environ.get("WORKER_NOTES"):
    from selfimprove.engine import fake_engine
    real = fake_engine.FakeEngine.generate
    def generate(self, requests, sampling, finished):
        def kept(number, completions):
            finished(number, completions)
            with open(os.environ["WORKER_NOTES"], "ab", buffering=0) as notes:
                notes.write(b"%d\\n" % requests[number].seed)
        found = []
        for number, request in enumerate(requests):
            fake_engine.interrupts.check()
            if str(request.seed) in os.environ.get("WORKER_POISON", "").split():
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(float(os.environ.get("WORKER_PAUSE", "0")))
            found += real(self, [request], sampling, lambda _, completions: kept(number, completions))
        return found
    fake_engine.FakeEngine.generate = generate
"""


@pytest.fixture(scope="module")
def asked():
    chat = Chat(MODEL)
    prompts = [chat.prompt_ids(seed.prompt) for seed in read_seeds(SHIPPED["demo:seeds"])[:150]]
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=24, stop_token_ids=chat.stop_token_ids)
    return work("complete", sampling), [Request(ids, 2, 1000 + k) for k, ids in enumerate(prompts)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(shard, "SMALLEST", 16)
    monkeypatch.setattr(shard, "PARTS", 10**6)


@pytest.fixture
def notes(tmp_path, monkeypatch):
    """Notes of the workers: the seed of each row that was kept."""
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setenv("WORKER_NOTES", str(tmp_path / "notes"))
    monkeypatch.setenv("WORKER_PAUSE", "0.01")
    return lambda: [int(seed) for seed in (tmp_path / "notes").read_text().split()]


@pytest.fixture
def workers(tmp_path, notes):
    executor = Local(MACHINE, tmp_path / "logs")
    yield executor
    executor.close()


@pytest.fixture(scope="module")
def alone(asked, tmp_path_factory):
    """What this process answers by itself, and the files."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch, Engines() as engines:
        patch.setattr(shard, "SMALLEST", 16)
        patch.setattr(shard, "PARTS", 10**6)
        found = list(ask(Inline(engines, recipe.Machine()), folder, *asked))
    return found, files(folder)


def files(folder):
    """All but what a worker that was killed was just about to publish, or to remove beside what it had published."""
    done = {path.stem for path in folder.glob("*.done")}
    rest = {path for path in folder.iterdir() if path.suffix in (".ask", ".part") and path.name.split(".")[0] in done}
    return {path.name: path.read_bytes() for path in {*folder.iterdir()} - rest if path.suffix != ".tmp"}


def processes(executor):
    return [psutil.Process(worker.process.pid) for worker in executor._workers]


class Then:
    """Does something once, when so many rows are answered."""

    def __init__(self, after, action):
        self.after, self.action, self.most = after, action, 0

    def __call__(self, answered):
        self.most = max(self.most, answered)
        if self.action and answered >= self.after:
            action, self.action = self.action, None
            action()


def is_whole(found, folder, alone, notes):
    """All is answered as by one process, and what was kept was not asked again."""
    assert found == alone[0]
    assert files(folder) == alone[1]
    assert sorted(notes()) == [1000 + k for k in range(150)]


def test_two_answer_as_one_and_each_starts_one_engine(workers, asked, alone, notes, tmp_path):
    told = Then(10**9, None)
    found = list(ask(workers, tmp_path / "shards", *asked, told))
    is_whole(found, tmp_path / "shards", alone, notes)
    assert told.most == 150
    pids = [process.pid for process in processes(workers)]
    again, rows = work("complete", asked[0].sampling, identity="other weights"), asked[1][:40]
    assert list(ask(workers, tmp_path / "shards", again, rows)) == alone[0][:40]
    assert [process.pid for process in processes(workers)] == pids
    workers.sleep(asked[0])
    workers.sleep(asked[0])
    assert list(ask(workers, tmp_path / "other", *asked)) == alone[0]
    assert [process.pid for process in processes(workers)] == pids


def test_a_worker_that_is_killed_is_replaced(workers, asked, alone, notes, tmp_path):
    killed = []

    def kill():
        killed.append(processes(workers)[0])
        killed[0].kill()

    is_whole(list(ask(workers, tmp_path / "shards", *asked, Then(40, kill))), tmp_path / "shards", alone, notes)
    assert killed[0].pid not in [process.pid for process in processes(workers)]


def test_a_row_on_which_workers_die_is_lost_and_all_else_is_answered(
    workers, asked, alone, notes, tmp_path, monkeypatch
):
    poison, rows = [0, 37], asked[1][:48]  # the first row of a shard, too: nothing is answered before it
    monkeypatch.setattr(shard, "SMALLEST", 8)
    monkeypatch.setenv("WORKER_POISON", " ".join(str(1000 + k) for k in poison))
    found = list(ask(workers, tmp_path / "shards", asked[0], rows))
    assert [k for k, one in enumerate(found) if isinstance(one, Lost)] == poison
    assert {found[k].reason for k in poison} == {"the engine dies on it"}
    healthy = [k for k in range(48) if k not in poison]
    assert [found[k] for k in healthy] == [alone[0][k] for k in healthy]
    assert sorted(notes()) == [1000 + k for k in healthy]
    assert list(ask(workers, tmp_path / "shards", asked[0], rows)) == found


def test_a_worker_that_hangs_is_ended_and_replaced(workers, asked, alone, notes, tmp_path, monkeypatch):
    hung = []

    def hang():
        hung.append(processes(workers)[1])
        hung[0].suspend()
        monkeypatch.setattr(local, "GRACE", 4.0 - MACHINE.engine_timeout_s)
        threading.Timer(6.0, monkeypatch.setattr, (local, "GRACE", 60.0)).start()  # the next one needs time to start

    is_whole(list(ask(workers, tmp_path / "shards", *asked, Then(40, hang))), tmp_path / "shards", alone, notes)
    assert not hung[0].is_running()


def test_a_worker_that_is_only_slow_is_not_taken_for_hung(workers, asked, tmp_path, monkeypatch):
    monkeypatch.setenv("WORKER_PAUSE", "7")
    patient = Then(0, lambda: monkeypatch.setattr(local, "GRACE", 4.0 - MACHINE.engine_timeout_s))
    [one] = ask(workers, tmp_path / "slow", asked[0], asked[1][:1], patient)
    assert not isinstance(one, Lost)
    assert patient.most == 1


def test_ctrl_c_finishes_what_was_begun_and_the_same_workers_go_on(workers, asked, alone, notes, tmp_path):
    with interrupts.Interrupts(lambda: None), pytest.raises(KeyboardInterrupt):
        list(ask(workers, tmp_path / "shards", *asked, Then(40, lambda: os.kill(os.getpid(), signal.SIGINT))))
    assert 40 <= len(notes()) < 150
    pids = [process.pid for process in processes(workers)]
    is_whole(list(ask(workers, tmp_path / "shards", *asked)), tmp_path / "shards", alone, notes)
    assert [process.pid for process in processes(workers)] == pids


def test_a_second_ctrl_c_ends_it_at_once(workers, asked, alone, notes, tmp_path):
    def twice():
        for process in processes(workers):
            process.suspend()
        os.kill(os.getpid(), signal.SIGINT)
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        began.append(time.monotonic())

    began: list[float] = []
    with interrupts.Interrupts(lambda: None), pytest.raises(KeyboardInterrupt):
        list(ask(workers, tmp_path / "shards", *asked, Then(40, twice)))
    assert time.monotonic() - began[0] < 5
    is_whole(list(ask(workers, tmp_path / "shards", *asked)), tmp_path / "shards", alone, notes)


def test_who_stops_listening_leaves_no_answer_behind_for_the_next_call(workers, asked, alone, notes, tmp_path):
    answers = ask(workers, tmp_path / "shards", *asked)
    assert next(answers) == alone[0][0]
    answers.close()
    is_whole(list(ask(workers, tmp_path / "shards", *asked)), tmp_path / "shards", alone, notes)


def test_what_fails_in_a_worker_is_told_as_it_would_be_in_this_process(workers, asked, tmp_path):
    (tmp_path / "empty").mkdir()
    nothing = work("complete", asked[0].sampling, model=str(tmp_path / "empty"))
    with pytest.raises(RuntimeError, match=r"(?s)worker \d: .*; its output is .*worker-\d\.log"):
        list(ask(workers, tmp_path / "shards", nothing, asked[1]))
    real = recipe.Engine(kind="transformers").model_dump(mode="json")
    judge = work("complete", asked[0].sampling, model=str(tmp_path / "empty"), policy=None, engine=real)
    with pytest.raises(UserError):
        list(ask(workers, tmp_path / "shards", judge, asked[1]))
    assert list(ask(workers, tmp_path / "shards", asked[0], asked[1][:40]))


def test_workers_that_do_not_come_up_are_given_up(tmp_path, asked, monkeypatch):
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    executor = Local(MACHINE, tmp_path / "logs")
    with pytest.raises(UserError, match=r"worker \d ended 3 times before it said a word .*code 1"):
        list(ask(executor, tmp_path / "shards", *asked))
    executor.close()


DRIVER = """
import sys
from pathlib import Path
import msgspec
from selfimprove import recipe
from selfimprove.engine.protocol import Request
from selfimprove.execution import ask, shard
from selfimprove.execution.local import Local
shard.SMALLEST, shard.PARTS = 16, 10**6
work = msgspec.msgpack.decode(Path("work").read_bytes(), type=shard.Work)
rows = msgspec.msgpack.decode(Path("rows").read_bytes(), type=list[Request])
executor = Local(recipe.Machine(workers=2), Path("logs"))
list(ask(executor, Path("shards").absolute(), work, rows, lambda count: print(count, flush=True)))
"""


def test_a_driver_that_is_killed_leaves_no_worker_and_another_goes_on(asked, alone, notes, tmp_path):
    import msgspec

    (tmp_path / "work").write_bytes(msgspec.msgpack.encode(asked[0]))
    (tmp_path / "rows").write_bytes(msgspec.msgpack.encode(asked[1]))
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    while int(driver.stdout.readline()) < 40:
        continue
    below = psutil.Process(driver.pid).children(recursive=True)
    assert len(below) == 2
    driver.kill()
    driver.wait()
    _, alive = psutil.wait_procs(below, timeout=GONE)
    assert [one for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []
    had = notes()
    assert 0 < len(had) < 150
    done = subprocess.run([sys.executable, "-c", DRIVER], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "shards") == alone[1]
    twice = len(notes()) - len(set(notes()))
    assert twice == 0


def test_there_are_no_more_workers_than_gpus(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    two = recipe.Machine(workers=2, tensor_parallel=2)
    assert local.device_groups(two) == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,GPU-ab,3,1,0")
    assert local.device_groups(two) == ["7,GPU-ab", "3,1"]
    with pytest.raises(UserError, match="3 workers of 2 GPUs need 6, and there are 5"):
        local.device_groups(recipe.Machine(workers=3, tensor_parallel=2))
