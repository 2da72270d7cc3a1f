"""Judges on a server: nothing is lost, nothing is paid twice, whatever the server and the machine do."""

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import traceback

import pytest

from selfimprove import recipe
from selfimprove.errors import UserError
from selfimprove.judges import calls
from selfimprove.judges.journal import Journal
from selfimprove.judges.protocol import Question, Replies
from selfimprove.judges.purse import TEMPLATE_TOKENS
from selfimprove.judges.server import NOT_UNICODE, Client
from tests.judges import ask_server
from tests.judges.misbehaving import (
    COMPLETION_TOKENS,
    FAULTS,
    PROMPT_TOKENS,
    Server,
    completion,
    fault,
    logprobs,
    reply,
)
from tests.paths import ROOT

SECRET = "sk-planted-5ecre7"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(calls, "FIRST_WAIT", 0.01)


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "cache" / "answers.sqlite")


def well(handler, asked, number):
    handler.answer(asked)


def section(server, **settings):
    return recipe.Server(**{"url": server.url, "model": "m", "timeout_seconds": 5.0, **settings})


def client(server, journal, progress=lambda what, done, total: None, account=None, **settings):
    return Client("s", section(server, **settings), journal, progress, account)


def questions(number, prefix="question"):
    return [Question(f"q{i}", f"{prefix} {i}") for i in range(number)]


def seeds(number):
    return [1000 + 10 * i for i in range(number)]


def expected(asked, given, n=1):
    return [Replies(tuple(reply(q.text, s + k) for k in range(n))) for q, s in zip(asked, given, strict=True)]


# --- a server that misbehaves -----------------------------------------------------------------------------------------


PATIENCE, SLOW = 2.0, 2.4  # seconds: a busy machine is slow too


def at_random(seed, share=0.4):
    """Any fault for any attempt, up to eight in a row."""

    def behave(handler, asked, number):
        dice = random.Random(f"{seed}/{asked.text}/{asked.seed}/{number}")
        if number <= 8 and dice.random() < share:
            fault(handler, asked, dice.choice(FAULTS), SLOW)
        elif asked.n > 1 and dice.random() < 0.3:
            handler.answer(asked, n=dice.randrange(1, asked.n))
        else:
            handler.answer(asked)

    return behave


@pytest.mark.parametrize("seed", range(2))
def test_every_fault_at_random_loses_nothing_and_repeats_nothing(journal, seed):
    asked, given = questions(200), seeds(200)
    with Server(at_random(seed)) as server:
        one = client(server, journal, attempts=20, timeout_seconds=PATIENCE)
        assert one.ask(asked, given, 2, 1.0, 8) == expected(asked, given, 2)
        assert len(server.asked) > 280  # it did misbehave
        assert server.answered == {(q.text, s + k): 1 for q, s in zip(asked, given, strict=True) for k in range(2)}
        before = len(server.asked)
        again = client(server, journal)
        assert again.ask(asked, given, 2, 1.0, 8) == expected(asked, given, 2)
        assert len(server.asked) == before
        assert (again.spent.cached, again.spent.requests) == (400, 0)


@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault_is_survived_and_named_when_it_does_not_end(journal, kind):
    def behave(handler, asked, number):
        if asked.text == "never" or (asked.text == "later" and number < 3):
            fault(handler, asked, kind, slow=1.3)
        else:
            handler.answer(asked)

    with Server(behave) as server:
        one = client(server, journal, attempts=3, timeout_seconds=1.0 if kind == "slow" else 5.0)
        assert one.ask([Question("q", "later")], [5], 1, 0.0, 8)[0].texts == (reply("later", 5),)
        with pytest.raises(UserError) as ended:
            one.ask([Question("a", "fine"), Question("q", "never")], [5, 5], 1, 0.0, 8)
        words = {"429": "slow down", "500": "Internal Server Error", "slow": "no answer within 1 s"}
        words |= {"wrong content type": "text/html", "200 with an error": "upstream overloaded", "closed": "disconnect"}
        assert words.get(kind, "") in ended.value.message
        assert "3 attempts" in ended.value.message
        assert "resume" in ended.value.hint
        assert server.tries["never", 5] == 3
        assert one.ask([Question("a", "fine")], [5], 1, 0.0, 8)[0].texts == (reply("fine", 5),)
        assert server.answered["fine", 5] == 1


