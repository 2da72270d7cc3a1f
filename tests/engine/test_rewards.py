"""Reward models: vLLM's pooling against plain transformers against one row at a time; several models in one pool."""

import json
import random
from pathlib import Path

import psutil
import pytest
import torch
import transformers

from selfimprove import data, recipe
from selfimprove.chat import Chat
from selfimprove.engine import Engines, checkpoints, transformers_scorer
from selfimprove.engine.protocol import Options
from selfimprove.engine.transformers_scorer import TransformersScorer
from selfimprove.errors import UserError
from tests.executing import models

MODEL = data.SHIPPED["demo:model"]
OPTIONS = Options("float32", 256, 64, 1, 0.5, 1)
SECTION = recipe.Engine(kind="vllm", max_model_len=256)
MACHINE = recipe.Machine(threads=1, max_num_seqs=64)
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 200,
    "num_labels": 1,
}


def silent(number, reward):
    pass


def make(kind: str, directory: Path, **config) -> Path:
    """A reward model of random weights, large enough that its rewards are far apart."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    given = SHAPE | {"vocab_size": 560, "pad_token_id": tokenizer.pad_token_id} | config
    torch.manual_seed(0)
    if kind == "llama":
        model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**given))
    else:
        model = transformers.Qwen3ForSequenceClassification(transformers.Qwen3Config(**given))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 5
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make("llama", tmp_path_factory.mktemp("reward") / "llama")


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return make("qwen3", tmp_path_factory.mktemp("reward") / "qwen3")


@pytest.fixture(scope="module")
def sequences():
    """Of 1 to 200 tokens in no order; some end in the pad token, and one fills the context."""
    dice = random.Random(0)
    found = [[dice.randrange(3, 558) for _ in range(dice.randint(1, 199))] for _ in range(60)]
    for ids in found[::7]:
        ids.append(0)
    return [*found, [5] * 200]


def alone(directory: Path, sequences) -> list[float]:
    """Row by row: the body's last hidden state times the head, no padding, no batch."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
    with torch.inference_mode():
        return [model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]).item() for ids in sequences]


@pytest.fixture(scope="module")
def pool(llama, qwen3, tmp_path_factory):
    """The policy's engine and both reward models at once, each a vLLM host process."""
    log = tmp_path_factory.mktemp("run") / "logs" / "engine.log"
    with Engines() as engines:
        policy = engines.get(SECTION, MACHINE, MODEL, log)
        scorers = {
            "llama": engines.judge(SECTION, MACHINE, llama, log, "reward"),
            "qwen3": engines.judge(SECTION, MACHINE, qwen3, log, "reward"),
        }
        yield engines, policy, scorers, log


def hosts() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "selfimprove.engine.host" in p.cmdline()]


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_vllm_and_transformers_read_the_raw_logit_at_the_last_token(kind, pool, sequences, request, monkeypatch):
    directory = request.getfixturevalue(kind)
    expected = alone(directory, sequences)
    assert min(expected) < 0
    assert max(expected) > 1  # no sigmoid and no softmax could say these
    assert torch.tensor(expected).std() > 0.5
    heard: dict[int, float] = {}
    assert pool[2][kind].rewards(sequences, heard.__setitem__) == pytest.approx(expected, abs=1e-4)
    assert [heard[i] for i in range(len(sequences))] == pytest.approx(expected, abs=1e-4)
    plain = TransformersScorer(directory, OPTIONS)
    heard.clear()
    together = plain.rewards(sequences, heard.__setitem__)
    assert together == pytest.approx(expected, abs=1e-4)
    assert [heard[i] for i in range(len(sequences))] == together
    monkeypatch.setattr(transformers_scorer, "TOKENS", 1)  # one row a batch
    assert plain.rewards(sequences, silent) == pytest.approx(expected, abs=1e-4)


