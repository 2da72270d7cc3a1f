"""Judges on a real server: `vllm serve` of the embedded model says what the model itself says."""

import os
import re
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request

import pytest
import torch

from selfimprove import data, judges, recipe
from selfimprove.chat import Chat
from selfimprove.engine.protocol import Options, Request, Sampling
from selfimprove.engine.transformers_engine import TransformersEngine
from selfimprove.errors import UserError
from selfimprove.judges import Candidate, reading
from selfimprove.judges.journal import Journal
from selfimprove.judges.protocol import Question
from selfimprove.judges.server import Client
from tests.paths import ROOT

MODEL = data.SHIPPED["demo:model"]
QUESTIONS = [Question(str(k), row.prompt) for k, row in enumerate(data.read_heldout(data.SHIPPED["demo:heldout"])[:40])]
SETTINGS = [
    "--model", str(MODEL), "--served-model-name", "demo", "--host", "127.0.0.1",
    "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "64", "--enforce-eager",
    "--generation-config", "vllm", "--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192",
    "--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}',
]  # fmt: skip
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The command `vllm serve` looks for a package called vllm and fails in vllm-cpu; this is the server behind it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", str(port), *SETTINGS]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **ENVIRONMENT})
    try:
        deadline = time.monotonic() + 300
        while not _healthy(port):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _healthy(port):
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture
def client(url, tmp_path):
    def make(**settings):
        section = recipe.Server(**{"url": url, "model": "demo", "attempts": 2, **settings})
        return Client("local", section, Journal(tmp_path / "answers.sqlite"), lambda what, done, total: None)

    return make


@pytest.fixture(scope="module")
def chat():
    return Chat(MODEL)


@pytest.fixture(scope="module")
def engine():
    options = Options(
        dtype="float32", max_model_len=512, max_num_seqs=64, kv_cache_gib=1, gpu_memory_utilization=0.5, threads=1
    )
    return TransformersEngine(MODEL, options)


def test_its_greedy_replies_are_those_of_our_own_engine(client, chat, engine):
    ours = engine.generate(
        [Request(chat.prompt_ids(question.text), 1, 0) for question in QUESTIONS],
        Sampling(0.0, 1.0, 32, chat.stop_token_ids),
        lambda *finished: None,
    )
    one = client(input_price=1.0, output_price=2.0)
    found = one.ask(QUESTIONS, [0] * len(QUESTIONS), 1, 0.0, 32)
    assert [replies.texts for replies in found] == [(chat.text(c[0].token_ids),) for c in ours]
    assert len({replies.texts for replies in found}) > 10
    assert one.spent.prompt_tokens == sum(len(chat.prompt_ids(question.text)) for question in QUESTIONS)
    assert one.spent.completion_tokens == sum(len(c[0].token_ids) for c in ours)


def test_n_replies_at_once_are_those_asked_one_by_one(client, tmp_path):
    many = client().ask(QUESTIONS[:5], range(5), 3, 1.0, 16)
    single = Client("local", client()._server, Journal(tmp_path / "other.sqlite"), lambda *told: None)
    for k in range(3):
        one = single.ask(QUESTIONS[:5], [seed + k for seed in range(5)], 1, 1.0, 16)
        assert [replies.texts[0] for replies in one] == [replies.texts[k] for replies in many]
    assert len({text for replies in many for text in replies.texts}) > 5


def test_the_options_have_the_models_own_probabilities(client, chat, engine):
    known = 0
    for question in QUESTIONS[:10]:
        ids = chat.prompt_ids(question.text)
        with torch.inference_mode():
            logits = engine.model(torch.tensor([ids])).logits[0, -1]
        top = torch.log_softmax(logits.float(), -1).topk(20)
        words: dict[str, float] = {}
        for logprob, token in zip(top.values, top.indices, strict=True):
            text = chat.tokenizer.decode([int(token)]).strip()
            words[text] = words.get(text, 0.0) + float(logprob.exp())
        first, second = [word for word in words if word][:2]
        whole = words[first] + words[second]
        [found] = client().choose([question], (first, second, "nowhere"))
        assert found == pytest.approx([words[first] / whole, words[second] / whole, 0.0], abs=1e-4)
        known += 1
    assert known == 10


def test_it_shapes_replies_by_a_schema(client):
    schema = {"type": "object", "properties": {"verdict": {"type": "string", "enum": ["A", "B", "C"]}}}
    schema |= {"required": ["verdict"], "additionalProperties": False}
    found = client(structured_output=True).ask(QUESTIONS[:5], range(5), 2, 1.0, 64, schema)
    verdicts = [reading.first_is_better(text) for replies in found for text in replies.texts]
    assert None not in verdicts
    assert [reading.first_is_better(r.texts[0]) for r in client().ask(QUESTIONS[:5], range(5), 1, 1.0, 64)] == [
        None
    ] * 5


def test_what_does_not_fit_is_no_reply_and_what_cannot_be_sent_neither(client):
    texts = ["ab " * 33_000, "word " * 600, "hello \ud800", "nul \x00", QUESTIONS[0].text]
    found = client().ask([Question(str(k), text) for k, text in enumerate(texts)], [0] * 5, 1, 0.0, 32)
    assert [bool(replies.texts) for replies in found] == [False, False, False, True, True]
    assert "maximum context length" in found[0].reason
    assert "maximum context length" in found[1].reason


def test_the_recipe_in_the_documents_asks_it(url, client):
    """The page's sections over the shipped recipe make a recipe, whose judge asks this server."""
    page = (ROOT / "docs" / "judges.md").read_text(encoding="utf-8")
    [text] = re.findall(r"## A server\n.*?```toml\n(.*?)```", page, re.DOTALL)
    table = tomllib.loads((ROOT / "pipelines" / "default.toml").read_text(encoding="utf-8")) | tomllib.loads(text)
    whole = recipe.validated(recipe.Recipe, table, "docs/judges.md")
    assert set(recipe.Server.model_fields) - {"api_key_env"} == set(tomllib.loads(text)["servers"]["local"])
    one = client(**{**whole.servers["local"].model_dump(), "url": url})
    rows = [Candidate("p", QUESTIONS[0].text, "current", k, f"answer {k}", [], "stop") for k in range(3)]

    class Panel:
        def nonce(self, name):
            return "nonce"

        def ask(self, model, *rest):
            assert model == "server:local"
            asked, *others = rest
            return one.ask(asked, range(len(asked)), *others)

    found = judges.bind(whole.label.judge)(rows, Panel())
    assert [opinion.score is not None or bool(opinion.reason) for opinion in found] == [True] * 3
    assert one.spent.requests == 3


def test_its_refusals_are_told(client):
    with pytest.raises(UserError, match="does not exist") as ended:
        client(model="another").ask(QUESTIONS[:3], [0] * 3, 1, 0.0, 8)
    assert "/v1/models" in ended.value.hint
    with pytest.raises(UserError, match="max_model_len"):
        client().ask(QUESTIONS[:3], [0] * 3, 1, 0.0, 600)