def test_a_full_answer_counts_whatever_its_content_type(journal):
    with Server(lambda h, asked, number: h.say(200, completion(asked), {"Content-Type": "text/plain"})) as server:
        assert client(server, journal).ask(questions(1), [1], 1, 0.0, 8) == expected(questions(1), [1])
        assert len(server.asked) == 1


def test_a_server_that_is_not_there_ends_the_stage(journal):
    with Server(well) as server:
        url = server.url
    gone = Client("gone", recipe.Server(url=url, model="m", attempts=2), journal, lambda *told: None)
    with pytest.raises(UserError, match=r"server 'gone' gave no answer in 2 attempts"):
        gone.ask(questions(3), seeds(3), 1, 0.0, 8)


@pytest.mark.parametrize(
    ("status", "error", "hint"),
    [
        (400, {"message": "temperature must be below 2", "code": "invalid_value"}, "check what the judge sets"),
        (401, {"message": "bad key"}, "api_key_env"),
        (403, {"message": "no access"}, "may use 'm'"),
        (404, {"message": "no such model"}, "/v1/models"),
        (429, {"message": "no money left", "code": "insufficient_quota"}, "balance"),
    ],
)
def test_what_no_attempt_can_mend_ends_at_once(journal, status, error, hint):
    with Server(lambda handler, asked, number: handler.say(status, {"error": error})) as server:
        with pytest.raises(UserError) as ended:
            client(server, journal, concurrency=4).ask(questions(50), seeds(50), 1, 0.0, 8)
        assert error["message"] in ended.value.message
        assert hint in ended.value.hint
        assert len(server.asked) <= 4


def test_when_one_request_ends_the_stage_those_under_way_are_kept_and_no_other_begins(journal):
    def behave(handler, asked, number):
        if asked.text == "question 5":
            handler.say(401, {"error": {"message": "bad key"}})
        else:
            time.sleep(0.3)
            handler.answer(asked)

    with Server(behave) as server:
        one = client(server, journal, concurrency=4)
        with pytest.raises(UserError, match="bad key"):
            one.ask(questions(100), seeds(100), 1, 0.0, 8)
        assert len(server.asked) <= 8
        assert one.spent.answers == sum(server.answered.values()) == len(server.asked) - 1


def test_what_is_about_one_request_leaves_the_others_alone(journal):
    wrong = {
        "long": (400, {"message": "maximum context length is 512 tokens", "code": "context_length_exceeded"}),
        "big": (413, {"message": "Payload Too Large"}),
        "bad": (400, {"message": "your prompt was flagged as violating our usage policy", "code": "invalid_prompt"}),
    }

    def behave(handler, asked, number):
        if asked.text in wrong:
            status, error = wrong[asked.text]
            handler.say(status, {"error": error})
        elif asked.text == "filtered":
            handler.answer(asked, message={"content": None}, finish_reason="content_filter")
        elif asked.text == "refused":
            handler.answer(asked, message={"content": None, "refusal": "I will not."})
        else:
            handler.answer(asked)

    texts = ["a", *wrong, "filtered", "refused", "b"]
    with Server(behave) as server:
        one = client(server, journal)
        found = one.ask([Question(t, t) for t in texts], [1] * len(texts), 2, 0.0, 8)
        assert [bool(replies.texts) for replies in found] == [True, False, False, False, False, False, True]
        assert all(replies.reason for replies in found[1:-1])
        assert "context length" in found[1].reason
        assert one.choose([Question("q", "long")], ("A", "B")) == [None]
        assert all(server.tries[text, 1] == 1 for text in texts)


