"""Several processes give the losses and weights of one, whichever way the weights are held."""

import pytest
import torch

from selfimprove.errors import UserError
from selfimprove.training import launch
from tests.training.conftest import job, lines, losses, weights
from tests.training.processes import fit

DPO = {"loss": {"name": "dpo", "beta": 0.1}, "reference": "previous"}
NOISY = {"loss": {"name": "gamma_dpo", "beta": 0.5}, "reference": "previous", "noise": {"kind": "trainable"}}
EMA = {**DPO, "reference": "ema", "ema_decay": 0.5}
KTO = {"loss": {"name": "kto"}, "reference": "initial"}  # scores answers under other pairs' prompts
ADAPTER = {"adapter": {"rank": 4, "alpha": 8.0}}
RECOMPUTED = {"sharding": "fsdp", "gradient_checkpointing": True}
CASES = {
    "margins that couple the batch, with noise": (NOISY, {}, {}),
    "the same, weights sharded": (NOISY, {}, {"sharding": "fsdp"}),
    "moving reference": (EMA, {}, {}),
    "moving reference, weights sharded": (EMA, {}, {"sharding": "fsdp"}),
    "adapter, weights sharded": (DPO, ADAPTER, {"sharding": "fsdp"}),
    "activations computed again": (DPO, {}, RECOMPUTED),
    "activations computed again, adapter": (DPO, ADAPTER, RECOMPUTED),
}


def same(one, other, processes):
    """Two folders of trainings on the same rows."""
    said, told = lines(one), lines(other)
    assert {line["processes"] for line in said} == {1.0}
    assert {line["processes"] for line in told} == {processes}  # a sum over those that answered
    for a, b in zip(said, told, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "logps/rejected", "num_tokens"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), name
    for a, b in zip(losses(one), losses(other), strict=True):
        assert (a["pair_id"], a["step"], a["epoch"]) == (b["pair_id"], b["step"], b["epoch"])
        assert (a["loss"], a["margin"]) == pytest.approx((b["loss"], b["margin"]), rel=1e-4, abs=1e-5)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(other)[name], rtol=0, atol=5e-5, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(tmp_path, pairs, case):
    preference, settings, machine = CASES[case]
    machine = {"num_processes": 2, "train_tokens": 100, **machine}
    assert fit(tmp_path / "one", pairs, preference, {}, epochs=1, **settings) == [0]
    assert fit(tmp_path / "two", pairs, preference, machine, epochs=1, **settings) == [0, 0]
    same(tmp_path / "one", tmp_path / "two", 2)


@pytest.mark.parametrize("preference", [DPO, KTO], ids=["dpo", "kto"])
def test_processes_of_which_most_have_nothing_to_do_equal_one(tmp_path, pairs, preference):
    """FSDP2 hangs where one runs a pass more than another: steps of one tree or two, one of them far larger."""
    long = pairs[0]._replace(pair_id="long", chosen_ids=(pairs[0].chosen_ids * 20)[:400])
    rows = [long, pairs[2], pairs[4], pairs[6], pairs[8]]
    settings = {"epochs": 1, "batch_size": 2}
    machine = {"num_processes": 4, "sharding": "fsdp", "train_tokens": 10}  # each tree is a pass
    assert fit(tmp_path / "one", rows, preference, {}, **settings) == [0]
    assert fit(tmp_path / "four", rows, preference, machine, **settings) == [0] * 4
    same(tmp_path / "one", tmp_path / "four", 4)


def test_bfloat16_with_weights_sharded_is_close_to_one_process(tmp_path, pairs):
    settings = {"dtype": "bfloat16", "epochs": 1}
    for name, machine in (("one", {}), ("two", {"num_processes": 2, **RECOMPUTED})):
        assert set(fit(tmp_path / name, pairs, DPO, machine, **settings)) == {0}
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=0.02)
    shared = weights(tmp_path / "two")
    assert {tensor.dtype for tensor in shared.values()} == {torch.float32}
    for name, tensor in weights(tmp_path / "one").items():  # three steps of Adam are up to 3e-3 long
        assert (tensor - shared[name]).abs().mean() < 3e-4, name


def test_the_stage_starts_torchrun(tmp_path, pairs):
    assert fit(tmp_path / "one", pairs, DPO, {}, epochs=1) == [0]
    launch.train(job(tmp_path / "two", pairs, DPO, {"num_processes": 2}, epochs=1))
    same(tmp_path / "one", tmp_path / "two", 2)


def test_what_goes_wrong_in_a_process_reaches_the_user(tmp_path, pairs):
    broken = {"loss": {"name": "ipo_sum", "beta": 1e-300}, "reference": "initial"}
    with pytest.raises(UserError, match="not finite at step 1") as raised:
        launch.train(job(tmp_path, pairs, broken, {"num_processes": 2}))
    assert raised.value.hint