def test_many_rows_are_answered_in_several_calls_and_in_order(pool, llama, monkeypatch):
    from selfimprove.engine import vllm_scorer

    rows = [[3 + i % 500, 7, 3 + i // 500] for i in range(50)]
    monkeypatch.setattr(vllm_scorer, "ROWS", 20)
    heard: list[int] = []
    found = pool[2]["llama"].rewards(rows, lambda number, reward: heard.append(number))
    assert found == pytest.approx(alone(llama, rows), abs=1e-4)
    assert heard == list(range(50))
    assert pool[2]["llama"].rewards([], silent) == []


def test_the_policy_answers_beside_them_and_each_has_one_process(pool, sequences):
    engines, policy, scorers, log = pool
    policy.swap(MODEL)
    some = [ids for ids in sequences if len(ids) > 1][:10]
    found = policy.prompt_logprobs(some)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL).eval()
    for ids, logprobs in zip(some, found, strict=True):
        with torch.inference_mode():
            scores = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        expected = scores[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].tolist()
        assert logprobs == pytest.approx(expected, abs=1e-3)
    assert engines.get(SECTION, MACHINE, MODEL, log) is policy
    assert len(hosts()) == 3
    assert scorers["llama"].rewards(some, silent) != scorers["qwen3"].rewards(some, silent)


def test_closing_the_pool_leaves_no_process(pool):
    """Last of those that use the pool."""
    running = hosts()
    assert len(running) == 3
    pool[0].close()
    assert not any(process.is_running() for process in running)


def test_a_pad_token_that_is_the_end_token_too_is_read_at_all_the_same(tmp_path, sequences):
    directory = make("llama", tmp_path, pad_token_id=2)
    ended = [[*ids[:-1], 2] for ids in sequences if len(ids) > 1]
    assert TransformersScorer(directory, OPTIONS).rewards(ended, silent) == pytest.approx(
        alone(directory, ended), abs=1e-4
    )


def test_in_bfloat16_the_head_does_not_round(llama, sequences):
    options = Options("bfloat16", 256, 64, 1, 0.5, 1)
    found = torch.tensor(TransformersScorer(llama, options).rewards(sequences, silent))
    assert (found != found.bfloat16().float()).float().mean() > 0.9


# what the judge hands over


class Recorder:
    """A scorer whose reward is the length of a sequence."""

    def rewards(self, sequences, finished):
        self.seen = sequences
        for number, ids in enumerate(sequences):
            finished(number, float(len(ids)))
        return [float(len(ids)) for ids in sequences]


@pytest.mark.parametrize("ending", ["<|end|>", "<|end|>\n", "<|end|> so\n", ".\n"])
def test_a_row_is_the_whole_chat_as_the_models_own_template_renders_it(ending, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|end|>'", f"'{ending}'".replace("\n", "\\n"))
    tokenizer.save_pretrained(tmp_path)
    rows = [("Add 2 and 3.", "5"), ("Who?", "I do not know."), ("", "")]
    scorer = Recorder()
    found = models(scorer, tmp_path / "scratch", paths={"current": tmp_path}).rewards("current", rows)
    for (prompt, answer), ids in zip(rows, scorer.seen, strict=True):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        assert text.endswith(answer + ending)
        assert ids == tokenizer.encode(text, add_special_tokens=False)
        assert ids.count(tokenizer.bos_token_id) == 1
    assert found == [len(ids) for ids in scorer.seen]


def reader(scorer, scratch, limit):
    """A panel of one reward model whose context holds `limit` tokens."""
    return models(scorer, scratch, engine_section=recipe.Engine(kind="fake", max_model_len=limit))


def test_what_does_not_fit_or_cannot_be_read_is_unknown_and_keeps_its_place(tmp_path):
    chat, scorer = Chat(MODEL), Recorder()
    long = "a " * 20  # no context is shorter than 16 tokens
    rows = [(long, "b"), (long, "b " * 300), (long, "\ud800"), (long, "c")]
    length = len(chat.prompt_ids(long)) + len(chat.completion_ids(long, "b"))
    assert reader(scorer, tmp_path, length).rewards("current", rows) == [length, None, None, length]
    assert [len(ids) for ids in scorer.seen] == [length, length]
    scorer.seen = []
    assert reader(scorer, tmp_path, length - 1).rewards("current", rows) == [None] * 4
    assert scorer.seen == []


def test_a_reward_that_is_no_number_is_unknown(tmp_path):
    class Broken:
        def rewards(self, sequences, finished):
            found = [float("nan"), float("inf"), 1.0]
            for number, reward in enumerate(found):
                finished(number, reward)
            return found

    assert reader(Broken(), tmp_path, 100).rewards("current", [("a", "b")] * 3) == [None, None, 1.0]


# what is refused


def rewrite(directory: Path, **changed) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changed))