def test_texts_that_are_hard_to_send(journal):
    hard = ["\ud800 alone", "nul \x00 in it", "x" * 100_000, "", "\u2028 \U0001f600 \ufffe"]
    with Server(well) as server:
        found = client(server, journal).ask([Question(str(i), t) for i, t in enumerate(hard)], [1] * 5, 1, 0.0, 8)
        assert found[0] == Replies((), NOT_UNICODE)
        assert sorted(asked.text for asked in server.asked) == sorted(hard[1:])
        assert [replies.texts for replies in found[1:]] == [(reply(t, 1).strip(),) for t in hard[1:]]
        assert client(server, journal).choose([Question("q", "\udfff")], ("A",)) == [None]


def test_half_a_character_in_a_reply_can_be_written(journal):
    def behave(handler, asked, number):
        handler.answer(asked, message={"content": "ok \ud83d"})

    with Server(behave) as server:
        [found] = client(server, journal).ask(questions(1), [1], 1, 0.0, 8)
    assert found.texts == ("ok \ufffd",)


# --- killed, interrupted, shared --------------------------------------------------------------------------------------


def start(server, path, concurrency=8, prices=()):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        str(ROOT / "tests/judges/ask_server.py"),
        server.url,
        str(path),
        str(concurrency),
        *prices,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def kept(path):
    """The answers in a journal, as another process reads them."""
    import sqlite3

    with contextlib.closing(sqlite3.connect(path)) as file:
        return {str(value, "utf-8") for (value,) in file.execute("SELECT value FROM answers")}


def test_a_killed_process_repeats_no_finished_request(tmp_path):
    path = tmp_path / "answers.sqlite"

    def behave(handler, asked, number):
        time.sleep(0.02)
        at_random(7, share=0.2)(handler, asked, number)

    with Server(behave) as server:
        for _ in range(2):
            goal = len(server.answered) + 60
            process = start(server, path)
            until(lambda goal=goal: len(server.answered) >= goal)
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            time.sleep(SLOW + 0.2)  # what is under way at the server comes to its end
            finished, since = kept(path), len(server.asked)
            assert 20 <= len(finished) < 200
        process = start(server, path)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        asked_again = {f'{{"text":"{reply(a.text, a.seed)}"}}' for a in server.asked[since:]}
        assert not finished & asked_again
        assert len(asked_again) == 200 - len(finished)
        assert out.splitlines() == [r.texts[0] for r in expected(ask_server.QUESTIONS, ask_server.SEEDS)]
        assert sum(server.answered.values()) <= 200 + 2 * 8  # those under way when it was killed


def test_what_a_killed_process_had_under_way_is_booked_at_its_worst(tmp_path):
    path = tmp_path / "answers.sqlite"
    prices = [str(PRICES["input_price"]), str(PRICES["output_price"])]

    def behave(handler, asked, number):
        time.sleep(0.1)
        handler.answer(asked)

    with Server(behave) as server:
        process = start(server, path, prices=prices)
        until(lambda: len(server.answered) >= 40)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        time.sleep(0.5)  # what is under way at the server comes to its end
        process = start(server, path, prices=prices)
        assert process.wait(timeout=60) == 0
        replies, sent = sum(server.answered.values()), len(server.asked)
    journal = Journal(path)
    counts = journal.counts("stage")
    worst = ((len("question 199") + TEMPLATE_TOKENS) * PRICES["input_price"] + 8 * PRICES["output_price"]) / 1e6
    assert 1 <= counts["unmeasured"] <= 8
    assert replies * PRICE <= journal.paid("stage") <= 200 * PRICE + counts["unmeasured"] * worst
    assert sent <= counts["requests"] <= sent + 8  # a request is counted before it goes out
    assert counts["answers"] == 200


