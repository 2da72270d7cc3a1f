"""The models that judges ask: seeds, contexts, the shards that keep every answer."""

import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from selfimprove import chat, data, recipe
from selfimprove.engine.fake_engine import FakeEngine
from selfimprove.engine.transformers_engine import TransformersEngine
from selfimprove.judges import Candidate
from selfimprove.judges.journal import Journal, request_key
from selfimprove.judges.pairwise import pairwise
from selfimprove.judges.protocol import Question
from selfimprove.judges.scorers import logps
from selfimprove.store import row_seed
from tests.executing import MODEL, models


class Counting:
    """An engine that notes what it is asked, and stops after some answers."""

    def __init__(self, inside, stop_after=10**9):
        self.inside, self.stop_after, self.asked = inside, stop_after, []

    def swap(self, model):
        self.inside.swap(model)

    def generate(self, requests, sampling, finished):
        def noted(number, completions):
            self.asked.append(requests[number])
            finished(number, completions)
            if len(self.asked) >= self.stop_after:
                raise KeyboardInterrupt

        return self.inside.generate(requests, sampling, noted)

    def prompt_logprobs(self, sequences):
        return self.inside.prompt_logprobs(sequences)


QUESTIONS = [Question(seed.prompt_id, seed.prompt) for seed in data.read_seeds(data.SHIPPED["demo:seeds"])[:40]]


def test_replies_keep_their_order_and_depend_on_the_name_alone(tmp_path):
    replies = models(FakeEngine(MODEL), tmp_path / "a").ask("current", QUESTIONS, 2, 1.0, 16)
    back = models(FakeEngine(MODEL), tmp_path / "b").ask("current", QUESTIONS[::-1], 2, 1.0, 16)
    assert replies == back[::-1]
    assert all(len(reply.texts) == 2 for reply in replies)
    assert len(set(replies)) > 1


def test_nothing_that_was_answered_is_asked_again(tmp_path):
    whole = models(FakeEngine(MODEL), tmp_path / "whole").ask("current", QUESTIONS, 2, 1.0, 16)
    first = Counting(FakeEngine(MODEL), stop_after=13)
    with pytest.raises(KeyboardInterrupt):
        models(first, tmp_path / "cut").ask("current", QUESTIONS, 2, 1.0, 16)
    second = Counting(FakeEngine(MODEL))
    assert models(second, tmp_path / "cut").ask("current", QUESTIONS, 2, 1.0, 16) == whole
    assert (len(first.asked), len(second.asked)) == (13, 27)
    assert not {r.seed for r in first.asked} & {r.seed for r in second.asked}
    third = models(None, tmp_path / "cut")  # no engine is opened where nothing is left to ask
    assert third.ask("current", QUESTIONS, 2, 1.0, 16) == whole


@pytest.mark.parametrize("other", ["temperature", "n", "seed", "weights", "context"])
def test_whatever_an_answer_depends_on_is_asked_anew(other, tmp_path):
    first = Counting(FakeEngine(MODEL))
    models(first, tmp_path).ask("current", QUESTIONS, 1, 0.5, 16)
    changed = {
        "seed": {"seed": lambda row: row_seed(1, 1, "label", row)},
        "weights": {"identities": {"current": "other weights"}},
        "context": {"engine_section": recipe.Engine(kind="fake", max_model_len=256)},
    }.get(other, {})
    second = Counting(FakeEngine(MODEL))
    asked = models(second, tmp_path, **changed)
    asked.ask("current", QUESTIONS, 2 if other == "n" else 1, 0.6 if other == "temperature" else 0.5, 16)
    assert len(second.asked) == len(QUESTIONS)


KILLED = """
import os, signal, sys
from pathlib import Path
from selfimprove.judges.journal import Journal
journal = Journal(Path(sys.argv[1]))
for k in range(10_000):
    journal.put(str(k), b"value %d" % k)
    print(k, flush=True)
"""


def test_a_killed_writer_leaves_every_answer_it_had_put(tmp_path):
    path = tmp_path / "answers.sqlite"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    for _ in range(500):
        last = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    rest = process.stdout.read().split()
    last = max([last, *(int(k) for k in rest)])
    process.wait()
    journal = Journal(path)
    found = journal.get([str(k) for k in range(last + 1)])
    assert found == {str(k): b"value %d" % k for k in range(last + 1)}
    journal.put("0", b"again")
    assert journal.get(["0", "missing"]) == {"0": b"again"}


def test_the_key_of_a_request_does_not_depend_on_the_order_of_its_parts():
    assert request_key({"a": 1, "b": [1, 2]}) == request_key({"b": [1, 2], "a": 1})
    assert request_key({"a": 1}) != request_key({"a": 2})


