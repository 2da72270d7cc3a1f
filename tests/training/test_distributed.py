"""Two processes give the losses and weights of one, whichever way the weights are held."""

import pytest
import torch

from selfimprove.errors import UserError
from selfimprove.training import launch
from tests.training.conftest import job, lines, losses, weights

DPO = {"loss": {"name": "dpo", "beta": 0.1}, "reference": "previous"}
NOISY = {"loss": {"name": "gamma_dpo", "beta": 0.5}, "reference": "previous", "noise": {"kind": "trainable"}}
CASES = {
    "margins that couple the batch, with noise": (NOISY, {}, "ddp"),
    "the same, weights sharded": (NOISY, {}, "fsdp"),
    "moving reference": ({**DPO, "reference": "ema", "ema_decay": 0.5}, {}, "ddp"),
    "moving reference, weights sharded": ({**DPO, "reference": "ema", "ema_decay": 0.5}, {}, "fsdp"),
    "adapter, weights sharded": (DPO, {"adapter": {"rank": 4, "alpha": 8.0}}, "fsdp"),
}


def trained(folder, rows, preference, machine, settings):
    folder.mkdir()
    launch.train(job(folder, rows, preference, machine, epochs=1, **settings))
    return weights(folder), lines(folder)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(tmp_path, pairs, case):
    preference, settings, sharding = CASES[case]
    alone, said = trained(tmp_path / "one", pairs, preference, {}, settings)
    machine = {"num_processes": 2, "sharding": sharding, "train_tokens": 100}
    shared, told = trained(tmp_path / "two", pairs, preference, machine, settings)
    assert {line["processes"] for line in said} == {1.0}
    assert {line["processes"] for line in told} == {2.0}  # a sum over those that answered
    for one, two in zip(said, told, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "logps/rejected", "num_tokens"):
            assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-5), name
    for one, two in zip(*(losses(tmp_path / name) for name in ("one", "two")), strict=True):
        assert (one["pair_id"], one["step"], one["epoch"]) == (two["pair_id"], two["step"], two["epoch"])
        assert (one["loss"], one["margin"]) == pytest.approx((two["loss"], two["margin"]), rel=1e-4, abs=1e-5)
    for name, tensor in alone.items():
        torch.testing.assert_close(tensor, shared[name], rtol=0, atol=5e-5, msg=name)


def test_what_goes_wrong_in_a_process_reaches_the_user(tmp_path, pairs):
    broken = {"loss": {"name": "ipo_sum", "beta": 1e-300}, "reference": "initial"}
    with pytest.raises(UserError, match="not finite at step 1") as raised:
        launch.train(job(tmp_path, pairs, broken, {"num_processes": 2}))
    assert raised.value.hint