def test_two_processes_share_a_journal(tmp_path):
    path = tmp_path / "answers.sqlite"
    with Server(well) as server:
        both = [start(server, path) for _ in range(2)]
        ended = [process.communicate(timeout=60) for process in both]
        assert [process.returncode for process in both] == [0, 0], ended
        assert ended[0][0] == ended[1][0] != ""
        assert len(kept(path)) == 200


@pytest.mark.parametrize("stuck", [False, True])
def test_an_interrupt_ends_it_within_a_second_and_keeps_what_arrived(journal, stuck):
    def behave(handler, asked, number):
        if int(asked.text.split()[1]) >= 20 and stuck:
            time.sleep(20)
        time.sleep(0.01)
        handler.answer(asked)

    begun = time.monotonic()
    calls_made = []

    def progress(what, done, total):
        calls_made.append((what, done, total))
        if done >= 20 and (not stuck or time.monotonic() - begun > 0.8):
            raise KeyboardInterrupt

    with Server(behave) as server:
        one = client(server, journal, progress, concurrency=4, timeout_seconds=60.0)
        with pytest.raises(KeyboardInterrupt):
            one.ask(questions(100), seeds(100), 1, 0.0, 8)
        assert time.monotonic() - begun < 5
        assert calls_made[0] == ("judging", 0, 100)
        assert [done for _, done, _ in calls_made] == sorted(done for _, done, _ in calls_made)
        assert threading.active_count() < 50
        server.behave = well
        assert client(server, journal).ask(questions(100), seeds(100), 1, 0.0, 8) == expected(
            questions(100), seeds(100)
        )
        assert sum(server.answered.values()) <= 100 + 4  # those under way


# --- pace and money ---------------------------------------------------------------------------------------------------


def test_no_more_at_once_and_no_more_a_minute_than_the_recipe_says(journal):
    def slowly(handler, asked, number):
        time.sleep(0.05)
        handler.answer(asked)

    with Server(slowly) as server:
        client(server, journal, concurrency=5).ask(questions(40), seeds(40), 1, 0.0, 8)
        assert server.busiest == 5
    with Server(slowly) as server:
        one = client(server, journal, requests_per_minute=1200)
        one.ask(questions(15), seeds(15), 1, 0.0, 8)
        one.ask(questions(15, "other"), seeds(15), 1, 0.0, 8)
        at = [asked.at for asked in server.asked]
        assert at[-1] - at[0] > 29 * 0.05 - 0.04
        assert max(sum(t <= other < t + 0.5 for other in at) for t in at) <= 12


def test_retry_after_is_obeyed_by_all(journal):
    said = []

    def behave(handler, asked, number):
        if not said:
            said.append(time.monotonic())
            handler.say(429, {"error": "slow down"}, {"Retry-After": "1"})
        else:
            time.sleep(0.05)
            handler.answer(asked)

    with Server(behave) as server:
        client(server, journal, concurrency=3).ask(questions(12), seeds(12), 1, 0.0, 8)
        early = [asked for asked in server.asked if said[0] + 0.3 < asked.at < said[0] + 0.95]
        assert early == []
        assert server.asked[-1].at > said[0] + 0.95
    ahead = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 7200))
    with (
        Server(lambda handler, asked, number: handler.say(503, "later", {"Retry-After": ahead})) as server,
        pytest.raises(UserError, match=r"asks to wait for 7\d\d\d s"),
    ):
        client(server, journal).ask(questions(1, "late"), [1], 1, 0.0, 8)


PRICES = {"input_price": 100.0, "output_price": 1000.0}  # USD per million tokens
PRICE = (PROMPT_TOKENS * 100 + COMPLETION_TOKENS * 1000) / 1e6