class TestRealModel:
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls):
        from selfimprove.engine.protocol import Options

        return TransformersEngine(MODEL, Options("float32", 512, 64, 1, 0.5, 1))

    def test_label_probabilities_are_those_of_the_next_token(self, engine, tmp_path):
        import torch

        ours = chat.Chat(MODEL)
        question = Question("q", "reverse order: rope shirt melon.")
        options = ("melon", "rope")
        [found] = models(engine, tmp_path).choose("current", [question], options)
        tokens = [ours.completion_ids(question.text, option)[0] for option in options]
        with torch.inference_mode():
            logits = engine.model(torch.tensor([ours.prompt_ids(question.text)])).logits[0, -1, tokens]
        assert sum(found) == pytest.approx(1)
        assert found == pytest.approx(logits.softmax(-1).tolist(), abs=1e-5)
        assert found[0] > 0.9  # the model knows this one

    def test_what_does_not_fit_is_unknown(self, engine, tmp_path):
        ours = models(engine, tmp_path)
        long, bad = Question("l", "word " * 600), Question("b", "\ud800")
        assert ours.choose("current", [long, bad], ("A", "B")) == [None, None]
        assert ours.logps("current", [(long.text, [5]), ("q", []), (bad.text, [5])]) == [None, None, None]
        assert [r.reason for r in ours.ask("current", [long, bad], 1, 0.0, 16)] == [
            "too long for the judge's context",
            "not valid unicode",
        ]


class TestJudgesOnARealModel:
    """The embedded model with a longer context: it judges badly, but its numbers are its own."""

    @pytest.fixture(scope="class")
    @classmethod
    def judge(cls, tmp_path_factory):
        import json
        import shutil

        from selfimprove.engine.protocol import Options

        directory = tmp_path_factory.mktemp("long") / "model"
        shutil.copytree(MODEL, directory)
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
        engine = TransformersEngine(directory, Options("float32", 2048, 64, 1, 0.5, 1))
        section = recipe.Engine(kind="transformers", max_model_len=2048)
        more = {"paths": {"current": directory}, "engine_section": section}
        return engine, models(engine, tmp_path_factory.mktemp("journal"), **more)

    @staticmethod
    def candidates(*texts):
        ours = chat.Chat(MODEL)
        prompt = "reverse order: rope shirt melon."
        return [
            Candidate("p", prompt, "current", k, text, ours.completion_ids(prompt, text), "stop")
            for k, text in enumerate(texts)
        ]

    def test_pairwise_by_label_probabilities(self, judge):
        engine, panel = judge
        one, other = self.candidates("melon shirt rope", "rope shirt melon")
        [found] = pairwise([(one, other)], panel, read="logprobs")
        ours = chat.Chat(MODEL)
        shown = {
            "question": one.prompt, "first": one.text, "second": other.text,
            "nonce": panel.nonce(f"{one.name}|{other.name}"),
        }  # fmt: skip
        text = chat.render("judge/pairwise_label", shown)
        a, b = (
            engine.prompt_logprobs([[*ours.prompt_ids(text), *ours.completion_ids(text, label)[:-1]]])[0]
            for label in "AB"
        )
        rest = len(ours.prompt_ids(text)) - 1
        odds = math.exp(sum(a[rest:]) - sum(b[rest:]))
        assert found.forward == pytest.approx(odds / (1 + odds), abs=1e-4)
        assert 0 < found.swapped < 1

    def test_pairwise_in_words_says_why_it_is_unknown(self, judge):
        _, panel = judge
        [found] = pairwise([tuple(self.candidates("melon shirt rope", "rope shirt melon"))], panel, max_tokens=16)
        assert (found.mean, found.reason) == (None, "reply not readable")
        assert all(found.replies)

    def test_logps_prefer_what_the_model_would_say(self, judge):
        engine, panel = judge
        right, wrong = self.candidates("melon shirt rope", "rope shirt melon")
        better, worse = logps([right, wrong], panel)
        prompt = chat.Chat(MODEL).prompt_ids(right.prompt)
        scored = engine.prompt_logprobs([[*prompt, *right.token_ids]])[0][len(prompt) - 1 :]
        assert better.score == pytest.approx(sum(scored) / len(scored), abs=1e-5)
        assert better.score > worse.score


def test_a_stage_that_is_killed_repeats_no_answer(tmp_path):
    """The whole program, killed in the middle of a stage's generation and resumed."""
    program = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from selfimprove import cli
        from selfimprove.engine import fake_engine
        log, limit = Path(sys.argv[1]), int(sys.argv[2])
        complete = fake_engine.FakeEngine.generate
        def generate(self, requests, sampling, finished):
            def noted(number, completions):
                finished(number, completions)
                with log.open("a") as file:
                    file.write(f"{requests[number].seed} {sampling.temperature}\\n")
                if len(log.read_text().splitlines()) == limit:
                    os.kill(os.getpid(), signal.SIGKILL)
            return complete(self, requests, sampling, noted)
        fake_engine.FakeEngine.generate = generate
        sys.argv = ["selfimprove", "iterate", "iterative_dpo", "--rounds", "1", "--engine", "fake",
                    "--run", sys.argv[3], "--set", "evaluate.n=1", "--set", "train.optimizer.epochs=1"]
        cli.main()
        """
    )

    def run(name, limit):
        log = tmp_path / f"{name}.log"
        done = subprocess.run(
            [sys.executable, "-c", program, str(log), str(limit), name], cwd=tmp_path, capture_output=True, text=True
        )
        return done, Path(log).read_text().splitlines()

    whole, asked = run("whole", -1)
    assert whole.returncode == 0, whole.stderr
    cuts = [len(asked) // 5, len(asked) // 2]
    for cut in cuts:
        killed, _ = run("cut", cut)
        assert killed.returncode == -signal.SIGKILL
    ended, again = run("cut", -1)
    assert ended.returncode == 0, ended.stderr
    assert sorted(again) == sorted(asked)  # nothing lost, nothing twice
