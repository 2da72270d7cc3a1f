"""vLLM on CUDA: it sleeps and gives the memory back, wakes on other weights, and is the engine of those weights."""

import random
import re

import pytest
import torch
import transformers

from selfimprove import data
from selfimprove.chat import Chat
from selfimprove.engine.protocol import Options, Request, Sampling
from selfimprove.engine.vllm_engine import VllmEngine
from selfimprove.training import export
from tests.training.conftest import MODEL

OPTIONS = Options(
    dtype="bfloat16",
    max_model_len=256,
    max_num_seqs=64,
    kv_cache_gib=1,
    gpu_memory_utilization=0.2,
    threads=None,
    timeout=400.0,
)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Weights of the same shape with other answers, head and embedding tied."""
    folder = tmp_path_factory.mktemp("other") / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    assert model.config.tie_word_embeddings
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3 * p.std())
    export.save(model, folder, MODEL)
    return folder


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    engine = VllmEngine(MODEL, OPTIONS, tmp_path_factory.mktemp("log") / "engine.log")
    yield engine
    engine.close()


def requests(n=1):
    chat, rng = Chat(MODEL), random.Random(0)
    rows = data.read_heldout(data.SHIPPED["demo:heldout"])[:64]
    return [Request(chat.prompt_ids(row.prompt), n, rng.randrange(2**31)) for row in rows]


def answers(engine, temperature=0.0, n=1):
    stop = Chat(MODEL).stop_token_ids
    sampling = Sampling(temperature=temperature, top_p=1.0, max_tokens=24, stop_token_ids=stop)
    return [[one.token_ids for one in row] for row in engine.generate(requests(n), sampling, lambda number, one: None)]


def scored(engine):
    return engine.prompt_logprobs([request.prompt_token_ids for request in requests()])


def exact(model):
    """Log-probabilities by transformers in float32."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = []
    for request in requests():
        ids = torch.tensor([request.prompt_token_ids])
        with torch.inference_mode():
            logprobs = loaded(ids).logits[0, :-1].log_softmax(-1)
        found.append(logprobs.gather(-1, ids[0, 1:, None])[:, 0].tolist())
    return found


def error(found, expected):
    """Mean over all tokens, in nats: in bfloat16 single ones are off by a quarter."""
    off = [abs(a - b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(off) / len(off)


def test_sleep_gives_the_memory_back_and_other_weights_wake_it(engine, other):
    engine.swap(MODEL)
    first, right = answers(engine), error(scored(engine), exact(MODEL))
    free_awake, total = torch.cuda.mem_get_info()
    engine.sleep()
    free_asleep, _ = torch.cuda.mem_get_info()
    assert free_asleep - free_awake > 0.1 * total
    engine.swap(other)
    changed = error(scored(engine), exact(other))
    assert changed < 0.03 < 0.3 < error(scored(engine), exact(MODEL))
    assert right < 0.03
    engine.sleep()
    engine.swap(MODEL)
    agree = sum(a == b for a, b in zip(answers(engine), first, strict=True))
    assert agree > 0.9 * len(first)  # kernels of bfloat16 are not bound to an order
    assert engine.rebuilds == 0
    assert engine.starts == 1


def test_awake_too_the_weights_are_swapped_and_the_prefix_cache_forgets(engine, other):
    engine.swap(MODEL)
    before = answers(engine)
    engine.swap(other)
    assert answers(engine) != before
    assert error(scored(engine), exact(other)) < 0.03
    assert engine.rebuilds == 0


def test_a_request_is_sampled_with_its_own_seed(engine):
    engine.swap(MODEL)
    one, again = answers(engine, 1.0, 3), answers(engine, 1.0, 3)
    same = sum(a == b for a, b in zip(one, again, strict=True))
    assert same > 0.8 * len(one)
    assert len({tuple(map(tuple, row)) for row in one}) > 10
    assert any(row[0] != row[1] for row in one)


def test_it_says_how_long_starts_and_swaps_took(engine):
    said = engine.log.read_text(errors="replace")
    assert re.search(r"selfimprove: engine ready after [\d.]+ s", said)
    assert re.search(r"selfimprove: swapped to .* in [\d.]+ s", said)