def test_what_it_costs_is_counted_and_told(journal):
    told = []
    with Server(well) as server:
        one = client(server, journal, lambda *what: told.append(what), **PRICES)
        one.ask(questions(10), seeds(10), 3, 1.0, 8)
        spent = one.spent
        assert (spent.requests, spent.answers, spent.cached, spent.unmeasured) == (10, 30, 0, 0)
        assert (spent.prompt_tokens, spent.completion_tokens) == (10 * PROMPT_TOKENS, 30 * COMPLETION_TOKENS)
        assert spent.usd == pytest.approx((10 * PROMPT_TOKENS * 100 + 30 * COMPLETION_TOKENS * 1000) / 1e6)
        assert told[0] == ("judging ($0.00)", 0, 10)
        assert told[-1] == (f"judging (${spent.usd:.2f})", 10, 10)
        free = client(server, journal, **PRICES)
        free.ask(questions(10), seeds(10), 3, 1.0, 8)
        assert (free.spent.usd, free.spent.cached) == (0, 30)


@pytest.mark.parametrize(
    ("kind", "booked"),
    [
        ("slow", 2),
        ("closed", 2),
        ("truncated JSON", 2),
        ("truncated body", 2),
        ("no choices", 2),
        ("429", 1),
        ("500", 1),
    ],
)
def test_what_a_server_does_not_count_is_booked_at_its_worst(journal, kind, booked):
    def behave(handler, asked, number):
        if number == 1:
            fault(handler, asked, kind, slow=1.3)
        else:
            handler.say(200, {**completion(asked), "usage": None})

    with Server(behave) as server:
        one = client(server, journal, **PRICES, timeout_seconds=1.0)
        one.ask([Question("q", "q" * 44)], [1], 1, 0.0, 8)
    assert one.spent.unmeasured == booked
    assert one.spent.usd == pytest.approx(booked * ((44 + 256) * 100 + 8 * 1000) / 1e6)


@pytest.mark.parametrize(
    ("usage", "unmeasured", "usd"),
    [
        ({"prompt_tokens": "30", "completion_tokens": 7.0}, 0, (30 * 100 + 7 * 1000) / 1e6),
        ({"prompt_tokens": -30, "completion_tokens": 7}, 1, ((44 + 256) * 100 + 8 * 1000) / 1e6),
        ({"prompt_tokens": "many", "completion_tokens": 7}, 1, ((44 + 256) * 100 + 8 * 1000) / 1e6),
        ("a lot", 1, ((44 + 256) * 100 + 8 * 1000) / 1e6),
    ],
)
def test_an_answer_is_kept_whatever_the_server_counts(journal, usage, unmeasured, usd):
    def behave(handler, asked, number):
        said = completion(asked)
        said["choices"][0]["index"] = None
        handler.say(200, {**said, "usage": usage})

    with Server(behave) as server:
        one = client(server, journal, **PRICES)
        assert one.ask([Question("q", "q" * 44)], [1], 1, 0.0, 8) == [Replies((reply("q" * 44, 1),))]
        assert len(server.asked) == 1
    assert one.spent.unmeasured == unmeasured
    assert one.spent.usd == pytest.approx(usd)


def test_a_server_that_charges_more_than_the_worst_passes_the_ceiling_once(journal):
    def behave(handler, asked, number):
        handler.say(200, {**completion(asked), "usage": {"prompt_tokens": 3_000, "completion_tokens": 7}})

    with Server(behave) as server, pytest.raises(UserError, match="of the ceiling"):
        client(server, journal, account="stage", ceiling_usd=1.0, concurrency=1, **PRICES).ask(
            questions(20), seeds(20), 1, 0.0, 8
        )
    price = (3_000 * 100 + 7 * 1000) / 1e6
    assert journal.paid("stage") == pytest.approx(3 * price)  # the fourth is reckoned at what the first three cost
    assert journal.paid("stage") < 1.0


