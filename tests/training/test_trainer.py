"""The training loop: invariants that hold for any model, checked on the embedded one."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers

from selfimprove.chat import Chat
from selfimprove.data import SHIPPED
from selfimprove.engine import canary
from selfimprove.recipe import Machine, Optimizer
from selfimprove.store import model_identity
from selfimprove.training.job import Job, PairRow, Row
from selfimprove.training.losses import dpo, simpo
from selfimprove.training.trainer import TrainingFailed, train_preference, train_sft

MODEL = SHIPPED["demo:model"]


@pytest.fixture(scope="module")
def pairs(seeds):
    chat = Chat(MODEL)
    rows = seeds[:24]
    return [
        PairRow(
            row["id"],
            chat.prompt_ids(row["prompt"]),
            chat.completion_ids(row["prompt"], row["completion"]),
            chat.completion_ids(row["prompt"], rows[i - 1]["completion"] + " and more"),
        )
        for i, row in enumerate(rows)
    ]


def job(out: Path, train_rows: int = 64, **optimizer) -> Job:
    settings = {"learning_rate": 1e-3, "epochs": 2, "batch_size": 8, **optimizer}
    return Job(
        start=MODEL,
        out=out / "policy",
        metrics=out / "metrics.jsonl",
        optimizer=Optimizer(**settings),
        machine=Machine(threads=1, train_rows=train_rows),
        seed=1,
        progress=lambda done, total: None,
    )


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_dpo_begins_at_log_2_and_learns_the_preference(tmp_path, pairs):
    last = train_preference(job(tmp_path), pairs, lambda q: dpo(q, beta=0.1), 0.1, MODEL)
    steps = lines(tmp_path)
    assert len(steps) == 6
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert last["loss"] < 0.6
    assert last["rewards/margins"] > 0
    for step in steps:  # at this size of margin the mean loss is close to the loss of the mean margin
        assert step["loss"] == pytest.approx(math.log1p(math.exp(-step["rewards/margins"])), abs=0.05)


def test_splitting_a_batch_does_not_change_the_result(tmp_path, pairs):
    weights = []
    for rows in (64, 6):
        out = tmp_path / str(rows)
        out.mkdir()
        train_preference(job(out, train_rows=rows), pairs, simpo, 2.0, None)
        weights.append(transformers.AutoModelForCausalLM.from_pretrained(out / "policy").state_dict())
    for name, one in weights[0].items():
        torch.testing.assert_close(one, weights[1][name], rtol=0, atol=2e-5, msg=name)


def test_same_seed_same_bytes(tmp_path, pairs):
    identities = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        train_preference(job(tmp_path / name), pairs, simpo, 2.0, None)
        identities.add(model_identity(tmp_path / name / "policy"))
    assert len(identities) == 1


def test_sft_learns_its_examples_and_saves_a_whole_model(tmp_path, pairs):
    examples = [Row(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    train_sft(job(tmp_path, epochs=6), examples)
    steps = lines(tmp_path)
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "policy").chat_template
    saved = canary.of(tmp_path / "policy")
    assert canary.difference(saved, canary.compute(model).logprobs) < 1e-5
    assert canary.difference(saved, canary.of(MODEL).logprobs) > 0.01  # the canary tells the two apart


def test_a_loss_that_is_not_finite_stops_before_the_weights_and_names_the_pairs(tmp_path, pairs):
    with pytest.raises(TrainingFailed, match="step 1") as raised:
        train_preference(job(tmp_path), pairs, lambda q: simpo(q) * math.inf, 2.0, None)
    assert any(pair.pair_id in str(raised.value) for pair in pairs)
    assert not (tmp_path / "policy").exists()