REFUSED = {
    "a policy": ({"architectures": ["LlamaForCausalLM"]}, "no reward model: its architecture is LlamaForCausalLM"),
    "another family's head": ({"model_type": "qwen3"}, "no reward model"),
    "three labels": ({"id2label": {"0": "a", "1": "b", "2": "c"}}, "has 3 labels"),
    "code of its own": (
        {"auto_map": {"AutoModelForSequenceClassification": "modeling.Gated"}, "architectures": ["Gated"]},
        "trust_remote_code",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_no_reward_model_is_refused_before_anything_starts(why, tmp_path):
    changed, message = REFUSED[why]
    directory = make("llama", tmp_path / "model")
    checkpoints.check_reward_model(directory)
    rewrite(directory, **changed)
    with Engines() as engines, pytest.raises(UserError, match=message) as raised:
        engines.judge(SECTION, MACHINE, directory, tmp_path / "logs" / "engine.log", "reward")
    assert raised.value.hint
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("task", ["reward", "generate"])
def test_pickled_weights_are_refused(task, tmp_path):
    directory = make("llama", tmp_path / "model")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with Engines() as engines, pytest.raises(UserError, match=r"no \.safetensors weights, only pytorch_model\.bin"):
        engines.judge(SECTION, MACHINE, directory, tmp_path / "logs" / "engine.log", task)


def test_a_directory_without_a_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        checkpoints.check_reward_model(tmp_path)


def test_a_head_without_weights_is_refused_and_not_drawn_at_random(tmp_path):
    from safetensors.torch import load_file, save_file

    directory = make("llama", tmp_path)
    weights = load_file(directory / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    for opened in (lambda: TransformersScorer(directory, OPTIONS), lambda: checkpoints.check_reward_model(directory)):
        with pytest.raises(UserError, match=r"no weights for score\.weight"):
            opened()


# the pool


class Stub:
    """Counts what is asked of it."""

    def __init__(self, name):
        self.name, self.asleep, self.closed = name, 0, False

    def sleep(self):
        self.asleep += 1

    def close(self):
        self.closed = True


@pytest.fixture
def stubs(monkeypatch):
    """Engines whose models are stubs; opening one needs all others asleep."""
    opened: list[Stub] = []

    def open_one(section, machine, model, log, task="policy"):
        assert all(one.closed or one.asleep for one in opened)
        opened.append(Stub((task, model.name)))
        return opened[-1]

    monkeypatch.setattr("selfimprove.engine.open_engine", open_one)
    monkeypatch.setattr("selfimprove.engine.open_judge", open_one)
    return opened


def test_all_others_sleep_before_one_is_handed_out(stubs):
    engines, log = Engines(), Path("a/logs/engine.log")
    policy = engines.get(SECTION, MACHINE, Path("policy"), log)
    judge = engines.judge(SECTION, MACHINE, Path("judge"), log, "generate")
    assert policy.asleep
    assert not judge.asleep
    policy.asleep = 0
    assert engines.get(SECTION, MACHINE, Path("policy"), log) is policy
    assert judge.asleep
    assert not policy.asleep
    assert engines.judge(SECTION, MACHINE, Path("judge"), log, "generate") is judge
    assert engines.judge(SECTION, MACHINE, Path("judge"), log, "reward") is not judge
    assert not any(one.closed for one in stubs)
    engines.close()
    assert all(one.closed for one in stubs)


def test_runs_share_what_they_both_want_and_an_earlier_runs_judge_makes_room(stubs):
    engines, first, second = Engines(), Path("a/logs/engine.log"), Path("b/logs/engine.log")
    policy = engines.get(SECTION, MACHINE, Path("policy"), first)
    kept = engines.judge(SECTION, MACHINE, Path("kept"), first, "reward")
    left = engines.judge(SECTION, MACHINE, Path("left"), first, "reward")
    assert engines.judge(SECTION, MACHINE, Path("kept"), second, "reward") is kept
    assert engines.get(SECTION, MACHINE, Path("policy"), second) is policy
    engines.judge(SECTION, MACHINE, Path("new"), second, "reward")
    assert left.closed
    assert not policy.closed
    assert not kept.closed
    other = engines.get(SECTION, MACHINE, Path("another"), second)
    assert policy.closed
    assert not other.closed
    assert len([one for one in stubs if not one.closed]) == 3


def test_the_context_is_the_recipes_or_the_models_where_that_is_shorter(llama):
    assert checkpoints.context_length(llama, recipe.Engine(max_model_len=64)) == 64
    assert checkpoints.context_length(llama, recipe.Engine(max_model_len=4096)) == 200


@pytest.mark.parametrize("task", ["generate", "reward", "compare"])
def test_the_fake_engine_has_a_judge_for_every_task(task, tmp_path):
    section = recipe.Engine(kind="fake")
    with Engines() as engines:
        judge = engines.judge(section, MACHINE, MODEL, tmp_path / "logs" / "engine.log", task)
        judge.sleep()
        if task == "reward":
            assert judge.rewards([[1, 2], [3]], silent) == judge.rewards([[1, 2], [3]], silent)
        if task == "compare":
            [one, other] = judge.compare([("q", "a", "b"), ("q", "b", "a")], silent)
            assert one.logit == -other.logit != 0