@pytest.mark.parametrize("misbehaving", [False, True])
def test_the_ceiling_is_never_passed_and_the_stage_goes_on_from_it(journal, misbehaving):
    behave = at_random(3, share=0.3) if misbehaving else well
    prices = {**PRICES, "attempts": 20, "timeout_seconds": PATIENCE}
    asked, given = questions(60), seeds(60)
    with Server(behave) as server:
        ceiling = 30 * PRICE
        with pytest.raises(UserError, match=r"ceiling of \$0\.3") as ended:
            client(server, journal, account="stage", ceiling_usd=ceiling, **prices).ask(asked, given, 1, 0.0, 8)
        assert "ceiling_usd" in ended.value.hint
        answered = sum(server.answered.values())
        assert (0 if misbehaving else 24) <= answered <= 30  # up to what one request, or each that broke off, may cost
        assert answered * PRICE <= journal.paid("stage") <= ceiling
        requests = len(server.asked)
        with pytest.raises(UserError):  # to start it again is no way around
            client(server, journal, account="stage", ceiling_usd=ceiling, **prices).ask(asked, given, 1, 0.0, 8)
        assert len(server.asked) == requests
        other = client(server, journal, account="stage", ceiling_usd=100 * ceiling, **prices)
        assert other.ask(asked, given, 1, 0.0, 8) == expected(asked, given)
        assert other.spent.cached == answered
        assert max(server.answered.values()) == 1


def test_a_ceiling_without_prices_is_refused():
    with pytest.raises(ValueError, match="ceiling_usd needs input_price"):
        recipe.Server(url="http://x/v1", model="m", ceiling_usd=1.0)


# --- what is asked ----------------------------------------------------------------------------------------------------


def ignores_n(handler, asked, number):
    handler.answer(asked, n=1)


def refuses_n(handler, asked, number):
    if asked.n > 1:
        handler.say(400, {"error": {"message": "n > 1 is not supported", "param": "n"}})
    else:
        handler.answer(asked)


@pytest.mark.parametrize("behave", [well, ignores_n, refuses_n])
def test_n_replies_come_from_any_server_each_asked_once(journal, behave):
    asked, given = questions(20), seeds(20)
    with Server(behave) as server:
        one = client(server, journal, concurrency=4)
        assert one.ask(asked, given, 2, 1.0, 8) == expected(asked, given, 2)
        assert one.ask(asked, given, 5, 1.0, 8) == expected(asked, given, 5)
        assert max(server.answered.values()) == 1
        assert sum(server.answered.values()) == 100
        if behave is well:
            assert [asked.n for asked in server.asked] == [2] * 20 + [3] * 20


def test_the_request_is_what_the_recipe_says_and_nothing_from_the_environment(journal, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-this")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("OPENAI_ORG_ID", "not-this")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "not-this")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Custom: not-this")
    schema = {"type": "object", "properties": {"score": {"type": "number"}}}
    with Server(well) as server:
        client(server, journal).ask([Question("q", "hi")], [7], 1, 0.5, 9, schema)
        client(server, journal, structured_output=True).ask([Question("q", "hi")], [7], 1, 0.5, 9, schema)
        plain, shaped = server.asked
        said = {"messages": [{"role": "user", "content": "hi"}], "model": "m", "max_tokens": 9, "temperature": 0.5}
        assert plain.body == {**said, "seed": 7}
        assert shaped.body["response_format"]["json_schema"]["schema"] == schema
        assert "not-this" not in str(plain.headers)
        assert "authorization" not in plain.headers
    assert os.environ["OPENAI_ORG_ID"] == "not-this"


def test_everything_that_an_answer_depends_on_makes_another_request(journal):
    schema = {"type": "object"}
    with Server(well) as server, Server(well) as elsewhere:
        one = client(server, journal)
        base = ([Question("q", "hi")], [7], 1, 0.5, 9)
        for _ in range(2):
            one.ask(*base)
            one.ask([Question("another name", "hi")], [7], 1, 0.5, 9)  # the same request
            one.ask([Question("q", "ho")], [7], 1, 0.5, 9)
            one.ask([Question("q", "hi")], [8], 1, 0.5, 9)
            one.ask([Question("q", "hi")], [7], 1, 0.6, 9)
            one.ask([Question("q", "hi")], [7], 1, 0.5, 10)
            client(server, journal, model="other").ask(*base)
            client(server, journal, structured_output=True).ask(*base, schema)
            client(server, journal, concurrency=3, timeout_seconds=9.0, attempts=9).ask(*base)  # how, not what
            client(elsewhere, journal).ask(*base)
        assert (len(server.asked), len(elsewhere.asked)) == (7, 1)
        found = one.ask([Question("a", "same"), Question("b", "same")], [3, 3], 1, 0.0, 8)
        assert found[0] == found[1]
        assert server.tries["same", 3] == 1


