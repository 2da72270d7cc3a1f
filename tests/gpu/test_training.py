"""Training on CUDA: the variable-length kernel, bfloat16, packed rows, token budgets, a resumed run, full memory."""

import math

import pytest
import torch
import transformers

from selfimprove.errors import UserError
from selfimprove.training import attention, launch
from selfimprove.training.learner import Learner
from selfimprove.training.logps import Scorer
from tests.training.conftest import job, lines, pairs, seeds, weights  # noqa: F401
from tests.training.test_attention import forward_and_gradients, random_qkv

DPO = {"loss": {"name": "dpo", "beta": 0.1}, "reference": "previous"}


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_the_kernel_equals_the_segments(window, kv_heads):
    spans = [(70, [33, 0, 90]), (1, [20]), (130, [1, 64])]
    tokens = sum(prompt + sum(responses) for prompt, responses in spans)
    inputs = random_qkv(tokens, 4, kv_heads, "cuda", torch.bfloat16)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    tree = attention.structure(spans, torch.device("cuda"))

    def packed(q, k, v):
        return attention.tree_attention(torch.nn.Identity(), q, k, v, None, sliding_window=window, tree=tree)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_segment", None)  # the kernel it must be
        found = forward_and_gradients(packed, inputs)
    for half, full in zip(found, forward_and_gradients(packed, exact), strict=True):  # float32: the segments
        difference = (half.float() - full).norm() / full.norm()
        assert difference < 0.02


def llama(hidden=256, layers=4):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    return transformers.LlamaForCausalLM(config).to("cuda")


def trees(count=24):
    from selfimprove.training.job import Tree

    generator = torch.Generator().manual_seed(1)

    def ids(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(2, 1000, (length,), generator=generator).tolist()

    return [Tree(ids(1, 90), [ids(1, 70) for _ in range(2)]) for _ in range(count)]


def summed(scorer, mode, found):
    scorer.use(mode)
    scorer.model.zero_grad()
    logps = scorer(scorer.pack(found)).logps
    signs = torch.arange(len(logps), device="cuda").cos()
    (logps * signs).sum().backward()
    gradient = torch.cat([p.grad.float().flatten() for p in scorer.model.parameters()])
    return logps.detach().double(), gradient


def test_packed_trees_equal_rows_that_are_padded_up_to_the_noise_of_bfloat16():
    found, half = trees(), torch.bfloat16
    exact, exact_gradient = summed(Scorer(llama()), "padded", found)
    packed, packed_gradient = summed(Scorer(llama(), dtype=half), "packed", found)
    padded, padded_gradient = summed(Scorer(llama(), dtype=half), "padded", found)
    noise = (padded - exact).norm()
    assert (packed - exact).norm() < 1.5 * noise
    wrong = (padded_gradient - exact_gradient).norm() / exact_gradient.norm()
    assert (packed_gradient - exact_gradient).norm() / exact_gradient.norm() < 1.5 * wrong
    assert wrong < 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dpo_begins_at_log_2_and_learns(tmp_path, pairs, dtype):  # noqa: F811
    last = launch.train(job(tmp_path, pairs, DPO, dtype=dtype))
    steps = lines(tmp_path)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6 if dtype == "float32" else 2e-3)
    assert last["loss"] < 0.6
    assert {step["packed"] for step in steps} == {1.0}
    assert steps[-1]["peak_memory_mib"] > 0
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path).values())


def test_the_gradient_does_not_depend_on_the_token_budget(tmp_path, pairs):  # noqa: F811
    found = []
    for tokens in (64, 4096):
        folder = tmp_path / str(tokens)
        folder.mkdir()
        launch.train(job(folder, pairs, DPO, {"train_tokens": tokens}, epochs=1))
        found.append([line["loss"] for line in lines(folder)])
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_a_training_that_was_stopped_goes_on_where_it_was(tmp_path, pairs, monkeypatch):  # noqa: F811
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    launch.train(job(tmp_path / "whole", pairs, DPO))
    step, count = Learner.step, []

    def stops(learner, *given, **more):
        count.append(1)
        if len(count) == 4:
            raise KeyboardInterrupt
        return step(learner, *given, **more)

    monkeypatch.setattr(Learner, "step", stops)
    machine = {"checkpoint_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        launch.train(job(tmp_path / "cut", pairs, DPO, machine))
    launch.train(job(tmp_path / "cut", pairs, DPO, machine))
    whole, cut = ([line["loss"] for line in lines(tmp_path / name)] for name in ("whole", "cut"))
    assert cut == pytest.approx(whole, abs=1e-4)  # sums of atomics have no fixed order on a GPU


def test_memory_that_does_not_last_names_the_knob(tmp_path, pairs, monkeypatch):  # noqa: F811
    monkeypatch.setattr(Learner, "probe", lambda learner, batch: torch.empty(1 << 45, device="cuda"))
    with pytest.raises(UserError, match="does not hold a micro-batch of 8192 tokens") as raised:
        launch.train(job(tmp_path, pairs, DPO, {"train_tokens": 8192}))
    assert "machine.train_tokens = 4096" in raised.value.hint
