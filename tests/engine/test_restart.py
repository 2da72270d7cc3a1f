"""A vLLM host that is killed or hangs in the middle: another one answers what is missing, each row once."""

import math
import os
import random
import signal
import threading
import time

import psutil
import pytest

from selfimprove import data, interrupts
from selfimprove.chat import Chat
from selfimprove.engine import process
from selfimprove.engine.protocol import EngineDied, Options, Request, Sampling
from selfimprove.engine.vllm_engine import VllmEngine
from selfimprove.errors import UserError
from selfimprove.execution import Lost, ask
from selfimprove.execution.shard import POISONED
from tests.executing import MODEL, inline
from tests.executing import work as question

OPTIONS = Options(
    dtype="float32", max_model_len=256, max_num_seqs=8, kv_cache_gib=1, gpu_memory_utilization=0.5, threads=1,
    timeout=300.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    engine = VllmEngine(MODEL, OPTIONS, tmp_path_factory.mktemp("log") / "engine.log")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def work():
    chat = Chat(MODEL)
    rng = random.Random(0)
    prompts = [chat.prompt_ids(row.prompt) for row in data.read_heldout(data.SHIPPED["demo:heldout"])[:120]]
    requests = [Request(ids, 2, rng.randrange(2**31)) for ids in prompts]
    return requests, Sampling(temperature=1.0, top_p=1.0, max_tokens=24, stop_token_ids=chat.stop_token_ids)


@pytest.fixture(scope="module")
def undisturbed(engine, work):
    return engine.generate(*work, lambda number, answers: None)


class Told:
    """What `finished` heard, and something that happens after some rows."""

    def __init__(self, after=None, then=None):
        self.rows, self.after, self.then = [], after, then

    def __call__(self, number, answers):
        self.rows.append(number)
        if len(self.rows) == self.after:
            self.then()


class Noting:
    """An engine whose caller is told of each row, by its seed, through a Told as well."""

    def __init__(self, inside, told=lambda number, answers: None):
        self.inside, self.told = inside, told

    def swap(self, model):
        self.inside.swap(model)

    def generate(self, requests, sampling, finished):
        def both(number, answers):
            finished(number, answers)
            self.told(requests[number].seed, answers)

        return self.inside.generate(requests, sampling, both)

    def prompt_logprobs(self, sequences):
        self.told(len(sequences), None)
        return self.inside.prompt_logprobs(sequences)


def carried(engine, work, folder, told):
    """The answers as a stage gets them."""
    requests, sampling = work
    return list(ask(inline(Noting(engine, told)), folder, question("complete", sampling), requests))


def tokens(answers):
    return [[one.token_ids for one in row] for row in answers]


def seeds(work):
    return sorted(request.seed for request in work[0])


def test_an_engine_tries_once_and_what_it_told_before_counts(engine, work, undisturbed):
    told = Told(30, lambda: engine._host.process.kill())
    with pytest.raises(EngineDied, match=r"the engine failed: the engine process ended with code -9") as raised:
        engine.generate(*work, told)
    assert str(engine.log) in raised.value.hint
    assert 30 <= len(set(told.rows)) == len(told.rows) < len(work[0])
    rest = [i for i in range(len(work[0])) if i not in told.rows]
    found = engine.generate([work[0][i] for i in rest], work[1], Told())
    assert tokens(found) == [tokens(undisturbed)[i] for i in rest]


def test_a_killed_host_is_replaced_and_each_row_is_told_once(engine, work, undisturbed, tmp_path):
    starts, told = engine.starts, Told(30, lambda: engine._host.process.kill())
    found = carried(engine, work, tmp_path, told)
    assert tokens(found) == tokens(undisturbed)
    assert sorted(told.rows) == seeds(work)
    assert engine.starts == starts + 1
    assert "started again" in engine.log.read_text()


@pytest.mark.skipif("CHAOS_FULL" not in os.environ, reason="an engine start for each death: CHAOS_FULL=1")
def test_a_row_on_which_the_host_dies_each_time_is_left_out_and_all_others_are_answered(
    engine, work, undisturbed, tmp_path
):
    victim, starts = work[0][45].seed, engine.starts

    def told(seed, answers):
        if seed == victim:  # before its answer is kept
            engine._host.process.kill()
            raise process.HostGone("the host died on this row")

    found = carried_first(engine, work, tmp_path, told)
    assert found[45] == Lost(POISONED)
    assert tokens(found[:45] + found[46:]) == tokens(undisturbed[:45] + undisturbed[46:])
    assert 2 <= engine.starts - starts <= 2 + 2 * math.log2(len(found))


def carried_first(engine, work, folder, told):
    """As `carried`, but what is told comes before the answer is kept."""

    class Before(Noting):
        def generate(self, requests, sampling, finished):
            def both(number, answers):
                self.told(requests[number].seed, answers)
                finished(number, answers)

            return self.inside.generate(requests, sampling, both)

    requests, sampling = work
    return list(ask(inline(Before(engine, told)), folder, question("complete", sampling), requests))


def test_a_stopped_host_counts_as_hung_and_is_replaced(engine, work, undisturbed, tmp_path):
    starts = engine.starts
    process = engine._host.process.pid

    def hang():
        engine._host._patience = 3.0  # of this host alone: the next one needs its time to start
        os.kill(process, signal.SIGSTOP)

    told = Told(30, hang)
    found = carried(engine, work, tmp_path, told)
    assert tokens(found) == tokens(undisturbed)
    assert sorted(told.rows) == seeds(work)
    assert engine.starts == starts + 1
    assert "hung" in engine.log.read_text()
    assert not psutil.pid_exists(process)


def test_scores_come_from_another_host_where_one_is_gone(engine, work, tmp_path):
    sequences = [request.prompt_token_ids for request in work[0][:10]]
    whole = engine.prompt_logprobs(sequences)
    told = Told(1, lambda: engine._host.process.kill())
    found = list(ask(inline(Noting(engine, told)), tmp_path, question("score"), sequences))
    assert len(told.rows) == 2  # the one that failed and another
    for one, other in zip(found, whole, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_ctrl_c_begins_nothing_new_and_finishes_what_was_begun(engine, work, undisturbed):
    told = Told(20, lambda: os.kill(os.getpid(), signal.SIGINT))
    with interrupts.Interrupts(lambda: None), pytest.raises(KeyboardInterrupt):
        engine.generate(*work, told)
    begun = len(told.rows)
    assert 20 <= begun < len(work[0])
    rest = [i for i in range(len(work[0])) if i not in told.rows]
    starts = engine.starts
    found = engine.generate([work[0][i] for i in rest], work[1], lambda number, answers: None)
    assert tokens(found) == [tokens(undisturbed)[i] for i in rest]
    assert engine.starts == starts  # the same engine goes on, as a study's does


def test_a_second_ctrl_c_ends_it_at_once_and_the_engine_is_not_left_in_the_middle(engine, work, undisturbed):
    os.kill(engine._host.process.pid, signal.SIGSTOP)  # so that what is begun never ends
    for delay in (1.0, 2.0):
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with interrupts.Interrupts(lambda: None), pytest.raises(KeyboardInterrupt):
        engine.generate(*work, Told())
    assert 1.9 < time.monotonic() - began < 10
    assert tokens(engine.generate(work[0][:3], work[1], Told())) == tokens(undisturbed[:3])


def test_a_death_quotes_the_last_words_of_the_log(tmp_path):
    log = tmp_path / "engine.log"
    log.write_text("selfimprove: engine start\nloading\nout of luck\n")
    error = process.died(log, process.HostGone("it ended"))
    assert isinstance(error, EngineDied)
    assert error.message == "the engine failed: it ended; its last words: loading | out of luck"


def test_an_engine_that_dies_while_it_starts_is_started_once_more(tmp_path):
    lives = process.Lives(tmp_path / "engine.log")
    assert [lives.left(process.HostGone("it ended")) for _ in range(2)] == [True, False]


def test_a_host_that_dies_at_every_start_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(
        process, "_environment", lambda options: {**os.environ, "PYTHONPATH": "/nowhere", "PYTHONHOME": "/nowhere"}
    )
    engine = VllmEngine(MODEL, OPTIONS, tmp_path / "engine.log")
    with pytest.raises(UserError, match=r"could not serve .* ended with code .*last words: .*No module named"):
        engine.swap(MODEL)
    assert engine.starts == 2