def test_a_server_that_wants_max_completion_tokens_gets_it(journal):
    def behave(handler, asked, number):
        if "max_tokens" in asked.body:
            said = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'."
            handler.say(400, {"error": {"message": said, "param": "max_tokens", "code": "unsupported_parameter"}})
        else:
            handler.answer(asked)

    with Server(behave) as server:
        assert client(server, journal).ask(questions(20), seeds(20), 2, 0.0, 8) == expected(questions(20), seeds(20), 2)
        assert server.asked[-1].body["max_completion_tokens"] == 8
        assert server.asked[-1].n == 2


def test_the_options_share_the_probability_of_the_first_token(journal):
    tops = {
        "both": {"A": -1.0, " B": -2.0, " A": -3.0, "a": -0.1, "The": -0.2},
        "one": {"B": -1.0, "C": -0.1},
        "none": {"C": -0.1},
        "nothing": {},
    }

    def behave(handler, asked, number):
        assert asked.body["max_tokens"] == 1
        if asked.body["top_logprobs"] > 5:
            handler.say(400, {"error": {"message": "top_logprobs must be at most 5", "param": "top_logprobs"}})
        else:
            handler.answer(asked, **logprobs(tops[asked.text]))

    with Server(behave) as server:
        one = client(server, journal, concurrency=2)
        both, other, none, nothing = one.choose([Question(t, t) for t in tops], ("A", "B"))
        a, b = 2.718281828**-1 + 2.718281828**-3, 2.718281828**-2
        assert both == pytest.approx([a / (a + b), b / (a + b)])
        assert (other, none, nothing) == ([0.0, 1.0], None, None)
        assert one.choose([Question("q", "both")], ("a", "The"))[0] == pytest.approx([0.525, 0.475], abs=1e-3)
        assert sum(server.answered.values()) == 4  # other options are read from the same answer


@pytest.mark.parametrize("parts", [{}, {"logprobs": None}, {"logprobs": {"content": [{"token": "A", "logprob": 0.0}]}}])
def test_a_server_without_logprobs_is_told_apart(journal, parts):
    with Server(lambda handler, asked, number: handler.answer(asked, **parts)) as server:
        with pytest.raises(UserError, match="no log-probs") as ended:
            client(server, journal, concurrency=2).choose(questions(10), ("A", "B"))
        assert "read = 'reply'" in ended.value.hint
        assert len(server.asked) <= 4


# --- the key ----------------------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_written_nowhere(journal, tmp_path, monkeypatch, caplog):
    caplog.set_level("DEBUG")
    settings = {"api_key_env": "JUDGE_KEY", "attempts": 2}

    def behave(handler, asked, number):
        assert asked.headers["authorization"] == f"Bearer {SECRET}"
        if asked.text == "echo":
            handler.answer(asked, message={"content": f"your key is {asked.headers['authorization']}"})
        elif asked.text == "wrong":
            handler.say(401, {"error": {"message": f"Incorrect API key provided: {SECRET}"}})
        else:
            handler.say(500, f"{SECRET} broke me")

    with Server(behave) as server:
        one = client(server, journal, **settings)
        with pytest.raises(UserError, match="JUDGE_KEY"):
            one.ask([Question("q", "echo")], [1], 1, 0.0, 8)
        assert server.asked == []
        monkeypatch.setenv("JUDGE_KEY", f"{SECRET}\n")
        assert one.ask([Question("q", "echo")], [1], 1, 0.0, 8)[0].texts == ("your key is Bearer ***",)
        for text in ("wrong", "broken"):
            with pytest.raises(UserError, match=r"\*\*\*") as ended:
                one.ask([Question("q", text)], [1], 1, 0.0, 8)
            told = "".join(traceback.format_exception(ended.value)) + ended.value.hint + repr(ended.value)
            assert SECRET not in told
        monkeypatch.setenv("JUDGE_KEY", f"{SECRET}\nX-Other: 1")
        with pytest.raises(UserError, match="no API key") as ended:
            one.ask([Question("q", "more")], [1], 1, 0.0, 8)
        assert SECRET not in str(ended.value)
    assert SECRET not in caplog.text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 2  # the journal and its log
    assert not any(SECRET.encode() in path.read_bytes() for path in files)


# --- the journal ------------------------------------------------------------------------------------------------------


def test_an_answer_that_was_paid_for_stays_with_its_price(tmp_path):
    path = tmp_path / "answers.sqlite"
    one, other = Journal(path), Journal(path)
    one.put_paid({"a": b"1", "b": b"2"}, "stage", 0.25)
    other.put_paid({"a": b"3", "c": b"4"}, "stage", 0.5)
    assert other.get(["a", "b", "c", "d"]) == {"a": b"1", "b": b"2", "c": b"4"}
    assert (one.paid("stage"), one.paid("other")) == (0.75, 0.0)
    with pytest.raises(Exception, match="NOT NULL"):
        one.put_paid({"e": b"5", "f": None}, "stage", 1.0)
    assert one.get(["e"]) == {}
    assert other.paid("stage") == 0.75


def test_many_processes_may_open_a_journal_at_once(tmp_path):
    """New files, files of an earlier version and damaged ones, each opened by four processes at the same moment."""
    for number in range(0, 30, 3):
        with sqlite3.connect(tmp_path / f"{number}.sqlite") as old:
            old.execute("CREATE TABLE answers (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID")
        old.close()
        (tmp_path / f"{number + 1}.sqlite").write_bytes(b"x" * 10_000)
    script = (
        "import sys, pathlib, time; from selfimprove.judges.journal import Journal\n"
        "folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]\n"
        "for i in range(30):\n"
        "    (folder / f'{i}-{name}.here').touch()\n"
        "    end = time.monotonic() + 60\n"
        "    while len(list(folder.glob(f'{i}-*.here'))) < 4:\n"
        "        if time.monotonic() > end: sys.exit('another has ended')\n"
        "    Journal(folder / f'{i}.sqlite').put_paid({name: b'x'}, 'all', 1.0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    all_ = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), str(k)], env=environment, stderr=subprocess.PIPE)
        for k in range(4)
    ]
    errors = [process.communicate()[1].decode() for process in all_]
    assert [process.returncode for process in all_] == [0] * 4, errors
    for number in range(30):
        journal = Journal(tmp_path / f"{number}.sqlite")
        assert journal.paid("all") == 4.0
        assert len(journal.get(["0", "1", "2", "3"])) == 4
    assert len(list(tmp_path.glob("*.damaged-*"))) == 10
    assert sum(error.count("are damaged") for error in errors) == 10


def test_a_file_found_damaged_by_two_is_set_aside_by_one(tmp_path):
    path = tmp_path / "answers.sqlite"
    one, other = Journal(path), Journal(path)
    one.put_all({f"{k:064d}": b"x" * 900 for k in range(300)})
    one._file.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for journal in (one, other):
        journal._file.execute("PRAGMA shrink_memory")  # it would answer from what it has read
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    assert one.get([f"{k:064d}" for k in range(300)]) == {}
    one.put_paid({"a": b"paid for"}, "account", 1.0)
    assert other.get([f"{k:064d}" for k in range(300)]) == {}
    assert other.get(["a"]) == one.get(["a"]) == {"a": b"paid for"}
    assert other.paid("account") == 1.0
    assert len(list(tmp_path.glob("answers.sqlite.damaged-*[0-9]"))) == 1
